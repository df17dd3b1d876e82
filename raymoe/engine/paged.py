"""The fast way to run a model: one packed forward a step over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from raymoe.engine.attention import ATTENTION, PackedStep, answering, chunk_of
from raymoe.engine.batch import Chunks, StepBatch
from raymoe.engine.blocks import BlockPool
from raymoe.engine.config import EngineConfig
from raymoe.engine.fused import fuse
from raymoe.engine.kv import KVCache, compiled_for, token_bytes
from raymoe.engine.lanes import Lanes, Shelf
from raymoe.engine.probe import PROBE_IDS, probe, silenced
from raymoe.engine.scheduler import StepPlan
from raymoe.engine.seam import Experts
from raymoe.engine.sequence import Sequence, start_sequence
from raymoe.engine.tables import SPLIT_BYTES
from raymoe.engine.turns import in_turns
from raymoe.errors import ConfigError
from raymoe.requests import GenerationRequest, SamplingParams

AGREE_WITHIN = 0.02
"""Of the largest logit: far above rounding, also in bfloat16, far below any wrong attention."""


class PagedModel:
    """A model whose every layer is softmax attention with a KV cache of its own.

    Raises `ConfigError` when the budget holds fewer than two blocks.
    """

    chunked_prefill = True

    def __init__(self, model: Any, experts: Experts | None, config: EngineConfig) -> None:
        self._model = model
        self._device: torch.device = next(model.parameters()).device
        model.set_attn_implementation(ATTENTION)
        shapes = probe(model, experts)
        self.token_bytes = token_bytes(shapes)
        self._attention_chunks = {module: chunk_of(module) for module in shapes}
        self._native = compiled_for(shapes, self._device) if config.compiled else None
        lanes_share = config.lanes_share if self._native is None else 0.0  # it reads the blocks
        self.pool = BlockPool(
            block_count(config, int(self.token_bytes * config.block_tokens / (1 - lanes_share))),
            config.block_tokens,
        )
        widest = max(shape.token_bytes for shape in shapes.values())
        self._lanes = Lanes(
            budget_tokens=int(config.kv_bytes * lanes_share) // self.token_bytes,
            split_tokens=SPLIT_BYTES // widest,
        )
        self._shelves: list[Shelf] = []
        self._microbatch_tokens = config.microbatch_tokens
        self._undo: Callable[[], None] = lambda: None
        self._cache = KVCache(shapes, self.pool.blocks, config.block_tokens, self._device)

    def order(self, plan: StepPlan, *, alone: bool = False) -> Chunks:
        """The rows of a step: lanes first, shelf by shelf, then the longest, then prefill.

        `alone`: each chunk is run by itself. Then there are no lanes: they are for all members.
        """
        if self._native is not None or alone:
            self._lanes.clear()
            self._shelves = []
            return [(one, 1) for one in plan.decode] + plan.prefill
        decode = sorted(plan.decode, key=lambda one: -len(one.tokens))
        self._shelves = self._lanes.place(decode)
        laned = [one for shelf in self._shelves for one in shelf.members]
        known = set(laned)
        rest = [one for one in decode if one not in known]
        return [(one, 1) for one in laned + rest] + plan.prefill

    def forward(self, chunks: Chunks, rows: list[int]) -> Tensor:
        """Logits [R, V] of the given packed rows; decode rows come first in `chunks`.

        Keys and values are written by position: running a step again changes nothing.
        """
        fresh = self.pool.drain_fresh()
        if fresh:
            self._cache.zero(fresh)
        self._cache.keep_lanes(self._shelves)
        halves = halved(chunks, self._microbatch_tokens)
        if halves is None:
            return self._run(chunks, rows, self._shelves)
        first, second = halves
        border = sum(tokens for _, tokens in first)
        of_first = [row for row in rows if row < border]
        of_second = [row - border for row in rows[len(of_first) :]]
        return torch.cat(
            in_turns(
                lambda: self._run(first, of_first, self._shelves),
                lambda: self._run(second, of_second, []),
                border,
            )
        )

    def _run(self, chunks: Chunks, rows: list[int], shelves: list[Shelf]) -> Tensor:
        """One forward of the model."""
        batch = StepBatch(chunks, self.pool.block_tokens, self._device, shelves)
        keep: int | Tensor = 0  # all
        if len(rows) < batch.tokens:
            keep = torch.tensor(rows, dtype=torch.int64, device=self._device)
        with answering(PackedStep(self._cache, batch, self._attention_chunks, self._native)):
            logits: Tensor = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=keep,
            ).logits[0]
        return logits

    def fuse(self) -> None:
        """Make one call of many small operations where that gives the same."""
        if self._native is not None:
            self._undo = fuse(self._model, self._attention_chunks, self._native)

    def unfuse(self) -> None:
        """Take `fuse` back."""
        self._undo()

    def agrees(self, truth: Tensor, experts: Experts | None) -> bool:
        """Whether PROBE_IDS, in two chunks and then token by token, give the logits `truth`.

        It shows a family that keeps other state between tokens than keys and values.
        """
        request = GenerationRequest(
            request_id="", prompt_ids=PROBE_IDS, sampling=SamplingParams(seed=0)
        )
        sequence: Sequence = start_sequence(request, 0)
        sequence.blocks = self.pool.take(self.pool.blocks_of(len(PROBE_IDS)))
        found = []
        with torch.inference_mode(), silenced(experts):
            for tokens in (2, 2, *(1 for _ in PROBE_IDS[4:])):
                found.append(self.forward([(sequence, tokens)], list(range(tokens))))
                sequence.computed += tokens
        self.pool.give_back(sequence.blocks)
        differ = (torch.cat(found) - truth).abs().max()
        return bool(differ <= AGREE_WITHIN * truth.abs().max())

    def spoilt(self, chunks: Chunks) -> None:
        """A forward was cut short, with lanes filled in some layers only; blocks are right."""
        self._lanes.clear()


def halved(chunks: Chunks, least: int) -> tuple[Chunks, Chunks] | None:
    """A step's chunks as two micro-batches of half its tokens each; None for a step to be run as
    one: `least` is 0, a half would have fewer tokens, or all but decode rows would be in one.

    The chunk at the border is cut; its rest begins where its first part, computed before, ends.
    """
    ends = list(accumulate(tokens for _, tokens in chunks))
    half = ends[-1] // 2
    if not least or half < least:
        return None
    at = next(number for number, end in enumerate(ends) if end >= half)
    sequence, tokens = chunks[at]
    rest = ends[at] - half
    if tokens == 1 and sequence.computed:
        return None
    if not rest:
        return chunks[: at + 1], chunks[at + 1 :]
    later = copy(sequence)
    later.computed += tokens - rest
    return [*chunks[:at], (sequence, tokens - rest)], [(later, rest), *chunks[at + 1 :]]


def block_count(config: EngineConfig, block_bytes: int) -> int:
    """How many blocks the budget holds. Raises ConfigError when that is less than three."""
    blocks = config.kv_bytes // block_bytes
    if blocks < 3:
        raise ConfigError(
            f"kv_bytes {config.kv_bytes} holds {blocks} blocks of {block_bytes} bytes "
            f"({config.block_tokens} tokens each); 3 are the least"
        )
    return blocks
