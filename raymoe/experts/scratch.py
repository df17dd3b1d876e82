"""Buffers kept between messages, and views of them kept too.

At a few tokens an expert, making a view costs about a tenth of the product it is made for; decoding
asks for the same few runs over and over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raymoe.checkpoint.spec import LayerSpec

Views = tuple[Tensor, ...]
MOST_VIEWS = 8192
"""Runs remembered before all are forgotten; a view is about 200 bytes."""


class Scratch:
    """Row-major buffers [P, width], one for each of `widths`, that only grow.

    `cut(buffers, start, count)` makes the views of one run of pairs; its results are remembered.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
        cut: Callable[[Views, int, int], Views],
    ) -> None:
        self._widths = widths
        self._dtype = dtype
        self._device = device
        self._cut = cut
        self._capacity = -1  # so that even a message without pairs gets its buffers
        self._whole: Views = ()
        self._runs: dict[tuple[int, int], Views] = {}
        self._heads: dict[int, Views] = {}

    def head(self, pairs: int) -> Views:
        """The first `pairs` rows of every buffer."""
        if pairs > self._capacity:
            self._grow(pairs)
        found = self._heads.get(pairs)
        if found is None:
            found = self._heads[pairs] = tuple(buffer[:pairs] for buffer in self._whole)
        return found

    def runs(self, counts: list[int]) -> list[Views]:
        """The views of consecutive runs; `head` has been called for their sum."""
        if len(self._runs) > MOST_VIEWS:
            self._runs.clear()
        known, made, start = self._runs, [], 0
        for count in counts:
            run = known.get((start, count))
            if run is None:
                run = known[start, count] = self._cut(self._whole, start, count)
            made.append(run)
            start += count
        return made

    def _grow(self, pairs: int) -> None:
        self._capacity = max(64, 1 << max(0, pairs - 1).bit_length())
        self._whole = tuple(
            torch.empty(self._capacity, width, dtype=self._dtype, device=self._device)
            for width in self._widths
        )
        self._runs.clear()
        self._heads.clear()


class Scratches:
    """A scratch for each shape of expert that a kernel has met."""

    def __init__(self, make: Callable[[LayerSpec, int], Scratch]) -> None:
        """`make(layer, hidden)`"""
        self._make = make
        self._known: dict[tuple[int, int, bool], Scratch] = {}

    def of(self, layer: LayerSpec, hidden: int) -> Scratch:
        shape = hidden, layer.inner, layer.maths.gated
        found = self._known.get(shape)
        if found is None:
            found = self._known[shape] = self._make(layer, hidden)
        return found
