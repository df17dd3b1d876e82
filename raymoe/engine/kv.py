"""The paged KV cache: per attention layer a pool of blocks, and lanes of decoding sequences.

Letters: N packed tokens of a step, H_kv key/value heads, D_k and D_v their widths. All memory is
head by head, [.., H_kv, tokens, D]: attention reads it twice as fast as token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raymoe.engine.lanes import Shelf
from raymoe.engine.ready import ReadyLanes
from raymoe.native import Native, native


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What one attention layer stores of a token; seen by the probe, not read from a config."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def stored_value_dim(self) -> int:
        """Values are padded to the keys' width: torch's fast CPU attention wants both equal, and
        without it MLA decodes 6 times slower (32 rows of 160 tokens)."""
        return max(self.key_dim, self.value_dim)

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.key_dim + self.stored_value_dim) * self.dtype.itemsize


class Workspace:
    """Buffers that gathered keys and values are copied into, shared by all layers of an engine."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, numbers: int, dtype: torch.dtype) -> Tensor:
        """A flat view of `numbers` numbers; valid until the same name is taken again."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numbers:
            room = 1 << (numbers - 1).bit_length()
            buffer = torch.empty(room, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:numbers]


class Side:
    """The keys, or the values, of one layer's pool."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        workspace: Workspace,
        device: torch.device,
    ) -> None:
        """shape: blocks, heads, tokens of a block, width."""
        blocks, self._heads, tokens, self._width = shape
        self._name = name
        self._workspace = workspace
        pool = _zeros(blocks * self._heads * tokens, self._width, dtype, device)
        self.blocks = pool.view(blocks, -1)
        self.address = pool.data_ptr()
        self._rows = pool
        self._pairs = pool.view(blocks * self._heads, -1)  # (block, head) pairs

    def write(self, rows: Tensor, new: Tensor) -> None:
        """Store new [N, H_kv, D] at pool rows int64 [N * H_kv]."""
        self._rows.index_copy_(0, rows, new.reshape(-1, self._width))

    def gather(self, table: Tensor, sequences: int) -> Tensor:
        """(block, head) pairs int64 [sequences * H_kv * n] -> [sequences, H_kv, n * tokens, D].

        The result lies in the workspace: use it before the next gather of any layer.
        """
        size = self._pairs.shape[1]
        out = self._workspace.take(self._name, len(table) * size, self._pairs.dtype)
        torch.index_select(self._pairs, 0, table, out=out.view(-1, size))
        return out.view(sequences, self._heads, -1, self._width)


class LayerKV:
    """Keys and values of one layer."""

    def __init__(
        self,
        shape: KVShape,
        blocks: int,
        block_tokens: int,
        workspace: Workspace,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self._pad = shape.stored_value_dim - shape.value_dim
        sizes = (blocks, shape.heads, block_tokens)
        self.keys = Side("key", (*sizes, shape.key_dim), shape.dtype, workspace, device)
        self.values = Side(
            "value", (*sizes, shape.stored_value_dim), shape.dtype, workspace, device
        )
        turned = device.type == "cpu" and shape.dtype == torch.float32
        self.ready_keys = ReadyLanes(shape.heads, shape.key_dim, shape.dtype, device, turned=turned)
        self.ready_values = ReadyLanes(
            shape.heads, shape.stored_value_dim, shape.dtype, device, turned=False
        )

    def padded(self, value: Tensor) -> Tensor:
        """[..., D_v] -> [..., stored_value_dim]."""
        return nn.functional.pad(value, (0, self._pad)) if self._pad else value


class KVCache:
    """All layers' pools and lanes, keyed by the attention module that owns them."""

    def __init__(
        self,
        shapes: Mapping[nn.Module, KVShape],
        blocks: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.block_tokens = block_tokens
        self._capacities: set[int] = set()
        workspace = Workspace(device)
        self.layers = {
            module: LayerKV(shape, blocks, block_tokens, workspace, device)
            for module, shape in shapes.items()
        }

    def zero(self, blocks: Sequence[int]) -> None:
        """Clear blocks before their next owner reads them.

        Masked rows have weight 0, but 0 x NaN is NaN: without this, one request's overflow would
        reach the next owner of its blocks.
        """
        index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
        for layer in self.layers.values():
            layer.keys.blocks.index_fill_(0, index, 0)
            layer.values.blocks.index_fill_(0, index, 0)

    def keep_lanes(self, shelves: Sequence[Shelf]) -> None:
        """Free the memory of shelves that are gone."""
        capacities = {shelf.capacity for shelf in shelves}
        if not self._capacities <= capacities:
            for layer in self.layers.values():
                layer.ready_keys.keep(capacities)
                layer.ready_values.keep(capacities)
        self._capacities = capacities


def compiled_for(shapes: Mapping[nn.Module, KVShape], device: torch.device) -> Native | None:
    """The C functions, where there are any and they fit what these layers store."""
    fit = device.type == "cpu" and all(one.dtype == torch.float32 for one in shapes.values())
    return native() if fit else None


def token_bytes(shapes: Mapping[nn.Module, KVShape]) -> int:
    """Bytes of one token over all layers."""
    return sum(shape.token_bytes for shape in shapes.values())


def _zeros(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # numpy's zeros are untouched pages: a large budget costs no memory until it is used.
        raw = np.zeros(rows * width * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype).view(rows, width)
    return torch.zeros(rows, width, dtype=dtype, device=device)
