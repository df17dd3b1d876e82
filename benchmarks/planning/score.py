"""The referee: fleets of the comparison, constraint checks, scores. No planner's code in here but
the router's own per-batch split, which all planners get alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.planning.traces import Trace
from placement.split import LayerSplit
from placement.types import Fleet, GroupSpec

PAIRS_PER_S = 1e6  # of a group of speed 1; sets what a second of loading is worth
BANDWIDTH = 10e9
STEPS = 100  # between two replans


def make_fleet(trace: Trace, kind: str, extra: float = 1.0) -> tuple[Fleet, int]:
    """(fleet, slots a layer and group that EPLB may use); extra slots a layer beyond E / G."""
    layers, experts = trace.windows.shape[1:]
    groups = trace.groups
    speed, weight = np.ones(groups), np.ones(groups)
    if kind == "mixed":
        speed[groups // 2 : groups * 3 // 4], speed[groups * 3 // 4 :] = 0.5, 0.25
    elif kind == "ladder":
        speed = np.linspace(1.0, 0.3, groups)
    elif kind == "10:1":
        speed[groups // 2 :] = 0.1
    elif kind == "straggler":
        speed[-1] = 0.7
    elif kind == "memory 2:1":
        weight[: groups // 2] = 2
    slots = experts / groups + extra + (1.0 if kind == "one lost" else 0.0)
    memory = [int(slots * layers * w) * trace.expert_bytes for w in weight]
    specs = tuple(
        GroupSpec(
            id=f"g{g}",
            node=f"n{g // 4}",
            memory_bytes=memory[g],
            speed=float(speed[g]),
            bandwidth_bytes_per_s=BANDWIDTH,
        )
        for g in range(groups)
    )
    fleet = Fleet(
        groups=specs,
        expert_bytes=np.full(layers, trace.expert_bytes),
        tokens_per_s=PAIRS_PER_S,
    )
    return fleet, int(slots)


def verify(resident: np.ndarray, share: np.ndarray, fleet: Fleet) -> None:
    """Every constraint, or an AssertionError that makes the run invalid."""
    assert resident.any(2).all(), "an expert has no replica"
    assert (share >= -1e-12).all() and not share[~resident].any(), "tokens off the residents"
    assert np.allclose(share.sum(2), 1), "shares do not sum to 1"
    held = np.einsum("leg,l->g", resident.astype(np.int64), fleet.expert_bytes)
    assert (held <= [g.memory_bytes for g in fleet.groups]).all(), "over a group's memory"


def by_share(share: np.ndarray, window: np.ndarray, speed: np.ndarray) -> float:
    """Sum over layers of the slowest group's tokens / speed, fixed shares."""
    return float((np.einsum("leg,le->lg", share, window) / speed).max(1).sum())


def by_split(resident: np.ndarray, window: np.ndarray, speed: np.ndarray) -> float:
    """The same with the window split as one batch, whole tokens."""
    zero = np.zeros(len(speed))
    total = 0.0
    for layer, counts in enumerate(window):
        cut = LayerSplit(resident[layer], speed, zero, zero).split(counts.astype(np.int64))
        total += float((cut.sum(0) / speed).max())
    return total


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds at speed 1: a call, a pair, an active expert. A slow group is slow in all three."""

    alpha_s: float
    pair_s: float
    gamma_s: float


def batch_splits(resident: np.ndarray, speed: np.ndarray, costs: Costs) -> list[LayerSplit]:
    """The router's split of each layer, made once for all batches of a plan."""
    alpha, gamma = costs.alpha_s / speed, costs.gamma_s / speed
    return [LayerSplit(layer, speed / costs.pair_s, alpha, gamma) for layer in resident]


def batch_time(
    splits: list[LayerSplit],
    window: np.ndarray,
    speed: np.ndarray,
    costs: Costs,
    pairs: int,
    rng: np.random.Generator,
) -> float:
    """Seconds of one batch of `pairs` pairs a layer, drawn from the window; summed over layers."""
    alpha, gamma = costs.alpha_s / speed, costs.gamma_s / speed
    rate = speed / costs.pair_s
    total = 0.0
    for layer, weight in zip(splits, window, strict=True):
        cut = layer.split(rng.multinomial(pairs, weight / weight.sum()))
        total += float((alpha + cut.sum(0) / rate + gamma * (cut > 0).sum(0)).max())
    return total


@dataclass(kw_only=True)
class Tally:
    """One planner on one trace and fleet."""

    name: str
    busy: list[float] = field(default_factory=list)
    ideal: list[float] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)  # seconds of loading of the slowest group
    step_s: list[float] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    times: dict[int, list[float]] = field(default_factory=dict)
    before: np.ndarray | None = None

    def add(
        self,
        resident: np.ndarray,
        fleet: Fleet,
        busy: float,
        ideal: float,
        moved: bool = True,
    ) -> None:
        """busy and ideal in tokens / speed. The first plan's moves are nobody's cost."""
        self.busy.append(busy)
        self.ideal.append(ideal)
        self.extra.append(int(resident.sum() - resident.any(2).sum()))
        fresh = np.zeros_like(resident)
        if self.before is not None and self.before.shape == resident.shape and moved:
            fresh = resident & ~self.before
            self.moves.append(int(fresh.sum()))
        self.before = resident.copy()
        size = np.einsum("leg,l->g", fresh.astype(np.int64), fleet.expert_bytes)
        self.load_s.append(float(size.max()) / BANDWIDTH)
        self.step_s.append(busy / PAIRS_PER_S)

    @property
    def balance(self) -> float:
        return sum(self.ideal) / sum(self.busy)

    @property
    def net(self) -> float:
        """Balance with the loading of a replan charged to the STEPS it serves."""
        ideal = sum(self.ideal) / PAIRS_PER_S
        return ideal / (sum(self.step_s) + sum(self.load_s) / STEPS)

    @property
    def moved(self) -> float:
        return float(np.mean(self.moves)) if self.moves else 0.0


Planner = Callable[[int], tuple[np.ndarray, np.ndarray]]
