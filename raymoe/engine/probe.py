"""What a model's attention layers store, learned by running it once with its experts silenced.

Configs name heads and widths differently in every family; the calls themselves do not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raymoe.engine.attention import AttentionCall, answering
from raymoe.engine.kv import KVShape
from raymoe.engine.seam import Experts
from raymoe.engine.softmax import attend

PROBE_IDS = (0, 1, 2, 3, 4, 5)
"""In every vocabulary."""


class ShapeRecorder:
    """Answers attention calls of one short prompt, and notes what each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, KVShape] = {}

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        _, heads, _, width = call.key.shape
        self.shapes[module] = KVShape(
            heads=heads,
            key_dim=width,
            value_dim=call.value.shape[-1],
            dtype=call.key.dtype,
        )
        group = call.query.shape[1] // heads
        key = call.key.repeat_interleave(group, dim=1)
        value = call.value.repeat_interleave(group, dim=1)
        sinks = None if call.sinks is None else call.sinks.view(1, -1, 1)
        out = attend(
            call.query, key, value, scale=call.scale, causal=True, sinks=sinks, cap=call.cap
        )
        return out[0].transpose(0, 1)


def probe(model: Any, experts: Experts | None) -> dict[nn.Module, KVShape]:
    """What each attention module stores, in execution order.

    The experts are silenced meanwhile, so that an engine can be built before any group is ready.
    """
    recorder = ShapeRecorder()
    with answering(recorder):
        stock_logits(model, experts)
    return recorder.shapes


def stock_logits(model: Any, experts: Experts | None) -> Tensor:
    """Logits [len(PROBE_IDS), V] of one plain forward, with the experts silenced."""
    device = next(model.parameters()).device
    ids = torch.tensor([PROBE_IDS], device=device)
    positions = torch.arange(len(PROBE_IDS), device=device).unsqueeze(0)
    with torch.inference_mode(), silenced(experts):
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    return logits


_SILENCING = threading.Lock()


class _Silence:
    """A pending result that never left this thread."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def silenced(experts: Any) -> Iterator[None]:
    """This thread's calls of `experts` return their input; other threads' go through as ever."""
    if experts is None:
        yield
        return
    thread = threading.get_ident()
    dispatch, combine = experts.dispatch, experts.combine

    def quiet_dispatch(layer: int, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Any:
        if threading.get_ident() == thread:
            return _Silence(hidden)
        return dispatch(layer, hidden, expert_ids, weights)

    def quiet_combine(pending: Any) -> Any:
        return pending.hidden if isinstance(pending, _Silence) else combine(pending)

    with _SILENCING:
        experts.dispatch, experts.combine = quiet_dispatch, quiet_combine
        try:
            yield
        finally:
            del experts.dispatch, experts.combine
