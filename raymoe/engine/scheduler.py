"""Decides what one step computes. Pure: no tensors, no clock."""

from __future__ import annotations

import bisect
import sys
from dataclasses import dataclass

from raymoe.engine.blocks import BlockPool
from raymoe.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Rows of one step: decode rows of one token each, and (sequence, tokens) chunks of prefill."""

    decode: list[Sequence]
    prefill: list[tuple[Sequence, int]]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """Waiting and running sequences over one pool of blocks.

    Every running sequence that decodes gets its row in every step; prefill shares a budget of
    `chunk_tokens` tokens a step (None: whole prompts), first come first served. When blocks run
    out, the sequence that would be served last loses its blocks and waits to be computed again
    (its tokens are kept).
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, chunk_tokens: int | None) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.chunk_tokens = chunk_tokens
        self.waiting: list[Sequence] = []  # sorted by order, as is running
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda one: one.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)

    def plan(self) -> StepPlan:
        """What the next step computes; allocates the blocks it writes.

        Planning again without having committed the plan gives the same rows.
        """
        self._grow()
        self._admit()
        decode = [one for one in self.running if one.pending == 1 and one.computed]
        prefill: list[tuple[Sequence, int]] = []
        budget = sys.maxsize if self.chunk_tokens is None else self.chunk_tokens
        for one in self.running:
            if one.pending == 1 and one.computed:
                continue
            if budget == 0:
                break
            tokens = min(budget, one.pending)
            prefill.append((one, tokens))
            budget -= tokens
        return StepPlan(decode=decode, prefill=prefill)

    def _grow(self) -> None:
        """Give every running sequence the blocks of its pending tokens, preempting from the end."""
        for one in list(self.running):
            while one.blocks:  # a sequence preempted meanwhile has none
                need = self.pool.blocks_of(len(one.tokens)) - len(one.blocks)
                if self.pool.can_take(need):
                    one.blocks += self.pool.take(need)
                    break
                self._preempt(self.running[-1])

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            one = self.waiting[0]
            need = self.pool.blocks_of(len(one.tokens))
            # One spare block for each that runs, or what was just preempted would come straight
            # back and be preempted again.
            if not self.pool.can_take(need + len(self.running)):
                break
            self.waiting.pop(0)
            one.blocks = self.pool.take(need)
            bisect.insort(self.running, one, key=lambda each: each.order)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.preemptions += 1
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.state = None
