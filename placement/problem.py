"""A planning problem: the forecast in the planner's units, with the fleet's arrays at hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.dwell import Held
from placement.errors import PlacementError
from placement.forecast import Forecast
from placement.layout import Layout
from placement.plan import PlanConfig
from placement.polish import Polisher
from placement.pour import host_lists, pour
from placement.score import layer_score
from placement.search import Searcher
from placement.types import Bools, Fleet, Floats, Ints, bytes_by_group

_SMALL = 100_000  # replicas that might be: up to here every plan is polished
_MEDIUM = 600_000  # up to here with a third of the rounds
_CASES, _WORK = 30, 400_000  # scenarios at most, and replicas times scenarios on small fleets
_DEAR = 4.0  # margins: what is found by chance fits the scenarios it was found on


def polish_rounds(config: PlanConfig, cells: int) -> int:
    """Rounds of polishing for so many replicas that might be (layers x experts x groups)."""
    return config.polish if cells < _SMALL else config.polish // 3 if cells < _MEDIUM else 0


class Problem:
    """The forecast in the planner's units, with the fleet's arrays at hand."""

    def __init__(
        self, forecast: Forecast, fleet: Fleet, config: PlanConfig, staying: Bools | None
    ) -> None:
        layers, experts = forecast.load.shape
        if layers != fleet.layers:
            raise PlacementError(
                f"the load has {layers} layers, expert_bytes {fleet.layers}: make them agree"
            )
        self.fleet, self.config = fleet, config
        self.present = fleet.present(experts)
        groups = len(fleet.groups)
        self.staying = np.ones(groups, np.bool_) if staying is None else staying
        self.rate = fleet.pair_rate
        self.size = fleet.expert_bytes
        self.load = self._priced(forecast.load)
        # an idle expert counts a little, so that it goes to a group with time to spare
        floor = np.maximum(self.load.sum(1, keepdims=True), 1e-9) / max(experts, 1) * 1e-4
        self.load = np.where(self.present, np.maximum(self.load, floor), 0.0)
        self.scenarios = np.where(self.present, self._priced(forecast.scenarios), 0.0)
        self.base = fleet.alpha_s * self.rate * config.batches_per_s
        seconds = config.move_cost / fleet.bandwidth / config.horizon_s
        self.price: Floats = seconds

    def _priced(self, load: Floats) -> Floats:
        """Pairs/s plus the reads of active experts' weights, in pairs (gamma * rate each)."""
        batches = self.config.batches_per_s
        reads = float((self.fleet.gamma_s * self.rate).mean())
        if batches <= 0 or reads <= 0:
            return load
        return load + reads * batches * -np.expm1(-load / batches)

    def _nodes(self) -> Ints | None:
        """The node of each group, as a number; None when no loss is to be survived."""
        if self.fleet.survive == "none":
            return None
        names = sorted({g.node for g in self.fleet.groups})
        return np.array([names.index(g.node) for g in self.fleet.groups])

    def cases(self, most: int) -> Floats:
        """The most telling scenarios, at most `most`, float64 [L, M, E]."""
        if most == 1:
            return self.load[:, None, :]
        return np.ascontiguousarray(self.scenarios[-most:].transpose(1, 0, 2))

    def times(self, resident: Bools, cases: Floats) -> Floats:
        """J of each layer of a layout, float64 [L]."""
        hosts, copies = host_lists(resident)
        return layer_score(pour(cases, hosts, copies, self.rate, self.base).level, self.rate)

    @property
    def _cells(self) -> int:
        return self.load.size * len(self.fleet.groups)

    def case_count(self) -> int:
        """Scenarios to weigh: fewer on large fleets, where pouring them takes the time."""
        if self._cells < _SMALL:
            return int(min(_CASES, _WORK // max(self._cells, 1)))
        return 3 if self._cells < 1_500_000 else 1

    def rounds(self, cut: int) -> int:
        """Fewer search rounds on large fleets: the next delta plan goes on from there."""
        large = self._cells >= 500_000
        return -(-self.config.rounds // cut) if large else self.config.rounds

    def search(
        self,
        resident: Bools,
        cases: Floats,
        price: Floats,
        margin: float,
        limit: float,
        rounds: int,
        dwelling: Held | None = None,
        *,
        hasty: bool = False,
    ) -> Searcher:
        """What the guided search and polishing (less of it when `hasty`) make of a layout."""
        held = bytes_by_group(resident, self.size)
        room = np.where(self.staying, self.fleet.budget_bytes - held, 0)
        pool = np.inf
        if self.config.budget_bytes is not None:
            one_each = int((self.present.sum(1) * self.size).sum())
            pool = max(float(self.config.budget_bytes + one_each - held.sum()), 0.0)
        layout = Layout(
            load=cases,
            resident=resident,
            allowed=self.staying,
            room=room.astype(np.int64),
            size=self.size,
            rate=self.rate,
            base=self.base,
            price=price,
            margin=margin,
            byte_limit=limit,
            node=self._nodes(),
            pool=pool,
            held=dwelling,
        )
        searcher = Searcher(layout)
        searcher.run(rounds)
        polishing = polish_rounds(self.config, self._cells) // (3 if hasty else 1)
        if rounds and polishing:
            self._polish(searcher, layout, polishing)
        return searcher

    def _polish(self, searcher: Searcher, layout: Layout, rounds: int) -> None:
        """Small changes at random on top of what the search found; dear ones only."""
        left = replace(
            layout,
            margin=_DEAR * layout.margin,
            byte_limit=layout.byte_limit - searcher.loaded,
            pool=searcher.pool,
        )
        polisher = Polisher(left)
        polisher.run(rounds)
        searcher.score = polisher.score
        searcher.loaded += polisher.loaded
        searcher.changes += polisher.changes
