"""The paged KV cache: one pool of blocks per attention layer, and the buffers to read it.

Letters: N packed tokens of a step, H_kv key/value heads, D_k and D_v their widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


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
        without it MLA decodes 6 times slower (benchmarks/engine.py, 32 rows of 160 tokens)."""
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


class LayerKV:
    """Keys and values of one layer, `blocks` blocks of `block_tokens` tokens."""

    def __init__(
        self,
        shape: KVShape,
        blocks: int,
        block_tokens: int,
        workspace: Workspace,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self._block_tokens = block_tokens
        self._workspace = workspace
        rows = blocks * block_tokens
        self._key_rows = _zeros(rows, shape.heads * shape.key_dim, shape.dtype, device)
        self._value_rows = _zeros(rows, shape.heads * shape.stored_value_dim, shape.dtype, device)
        self._key_blocks = self._key_rows.view(blocks, -1)
        self._value_blocks = self._value_rows.view(blocks, -1)
        self._pad = shape.stored_value_dim - shape.value_dim

    def padded(self, value: Tensor) -> Tensor:
        """[..., D_v] -> [..., stored_value_dim]."""
        return nn.functional.pad(value, (0, self._pad)) if self._pad else value

    def write(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Store N tokens at pool rows int64 [N]; key [N, H_kv, D_k], value [N, H_kv, stored]."""
        self._key_rows.index_copy_(0, rows, key.reshape(len(rows), -1))
        self._value_rows.index_copy_(0, rows, value.reshape(len(rows), -1))

    def gather(self, table: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """Blocks int64 [sequences * n] -> keys, values [sequences, n * block_tokens, H_kv, D].

        The result lies in the workspace: use it before the next gather of any layer.
        """
        return (
            self._gather("key", self._key_blocks, table, sequences),
            self._gather("value", self._value_blocks, table, sequences),
        )

    def _gather(self, name: str, pool: Tensor, table: Tensor, sequences: int) -> Tensor:
        flat = self._workspace.take(name, len(table) * pool.shape[1], pool.dtype)
        out = flat.view(len(table), pool.shape[1])
        torch.index_select(pool, 0, table, out=out)
        return out.view(sequences, -1, self.shape.heads, pool.shape[1] // self._per_head)

    @property
    def _per_head(self) -> int:
        return self.shape.heads * self._block_tokens

    def zero(self, blocks: Tensor) -> None:
        self._key_blocks.index_fill_(0, blocks, 0)
        self._value_blocks.index_fill_(0, blocks, 0)


class KVCache:
    """All layers' pools, keyed by the attention module that owns them."""

    def __init__(
        self,
        shapes: Mapping[nn.Module, KVShape],
        blocks: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.device = device
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
            layer.zero(index)


def token_bytes(shapes: Mapping[nn.Module, KVShape]) -> int:
    """Bytes of one token over all layers."""
    return sum(shape.token_bytes for shape in shapes.values())


def _zeros(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # numpy's zeros are untouched pages: a large budget costs no memory until it is used.
        raw = np.zeros(rows * width * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype).view(rows, width)
    return torch.zeros(rows, width, dtype=dtype, device=device)
