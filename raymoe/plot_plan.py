"""A picture of a plan: load per group before and after, replicas per layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import PlacementError
from placement.plan import Plan
from placement.types import Fleet, Placement


def draw(
    path: str,
    plan: Plan,
    current: Placement | None,
    load: npt.NDArray[np.float64],
    fleet: Fleet,
) -> None:
    """Write a PNG to `path`. load float64 [L, E] pairs/s. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise PlacementError("--plot needs matplotlib: pip install 'raymoe[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(10, 8))
    try:
        _groups(axes[0], plan, current, load, fleet)
        _layers(axes[1], plan, current)
        figure.tight_layout()
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _groups(
    axis: Any,
    plan: Plan,
    current: Placement | None,
    load: npt.NDArray[np.float64],
    fleet: Fleet,
) -> None:
    at = np.arange(len(fleet.groups))
    after = np.einsum("leg,le->g", plan.placement.share, load) / fleet.pair_rate
    if current is not None:
        before = np.einsum("leg,le->g", current.share, load) / fleet.pair_rate
        axis.bar(at - 0.2, before, 0.4, label="before", color="#bbbbbb")
        axis.bar(at + 0.2, after, 0.4, label="after", color="#2a6fb0")
    else:
        axis.bar(at, after, 0.6, label="planned", color="#2a6fb0")
    axis.axhline(float(load.sum() / fleet.pair_rate.sum()), color="black", lw=0.8, label="level")
    axis.set_ylabel("busy seconds per second")
    axis.set_title("Load of each group, by its speed")
    if len(at) <= 64:
        axis.set_xticks(at, fleet.ids, rotation=90 if len(at) > 12 else 0)
    axis.legend()


def _layers(axis: Any, plan: Plan, current: Placement | None) -> None:
    after = plan.placement.resident.sum((1, 2))
    at = np.arange(len(after))
    if current is not None:
        axis.step(at, current.resident.sum((1, 2)), where="mid", color="#999999", label="before")
    axis.bar(at, after, 0.7, color="#2a6fb0", label="after")
    axis.set_xlabel("MoE layer")
    axis.set_ylabel("replicas")
    axis.set_title("Replicas of each layer")
    axis.legend()
