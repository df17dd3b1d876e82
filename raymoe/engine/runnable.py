"""The two ways to run a model, and which one a model gets."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from torch import Tensor

from raymoe.checkpoint.families import attention_kind
from raymoe.engine.attention import ATTENTION
from raymoe.engine.batch import Chunks
from raymoe.engine.blocks import BlockPool
from raymoe.engine.cached import CachedModel
from raymoe.engine.config import EngineConfig
from raymoe.engine.paged import PagedModel
from raymoe.engine.probe import stock_logits
from raymoe.engine.scheduler import StepPlan
from raymoe.engine.seam import Experts

log = logging.getLogger(__name__)


class Runnable(Protocol):
    """A model with a pool of blocks that runs chunks of sequences."""

    pool: BlockPool
    token_bytes: int
    chunked_prefill: bool

    def order(self, plan: StepPlan, *, alone: bool = False) -> Chunks:
        """The plan's chunks in the order this model wants them; `alone`: each is run by itself."""
        ...

    def forward(self, chunks: Chunks, rows: list[int]) -> Tensor:
        """Logits [R, V] of the given packed rows, for chunks ordered by `order`."""
        ...

    def spoilt(self, chunks: Chunks) -> None:
        """Make the sequences runnable again after a forward of `chunks` that raised."""
        ...


def runnable(model: Any, experts: Experts | None, config: EngineConfig) -> Runnable:
    """Packed where the family's state is keys and values, proved on a few tokens; else by cache."""
    stock = model.config._attn_implementation
    if stock == ATTENTION:  # another engine has it packed already, and has proved it
        return PagedModel(model, experts, config)
    if attention_kind(model) == "softmax":
        truth = stock_logits(model, experts)
        paged = PagedModel(model, experts, config)
        if paged.agrees(truth, experts):
            paged.fuse()
            if not paged.agrees(truth, experts):
                log.warning("fused operations do not fit %s", model.config.model_type)
                paged.unfuse()
            return paged
        log.warning(
            "packed attention does not give %s its own logits: its requests run one by one",
            model.config.model_type,
        )
        model.set_attn_implementation(stock)
    return CachedModel(model, experts, config)
