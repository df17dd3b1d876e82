"""Decides what one step computes. Pure: no tensors, no clock."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from raymoe.engine.blocks import BlockPool
from raymoe.engine.prefix import PrefixChain
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
    `chunk_tokens` tokens a step (None: whole prompts). When blocks run out, the sequence that
    would be served last loses its blocks and waits to be computed again (its tokens are kept);
    one with a lower priority number that comes takes the place of one with a higher.
    With a `chain`, full blocks are shared among sequences that begin with the same tokens.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        chunk_tokens: int | None,
        chain: PrefixChain | None = None,
    ) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.chunk_tokens = chunk_tokens
        self.waiting: list[Sequence] = []  # sorted by order, as is running
        self.running: list[Sequence] = []
        self.admitted: list[Sequence] = []  # since whoever reads this has emptied it
        self.preemptions = 0
        self.queried_tokens = 0  # of sequences when they began, or began again
        self.reused_tokens = 0  # of those, taken from published blocks
        self._chain = chain

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
        decode: list[Sequence] = []
        prompts: list[Sequence] = []
        for one in self.running:
            if one.away is not None:  # it keeps its blocks
                continue
            if one.pending > 1:
                self._reuse(one)
            (decode if one.pending == 1 and one.computed else prompts).append(one)
        budget = sys.maxsize if self.chunk_tokens is None else self.chunk_tokens
        return StepPlan(decode=decode, prefill=share_out(self._first_of_alike(prompts), budget))

    def commit(self, one: Sequence, tokens: int) -> None:
        """The next `tokens` tokens of a sequence have been computed: only now are the blocks that
        they fill shown to others."""
        one.computed += tokens
        full = one.computed // self.pool.block_tokens
        if self._chain is None or full <= one.published:
            return
        keys = self._chain.keys(one, full)
        for at in range(one.published, full):
            self.pool.publish(one.blocks[at], keys[at])
        one.published = full

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
        while self.waiting:
            one = self.waiting[0]
            found: list[int] = []
            if self._chain is not None:
                found = self.pool.find(self._chain.keys(one, self._chain.reusable(one)))
            need = self.pool.blocks_of(len(one.tokens)) - len(found)
            if not self._make_room(one, need, found):
                break
            self.waiting.pop(0)
            self.admitted.append(one)
            self.pool.share(found)
            one.blocks = found + self.pool.take(need)
            self.queried_tokens += len(one.tokens)
            self._count_reused(one, len(found))
            bisect.insort(self.running, one, key=lambda each: each.order)

    def _make_room(self, one: Sequence, need: int, found: list[int]) -> bool:
        """Whether a waiting sequence can run with `need` more blocks than `found`; if need be,
        those of a higher priority number go back to wait, the last one first."""
        behind = [each for each in self.running if each.request.priority > one.request.priority]
        stay = len(self.running) - len(behind)
        most = need + stay - sum(len(each.blocks) for each in behind)
        if stay >= self.max_batch or not self.pool.can_take(most, besides=found):
            return False  # not even with all of them gone
        while not self._fits(need, found):
            if not self.running or self.running[-1].request.priority <= one.request.priority:
                return False
            self._preempt(self.running[-1])
        return True

    def _fits(self, need: int, found: list[int]) -> bool:
        # One spare block for each that runs, or what was just preempted would come straight
        # back and be preempted again.
        return len(self.running) < self.max_batch and self.pool.can_take(
            need + len(self.running), besides=found
        )

    def _reuse(self, one: Sequence) -> None:
        """Change blocks that are not written yet for ones that others have computed meanwhile."""
        size = self.pool.block_tokens
        if self._chain is None or one.computed % size:
            return
        at, most = one.computed // size, self._chain.reusable(one)
        if at >= most:
            return
        found = self.pool.find(self._chain.keys(one, most)[at:])
        self.pool.share(found)
        self.pool.give_back(one.blocks[at : at + len(found)])
        one.blocks[at : at + len(found)] = found
        self._count_reused(one, len(found))

    def _count_reused(self, one: Sequence, blocks: int) -> None:
        tokens = blocks * self.pool.block_tokens
        one.computed += tokens
        one.published += blocks
        self.reused_tokens += tokens
        if not one.preempted:  # then it might have computed them itself
            one.cached_tokens = min(one.cached_tokens + tokens, one.prompt_tokens)

    def _first_of_alike(self, prompts: Iterable[Sequence]) -> list[Sequence]:
        """Of prompts whose next block is the same, one computes it; the others take it then."""
        if self._chain is None:
            return list(prompts)
        going, coming = [], set()
        for one in prompts:
            key = self._chain.key_at(one, one.computed)
            whole = one.computed % self.pool.block_tokens == 0
            may = one.computed // self.pool.block_tokens < self._chain.reusable(one)
            if key in coming and whole and may:
                continue
            if key is not None:
                coming.add(key)
            going.append(one)
        return going

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        sequence.preempted = True
        self.preemptions += 1
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0
        sequence.state = None


def share_out(prompts: Rows[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Chunks of prompts, given in the order of service, within a budget of tokens.

    Half of the budget goes by that order, so that every prompt comes to its end; the other half to
    the shortest rests, so that a short prompt does not wait for a long one. Among prompts of equal
    length it is first come, first served. A lower priority number comes first in both halves.
    """
    chunks = dict.fromkeys(prompts, 0)

    def give(order: Iterable[Sequence], tokens: int) -> int:
        for one in order:
            part = min(tokens, one.pending - chunks[one])
            chunks[one] += part
            tokens -= part
        return tokens

    left = give(prompts, budget - budget // 2)
    shortest = sorted(prompts, key=lambda one: (one.request.priority, one.pending - chunks[one]))
    give(shortest, left + budget // 2)
    return [(one, tokens) for one, tokens in chunks.items() if tokens]
