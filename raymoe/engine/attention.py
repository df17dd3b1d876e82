"""Attention of one packed step over the paged cache, registered with transformers.

Letters: N packed tokens, B decode rows, H query heads, H_kv key/value heads, g = H / H_kv.

transformers calls a registered function with the attention module and the packed queries, keys
and values; an attention name without a mask function gets no mask, so masking is ours. Which
step the call belongs to stands in a context variable, set around the forward: two engines in two
threads of one process never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from raymoe.engine.batch import Bucket, Reach, Segment, StepBatch
from raymoe.engine.kv import KVCache, LayerKV

ATTENTION = "raymoe_packed"
"""Our name in transformers' registry of attention functions."""


class AttentionStep(Protocol):
    """Whoever answers the model's attention calls during one forward."""

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        """-> [N, H, D_v]."""
        ...


class AttentionCall:
    """One layer's packed query [1, H, N, D_k], key [1, H_kv, N, D_k], value [1, H_kv, N, D_v]."""

    __slots__ = ("cap", "key", "query", "scale", "sinks", "value", "window")

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        options: dict[str, Any],
    ) -> None:
        self.query = query
        self.key = key
        self.value = value
        self.scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.window: int | None = options.get("sliding_window")
        self.sinks: Tensor | None = options.get("s_aux")
        self.cap: float | None = options.get("softcap")


_STEP: ContextVar[AttentionStep] = ContextVar("raymoe_attention_step")


@contextmanager
def answering(step: AttentionStep) -> Iterator[None]:
    """Attention calls of this thread go to `step` meanwhile."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    call = AttentionCall(query, key, value, scaling, options)
    return _STEP.get().attend(module, call).unsqueeze(0), None  # [1, N, H, D_v]


AttentionInterface.register(ATTENTION, _attention)


def chunk_of(module: nn.Module) -> int | None:
    """The attention chunk of a layer that sees only its own (Llama 4), else None."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if kinds is None or layer is None or layer >= len(kinds):
        return None
    if kinds[layer] != "chunked_attention":
        return None
    size: int | None = getattr(config, "attention_chunk_size", None)
    return size


class PackedStep:
    """Answers one step's attention calls: writes the new keys and values, then attends.

    Rows are written by position, so that running a step again changes nothing.
    """

    def __init__(
        self, cache: KVCache, batch: StepBatch, chunks: dict[nn.Module, int | None]
    ) -> None:
        self._cache = cache
        self._batch = batch
        self._chunks = chunks

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        batch, layer = self._batch, self._cache.layers[module]
        reach = Reach(call.window, self._chunks[module])
        value = layer.padded(call.value)
        layer.write(batch.pool_rows, call.key[0].transpose(0, 1), value[0].transpose(0, 1))
        buckets = batch.buckets(reach, layer.shape.token_bytes)
        segments = batch.segments(reach)
        query = call.query[0]  # [H, N, D_k]
        if len(buckets) == 1 and not segments:
            out = _decode(layer, buckets[0], query, call)
        else:
            out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
            for bucket in buckets:
                rows = query[:, bucket.first : bucket.last]
                out[bucket.first : bucket.last] = _decode(layer, bucket, rows, call)
            for segment in segments:
                out[segment.first : segment.last] = _prefill(layer, segment, call, value)
        return out[..., : layer.shape.value_dim]


def _decode(layer: LayerKV, bucket: Bucket, query: Tensor, call: AttentionCall) -> Tensor:
    """Queries [H, B, D_k], one a sequence -> [B, H, stored value width]."""
    heads, rows, width = query.shape
    key, value = layer.gather(bucket.table, rows)  # [B, keys, H_kv, D]
    key = key[:, bucket.start : bucket.stop].transpose(1, 2)
    value = value[:, bucket.start : bucket.stop].transpose(1, 2)
    shared = layer.shape.heads
    # The g query heads of a key head stand as g queries of it: no copy of keys or values.
    folded = query.transpose(0, 1).reshape(rows, shared, heads // shared, width)
    sinks = None if call.sinks is None else call.sinks.view(1, shared, -1)
    out = attend(folded, key, value, call, causal=False, mask=bucket.mask, sinks=sinks)
    return out.reshape(rows, heads, -1)


def _prefill(layer: LayerKV, segment: Segment, call: AttentionCall, value: Tensor) -> Tensor:
    """One chunk's queries -> [rows, H, stored value width]."""
    query = call.query[0, :, segment.first : segment.last]  # [H, rows, D_k]
    heads, rows, width = query.shape
    shared = layer.shape.heads
    if segment.table is None:
        keys = call.key[0, :, segment.first : segment.last]
        values = value[0, :, segment.first : segment.last]
    else:
        key, gathered = layer.gather(segment.table, 1)
        keys = key[0, : segment.stop].transpose(0, 1)
        values = gathered[0, : segment.stop].transpose(0, 1)
    group = heads // shared
    folded = query.reshape(shared, group, rows, width)
    # A stride of 0 over the g heads: the kernel reads strides, nothing is copied.
    keys = keys.unsqueeze(1).expand(-1, group, -1, -1)
    values = values.unsqueeze(1).expand(-1, group, -1, -1)
    sinks = None if call.sinks is None else call.sinks.view(shared, group, 1)
    causal = segment.mask is None
    out = attend(folded, keys, values, call, causal=causal, mask=segment.mask, sinks=sinks)
    return out.reshape(heads, rows, -1).transpose(0, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    *,
    causal: bool,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention, [b, h, t, d] each -> [b, h, t, d].

    mask: additive. sinks: logits that broadcast to [b, h, t], take part in the softmax and add
    nothing.
    """
    if query.device.type != "cpu" or call.cap is not None or value.shape[-1] != query.shape[-1]:
        return _attend_plain(query, key, value, call, causal=causal, mask=mask, sinks=sinks)
    # The operator behind scaled_dot_product_attention, which also returns the log of each
    # softmax's sum: a sink then costs one product (6 times less than explicit matmuls).
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=call.scale
    )
    attended: Tensor = out
    if sinks is not None:
        attended = attended * torch.sigmoid(total - sinks).unsqueeze(-1).to(out.dtype)
    return attended


def _attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    *,
    causal: bool,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same in plain operations: soft caps, other devices, values wider than keys."""
    scores = (query @ key.transpose(-1, -2)).float() * call.scale  # [b, h, t, keys]
    if call.cap is not None:
        scores = torch.tanh(scores / call.cap) * call.cap
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float().expand_as(total))
    return torch.exp(scores - total.unsqueeze(-1)).to(value.dtype) @ value
