"""Small fleets for the tests."""

from __future__ import annotations

import numpy as np

from placement.types import Fleet, GroupSpec


def fleet(
    groups: int = 4,
    layers: int = 3,
    slots: int = 100,
    speeds: list[float] | None = None,
    nodes: int = 2,
    size: int = 10,
    **more: object,
) -> Fleet:
    """`slots` replicas fit in each group; groups alternate over the nodes."""
    speeds = speeds or [1.0] * groups
    specs = tuple(
        GroupSpec(id=f"g{i}", node=f"n{i % nodes}", memory_bytes=slots * size, speed=speed)
        for i, speed in enumerate(speeds)
    )
    return Fleet(groups=specs, expert_bytes=np.full(layers, size), **more)  # type: ignore[arg-type]
