"""The shared vocabulary: groups, fleet, placement.

Letters: L layers, E experts, G groups. Experts are rectangular [L, E]; `Fleet.present` says
which of them exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.errors import PlacementError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SURVIVE = ("none", "group", "node")
DEFAULT_TOKENS_PER_S = 1e6


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """One expert group: a process with a byte budget for experts.

    `speed` is relative (1.0 = the fleet's `tokens_per_s`). One batch of one layer takes
    `alpha_s + pairs / (speed * tokens_per_s) + gamma_s * active_experts` seconds.
    """

    id: str
    node: str
    memory_bytes: int
    speed: float = 1.0
    bandwidth_bytes_per_s: float = 1e9
    kind: str = "default"
    alpha_s: float = 0.0
    gamma_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.id:
            raise PlacementError("a group has an empty id: give every group a name of its own")
        if self.memory_bytes < 0:
            raise PlacementError(f"group {self.id}: memory_bytes is negative; give its budget")
        for name in ("speed", "bandwidth_bytes_per_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise PlacementError(
                    f"group {self.id}: {name} is {value}; it must be a positive number "
                    "(leave out a group that cannot work)"
                )
        for name in ("alpha_s", "gamma_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise PlacementError(f"group {self.id}: {name} is {value}; it must be >= 0 seconds")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fleet:
    """The groups, and what they must hold.

    expert_bytes      int64 [L], resident bytes of one replica of an expert of the layer
    experts_of_layer  experts that exist in each layer; empty: all E of the load
    survive           the domain whose loss must leave every expert placeable
    reserve_bytes     kept free in every group, to serve experts from cold copies
    tokens_per_s      pairs/s that a group of speed 1 computes in one layer
    """

    groups: tuple[GroupSpec, ...]
    expert_bytes: Ints
    experts_of_layer: tuple[int, ...] = ()
    survive: str = "none"
    reserve_bytes: int = 0
    tokens_per_s: float = DEFAULT_TOKENS_PER_S

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_bytes", np.asarray(self.expert_bytes, np.int64))
        if not self.groups:
            raise PlacementError("the fleet has no groups: list at least one")
        seen: set[str] = set()
        for group in self.groups:
            if group.id in seen:
                raise PlacementError(f"two groups have the id {group.id!r}: rename one of them")
            seen.add(group.id)
        if self.expert_bytes.ndim != 1 or not len(self.expert_bytes):
            raise PlacementError("expert_bytes must list one size for each MoE layer")
        if (self.expert_bytes <= 0).any():
            raise PlacementError("expert_bytes must be positive: give one expert's resident bytes")
        if self.experts_of_layer and len(self.experts_of_layer) != self.layers:
            raise PlacementError(
                f"experts_of_layer names {len(self.experts_of_layer)} layers, expert_bytes "
                f"{self.layers}: make them agree"
            )
        if self.experts_of_layer and min(self.experts_of_layer) < 1:
            raise PlacementError(
                "experts_of_layer must name at least one expert in every layer: leave out layers "
                "that have none"
            )
        if self.survive not in SURVIVE:
            raise PlacementError(f"survive is {self.survive!r}; choose one of {', '.join(SURVIVE)}")
        if self.reserve_bytes < 0:
            raise PlacementError("reserve_bytes is negative; give the bytes to keep free, or 0")
        if not (math.isfinite(self.tokens_per_s) and self.tokens_per_s > 0):
            raise PlacementError(f"tokens_per_s is {self.tokens_per_s}; it must be positive")

    @property
    def layers(self) -> int:
        return len(self.expert_bytes)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(group.id for group in self.groups)

    @cached_property
    def pair_rate(self) -> Floats:
        """Pairs/s of one layer for each group, float64 [G]."""
        return np.array([g.speed for g in self.groups]) * self.tokens_per_s

    @cached_property
    def alpha_s(self) -> Floats:
        return np.array([g.alpha_s for g in self.groups], np.float64)

    @cached_property
    def gamma_s(self) -> Floats:
        return np.array([g.gamma_s for g in self.groups], np.float64)

    @cached_property
    def bandwidth(self) -> Floats:
        """Bytes/s at which each group can load experts, float64 [G]."""
        return np.array([g.bandwidth_bytes_per_s for g in self.groups], np.float64)

    @cached_property
    def budget_bytes(self) -> Ints:
        """What planned replicas may fill of each group: its memory less the reserve, [G]."""
        memory = np.array([g.memory_bytes for g in self.groups], np.int64)
        return np.maximum(memory - self.reserve_bytes, 0)

    def present(self, experts: int | None = None) -> Bools:
        """Which experts exist, bool [L, E]; `experts` (E) is needed when no layer says its own."""
        if self.experts_of_layer:
            e = experts or max(self.experts_of_layer)
            if e < max(self.experts_of_layer):
                raise PlacementError(
                    f"the load knows {e} experts, the fleet has {max(self.experts_of_layer)} in a "
                    "layer: give counts of the same model"
                )
            counts = np.array(self.experts_of_layer)
            return np.arange(e)[None, :] < counts[:, None]
        if experts is None:
            raise PlacementError("give the load, or experts_of_layer: how many experts are there?")
        return np.ones((self.layers, experts), np.bool_)


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Where replicas live and how an expert's tokens divide over them.

    resident  bool [L, E, G]
    share     float64 [L, E, G], sums to 1 over the groups of a placed expert, 0 off residents
    """

    resident: Bools
    share: Floats

    def copies(self) -> Ints:
        """Replicas of each expert, int64 [L, E]."""
        copies: Ints = self.resident.sum(2, dtype=np.int64)
        return copies

    def bytes_of_group(self, expert_bytes: Ints) -> Ints:
        """Bytes each group holds, int64 [G]."""
        return bytes_by_group(self.resident, expert_bytes)


def bytes_by_group(resident: Bools, expert_bytes: Ints) -> Ints:
    """Bytes that replicas [L, E, G] fill in each group, int64 [G]."""
    held: Ints = (resident.sum(1, dtype=np.int64) * expert_bytes[:, None]).sum(0)
    return held


def check_load(load: npt.ArrayLike, layers: int | None = None) -> Floats:
    """`load` as float64 [..., L, E], or a PlacementError: NaN, negative or the wrong shape."""
    try:
        array = np.asarray(load, np.float64)
    except (TypeError, ValueError) as error:
        raise PlacementError(f"the load is not an array of numbers: {error}") from None
    if array.ndim < 2:
        raise PlacementError(f"the load has shape {array.shape}; it must be [layers, experts]")
    if layers is not None and array.shape[-2] != layers:
        raise PlacementError(
            f"the load has {array.shape[-2]} layers, expert_bytes {layers}: give one size for "
            "each layer of the load"
        )
    if not np.isfinite(array).all():
        raise PlacementError("the load holds NaN or infinity: drop those windows and try again")
    if (array < 0).any():
        raise PlacementError("the load holds negative counts: tokens are counted from 0 up")
    return array
