"""The grouped kernel: all experts of a message in one launch a product, for CUDA devices.

Written in Triton (grouped_triton.py), which torch's CUDA builds bring along. Each expert's weights
are read once a tile of up to `BM` of its tokens, from wherever its replica lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import LayerSpec
from raymoe.experts.plain import PlainKernel, Replica

ALIGNED = 16  # numbers: what 16-byte loads of weight rows need, and the products' least width


class Tiles(NamedTuple):
    """Shape of one program's work: rows, columns, depth of a step; warps; loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The fastest, or near it, of those that `python -m benchmarks.gpu --tiles` tries, on an H200:
FEW = Tiles(16, 64, 128, 4, 4)
"""Few tokens an expert and few experts: narrow, so that there is work for the whole device."""
WIDE = Tiles(16, 128, 64, 4, 3)
"""Few tokens an expert, many experts."""
MANY = Tiles(64, 128, 32, 4, 4)
EXACT = Tiles(16, 32, 32, 4, 2)
"""float32: products without tensor cores."""
ENOUGH = 264
"""Programs: two on each multiprocessor of an H100 or H200."""


def tiles_for(pairs: int, experts: int, inner: int, dtype: torch.dtype) -> Tiles:
    """What a message of so many pairs over so many active experts of F `inner` is cut into."""
    if dtype is torch.float32:
        return EXACT
    if pairs > 32 * experts:
        return MANY
    return WIDE if experts * inner >= ENOUGH * WIDE.columns else FEW


@lru_cache(maxsize=1)
def device_functions() -> Any | None:
    """The Triton functions, or None where there is no Triton."""
    try:
        from raymoe.experts import grouped_triton
    except ImportError:
        return None
    return grouped_triton


def fits(layer: LayerSpec) -> bool:
    """Whether the layer's rows are aligned, and there is Triton to run it."""
    hidden = layer.sources[0].shape[0]
    return not (hidden % ALIGNED or layer.inner % ALIGNED) and device_functions() is not None


class DeviceReplica(dict[str, Tensor]):
    """The plain kernel's tensors of a replica, and where they lie: asking costs 50 us for 64."""

    def __init__(self, tensors: Replica) -> None:
        super().__init__(tensors)
        self.addresses = tuple(
            tensors[name].data_ptr() if name in tensors else 0
            for name in ("up", "down", "up_bias", "down_bias")
        )


class GroupedKernel(PlainKernel):
    """Only for layers that `fits` accepts."""

    def __init__(
        self, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, tiles: Tiles | None = None
    ) -> None:
        """`tiles`: always these (benchmarks)."""
        super().__init__(device, dtype)
        functions = device_functions()
        assert functions is not None
        self._functions: Any = functions
        self._tiles = tiles

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> DeviceReplica:
        return DeviceReplica(super().prepare(layer, record))

    def run(
        self,
        layer: LayerSpec,
        replicas: Sequence[Any],
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        pairs = len(token_of_pair)
        _, _, inner, result = self._scratches.of(layer, x.shape[1]).head(pairs)
        if not pairs:
            return result
        tiles = self._tiles or tiles_for(pairs, len(replicas), layer.inner, self._dtype)
        words, at, count = words_of(replicas, counts, tiles.rows)
        # From pageable memory: the copy has left it when the call returns.
        there = torch.from_numpy(words).to(x.device, non_blocking=True)
        self.launch(layer, tiles, there, at, count, x.contiguous(), token_of_pair, inner, result)
        return result

    def launch(
        self,
        layer: LayerSpec,
        tiles: Tiles,
        words: Tensor,
        at: int,
        count: int,
        x: Tensor,
        token_of_pair: Tensor,
        inner: Tensor,
        result: Tensor,
    ) -> None:
        """Both products; `words` (see `words_of`) and everything else lie on the device."""
        maths, hidden = layer.maths, x.shape[1]
        shape: dict[str, Any] = {
            "BM": tiles.rows,
            "BN": tiles.columns,
            "BK": tiles.depth,
            "BIAS": maths.bias,
            "PRECISION": "ieee",  # of float32; others have one only
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }
        self._functions.up_and_join[count, -(-layer.inner // tiles.columns)](
            inner, x, token_of_pair, words, at, hidden, layer.inner,
            GATED=maths.gated, ACTIVATION=_NAMES.get(maths.activation, maths.activation),
            ALPHA=maths.alpha, LIMIT=-1.0 if maths.limit is None else maths.limit,
            LIMIT_AFTER=maths.limit_after, UP_SHIFT=maths.up_shift, **shape,
        )  # fmt: skip
        self._functions.down[count, -(-hidden // tiles.columns)](
            result, inner, words, at, hidden, layer.inner, **shape
        )


_NAMES = {"gelu_new": "gelu_tanh"}
"""Two names of one function."""


def words_of(
    replicas: Sequence[DeviceReplica], counts: Sequence[int], rows: int
) -> tuple[np.ndarray, int, int]:
    """What the device functions read, int64: addresses [A, 4], then tiles [M, 3]; where those
    begin, and M."""
    head = np.array([each.addresses for each in replicas], np.int64).reshape(-1)
    table = tile_table(counts, rows)
    return np.concatenate([head, table.reshape(-1)]), len(head), len(table)


def tile_table(counts: Sequence[int], rows: int) -> np.ndarray:
    """Runs of pairs cut into tiles of at most `rows`: int64 [M, 3] (run, first pair, pairs)."""
    runs = np.asarray(counts, np.int64)
    tiles = -(-runs // rows)  # of each run
    run = np.repeat(np.arange(len(runs)), tiles)
    within = (np.arange(len(run)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * rows
    first = (np.cumsum(runs) - runs)[run] + within
    return np.stack([run, first, np.minimum(runs[run] - within, rows)], axis=1)
