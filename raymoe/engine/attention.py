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

from raymoe.engine.batch import StepBatch
from raymoe.engine.kv import KVCache, LayerKV
from raymoe.engine.ready import ShelfRows, attend_turned
from raymoe.engine.softmax import attend
from raymoe.engine.tables import EVERYTHING, Reach, Segment
from raymoe.native import Native

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
        self,
        cache: KVCache,
        batch: StepBatch,
        chunks: dict[nn.Module, int | None],
        native: Native | None = None,
    ) -> None:
        """`native`: the C functions, when decode rows are to be attended by them."""
        self._cache = cache
        self._batch = batch
        self._chunks = chunks
        self._native = native

    def attend(self, module: nn.Module, call: AttentionCall) -> Tensor:
        batch, layer = self._batch, self._cache.layers[module]
        heads = layer.shape.heads
        reach = Reach(call.window, self._chunks[module])
        parts = []
        if self._native is not None and batch.decode_rows:
            parts.append(self._compiled(self._native, layer, reach, call))
            if batch.decode_rows == batch.tokens:
                return parts[0]
        value = layer.padded(call.value)
        new_keys, new_values = call.key[0].transpose(0, 1), value[0].transpose(0, 1)  # [N, H_kv, D]
        rows, done = batch.pool_rows(heads), 0 if self._native is None else batch.decode_rows
        layer.keys.write(rows[done * heads :], new_keys[done:])
        layer.values.write(rows[done * heads :], new_values[done:])
        if self._native is None:
            parts += self._decode_rows(layer, reach, call, new_keys, new_values)
        for segment in batch.segments(reach, heads):
            parts.append(_prefill(layer, segment, call, value))
        width = layer.shape.value_dim
        parts = [part[..., :width] for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compiled(
        self, native: Native, layer: LayerKV, reach: Reach, call: AttentionCall
    ) -> Tensor:
        """Write and attend the decode rows in C -> [B, H, D_v]."""
        shape, rows = layer.shape, self._batch.decode_rows
        plan = self._batch.decode_plan(reach)
        query, key, value = map(_dense_rows, (call.query, call.key, call.value))
        sinks = None if call.sinks is None else _dense_rows(call.sinks)
        heads = query.shape[1]
        out = torch.empty(rows, heads, shape.value_dim)
        native.decode(
            plan.plan, rows, heads, shape.heads, self._cache.block_tokens, shape.key_dim,
            shape.value_dim, shape.stored_value_dim,
            query.data_ptr(), query.stride(2), query.stride(1),
            key.data_ptr(), key.stride(2), key.stride(1),
            value.data_ptr(), value.stride(2), value.stride(1),
            layer.keys.address, layer.values.address, out.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            call.scale, call.cap or 0.0, plan.scratch,
        )  # fmt: skip
        return out

    def _decode_rows(
        self, layer: LayerKV, reach: Reach, call: AttentionCall, keys: Tensor, values: Tensor
    ) -> list[Tensor]:
        """Attend the decode rows, with new [N, H_kv, D] written -> [rows, H, D] parts."""
        batch, parts = self._batch, []
        query = call.query[0].transpose(0, 1)  # [N, H, D_k]
        if reach == EVERYTHING:
            for shelf in batch.shelf_rows(layer.shape.heads, layer.shape.key_dim):
                span = slice(shelf.first, shelf.last)
                parts.append(_laned(layer, shelf, query[span], keys[span], values[span], call))
        for bucket in batch.buckets(reach, layer.shape):
            count, seen = bucket.last - bucket.first, slice(bucket.start, bucket.stop)
            stored = layer.keys.gather(bucket.table, count)[:, :, seen]
            mixed = layer.values.gather(bucket.table, count)[:, :, seen]
            rows = query[bucket.first : bucket.last]
            parts.append(_decode(rows, stored, mixed, bucket.mask, call))
        return parts


def _dense_rows(numbers: Tensor) -> Tensor:
    """The same with its last dimension's numbers side by side, in float32."""
    if numbers.dtype is not torch.float32:
        numbers = numbers.float()
    return numbers if numbers.stride(-1) == 1 else numbers.contiguous()


def _laned(
    layer: LayerKV, shelf: ShelfRows, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall
) -> Tensor:
    """Queries [B, H, D_k] over lanes, with new [B, H_kv, D] written -> [B, H, D]."""
    for lane, table, tokens in shelf.fills:
        layer.ready_keys.fill(shelf.shelf, lane, layer.keys.gather(table, 1)[0, :, :tokens])
        layer.ready_values.fill(shelf.shelf, lane, layer.values.gather(table, 1)[0, :, :tokens])
    keys = layer.ready_keys.write(shelf, key)
    values = layer.ready_values.write(shelf, value)
    if layer.ready_keys.turned:
        return attend_turned(
            query, keys, values, shelf, scale=call.scale, cap=call.cap, sinks=call.sinks
        )
    seen = slice(shelf.keys)
    return _decode(query, keys[:, :, seen], values[:, :, seen], shelf.mask, call)


def _decode(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    """Queries [B, H, D_k], one a sequence, over [B, H_kv, keys, D] -> [B, H, D]."""
    rows, heads, width = query.shape
    shared = keys.shape[1]
    # The g query heads of a key head stand as g queries of it: no copy of keys or values.
    folded = query.reshape(rows, shared, heads // shared, width)
    sinks = None if call.sinks is None else call.sinks.view(1, shared, -1)
    out = attend(
        folded, keys, values, scale=call.scale, causal=False, mask=mask, sinks=sinks, cap=call.cap
    )
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
        keys = layer.keys.gather(segment.table, 1)[0, :, : segment.stop]
        values = layer.values.gather(segment.table, 1)[0, :, : segment.stop]
    group = heads // shared
    folded = query.reshape(shared, group, rows, width)
    # A stride of 0 over the g heads: the kernel reads strides, nothing is copied.
    keys = keys.unsqueeze(1).expand(-1, group, -1, -1)
    values = values.unsqueeze(1).expand(-1, group, -1, -1)
    sinks = None if call.sinks is None else call.sinks.view(shared, group, 1)
    out = attend(
        folded, keys, values, scale=call.scale, causal=segment.mask is None, mask=segment.mask,
        sinks=sinks, cap=call.cap,
    )  # fmt: skip
    return out.reshape(heads, rows, -1).transpose(0, 1)
