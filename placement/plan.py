"""A plan, and what it may cost: plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.errors import PlacementError
from placement.repair import Owed
from placement.search import Change
from placement.types import Bools, Floats, Placement


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan may cost and must gain.

    horizon_s       for how long the plan is expected to serve
    move_cost       part of a copy's loading time that serving feels (rho), 0..1
    margin          least gain of an action over its price, as a part of the layer's time
    interval_bytes  most bytes one plan may load (delta mode); None: no limit
    budget_bytes    most bytes that replicas beyond one of each may fill; None: all memory
    switch          a full plan replaces a delta plan when its net gain is so many times better
    batches_per_s   batches of a layer a second, to price active experts; 0: unknown
    rounds          local-search rounds of a delta plan
    polish          rounds of small changes at random after it, on fleets where that is cheap
    """

    horizon_s: float = 60.0
    move_cost: float = 0.25
    margin: float = 0.002
    interval_bytes: int | None = None
    budget_bytes: int | None = None
    switch: float = 1.05
    batches_per_s: float = 0.0
    rounds: int = 12
    polish: int = 36

    def __post_init__(self) -> None:
        if not (self.horizon_s > 0 and math.isfinite(self.horizon_s)):
            raise PlacementError(f"horizon_s is {self.horizon_s}; it must be positive")
        for name in ("move_cost", "margin", "batches_per_s"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise PlacementError(f"{name} is {value}; it must be a number from 0 up")
        for name in ("interval_bytes", "budget_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise PlacementError(f"{name} is negative; give bytes, or leave it out")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A target placement and why.

    mode       "full", "delta" or "keep"
    before_s   seconds of work per second of traffic, summed over layers, with the current
               placement re-split for free (NaN when there is none); after_s with the target
    loads      bool [L, E, G], replicas to load; drops bool [L, E, G], replicas to give up
    """

    mode: str
    placement: Placement
    before_s: float
    after_s: float
    layer_before_s: Floats
    layer_after_s: Floats
    loads: Bools
    drops: Bools
    loaded_bytes: int
    changes: tuple[Change, ...]
    owed: tuple[Owed, ...]
    config: PlanConfig
