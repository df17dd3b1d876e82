"""The slow way to run a model: one transformers cache and one forward a request.

For families that keep other state than keys and values (Mamba, linear attention, convolutions,
indexed or compressed attention). Everything but speed is the same: requests join and leave,
sampling, preemption by recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymoe.engine.batch import Chunks
from raymoe.engine.blocks import BlockPool
from raymoe.engine.config import EngineConfig
from raymoe.engine.paged import block_count
from raymoe.engine.probe import PROBE_IDS, silenced
from raymoe.engine.scheduler import StepPlan
from raymoe.engine.seam import Experts


class CachedModel:
    """Runs chunks one by one; a prompt is one chunk, since states rarely continue in the middle."""

    chunked_prefill = False

    def __init__(self, model: Any, experts: Experts | None, config: EngineConfig) -> None:
        self._model = model
        self._device: torch.device = next(model.parameters()).device
        with torch.inference_mode(), silenced(experts):
            short, long = (self._measure(PROBE_IDS * times) for times in (1, 5))
        self.token_bytes = -(-(long - short) // (4 * len(PROBE_IDS)))
        state_bytes = max(0, short - self.token_bytes * len(PROBE_IDS))
        # A block is the bytes of `block_tokens` tokens; a request's fixed state counts in blocks.
        block_bytes = self.token_bytes * config.block_tokens or state_bytes
        self.pool = BlockPool(
            block_count(config, block_bytes),
            config.block_tokens,
            extra_blocks=-(-state_bytes // block_bytes),
        )

    def _measure(self, ids: tuple[int, ...]) -> int:
        """Bytes of a cache after a prompt."""
        _, cache = self._run(None, 0, list(ids), 1)
        return sum(each.nbytes for each in _tensors(cache))

    def order(self, plan: StepPlan, *, alone: bool = False) -> Chunks:
        """The rows of a step."""
        return [(one, 1) for one in plan.decode] + plan.prefill

    def forward(self, chunks: Chunks, rows: list[int]) -> Tensor:
        """Logits [R, V] of the given packed rows."""
        found, row = [], 0
        for sequence, tokens in chunks:
            start = sequence.computed
            assert sequence.state is not None or start == 0
            wanted = [each - row for each in rows if row <= each < row + tokens]
            ids = sequence.tokens[start : start + tokens]
            first = min(wanted, default=tokens - 1)
            logits, sequence.state = self._run(sequence.state, start, ids, tokens - first)
            found.append(logits[[each - first for each in wanted]])
            row += tokens
        self.pool.drain_fresh()
        return torch.cat(found)

    def _run(self, cache: Any, start: int, ids: list[int], keep: int) -> tuple[Tensor, Any]:
        """Logits [keep, V] of the last `keep` of `ids`, at positions from `start`, and the cache.

        Without a cache the model makes one of its family's own kind.
        """
        end = start + len(ids)
        made = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.arange(start, end, device=self._device).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return made.logits[0], made.past_key_values

    def spoilt(self, chunks: Chunks) -> None:
        """A forward was cut short with some states advanced: those requests begin again."""
        for sequence, _ in chunks:
            sequence.state = None
            sequence.computed = 0


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a cache: in its layers, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [found for each in value for found in _tensors(each)]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return _tensors(vars(value)) if type(value).__module__.startswith("transformers.") else []
