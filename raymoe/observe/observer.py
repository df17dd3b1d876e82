"""The controller's memory of what it has seen: events, a short history, totals that only grow.

Pure: it is told what there is once an interval, and asked by gateways when somebody looks.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from placement.table import Table
from placement.types import Floats
from raymoe.observe.catalogue import CATALOGUE, Labels
from raymoe.observe.events import (
    EventLog,
    Said,
    Status,
    Why,
    changes,
    is_detail,
    of_status,
    of_tables,
)

Values = Mapping[str, Mapping[Labels, Any]]
History = Mapping[str, Any]  # {"plans": newest first, "events": newest first}
_FIRST_TOKEN = "raymoe_time_to_first_token_seconds"
_NEXT_TOKEN = "raymoe_inter_token_latency_seconds"
_TOKENS = "raymoe_generation_tokens_total"


class Observer:
    """`look` once an interval; `view` for the page, `shown` for /metrics."""

    def __init__(self, *, every_s: float = 1.0, sample_s: float = 2.0, most: int = 180) -> None:
        self.events = EventLog()
        self.history: deque[dict[str, Any]] = deque(maxlen=most)  # one each `sample_s`
        self._every_s, self._sample_s = every_s, sample_s
        self._looked_s = self._sampled_s = -float("inf")
        self._status: Status | None = None
        self._table: Table | None = None
        self._load: Floats | None = None
        self._why: Why | None = None
        self._values: Values = {}
        self._told_at = 0.0  # of the reconciler's last event taken over
        self._plans: Counter[str] = Counter()
        self._plan_at = 0.0
        self._last_plan: Mapping[str, Any] = {}
        self._realised: float | None = None
        self._joined: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._answers = _Growing()
        self._latency_s = _Growing()

    def due(self, now: float) -> bool:
        """Whether `look` has anything to do; `now` is monotonic seconds."""
        return now - self._looked_s >= self._every_s

    def look(
        self,
        status: Status,
        table: Table | None,
        load: Floats,
        history: History,
        why: Why,
        values: Values,
        *,
        now: float,
        at: float,
    ) -> None:
        """What there is now. load: float64 [L, E] pairs/s; values: the gateways' as one; now:
        monotonic seconds; at: Unix seconds."""
        self._looked_s = now
        said: list[Said] = []
        if self._status is not None:
            said += of_status(self._status, status)
        if table is not None and (self._table is None or table.order != self._table.order):
            joined, left = changes(self._table, table)
            self._joined.update(joined)
            self._left.update(left)
            if self._table is not None:
                said += of_tables(self._table, table, why)
        for kind, text in said:
            self.events.add(kind, text, at)
        self._take_history(history)
        for router in status["routers"]:
            profile = router["profile"]
            self._answers.take(router["id"], profile.get("answers", {}))
            self._latency_s.take(router["id"], profile.get("latency_s", {}))
        self._status, self._table, self._load, self._why = status, table, load, why
        if now - self._sampled_s >= self._sample_s:
            self._sample(values, now, at)

    def view(
        self, since_seq: int, since_at: float, layers: Sequence[int], why: bool = False
    ) -> dict[str, Any]:
        """What the page shows and has not seen yet (JSON-safe). With `why`: since when replicas
        of these layers are where they are, and why."""
        return {
            "seq": self.events.seq,
            "events": self.events.since(since_seq),
            "history": [sample for sample in self.history if sample["at"] > since_at],
            "layer_balancedness": self.layer_balancedness(),
            "group_load": self.group_load(),
            "latency_s": self._mean_latency_s(),
            "plans": sum(self._plans.values()),
            "last_plan": {k: v for k, v in self._last_plan.items() if k != "reasons"},
            "layers": {str(layer): self._layer(layer, why) for layer in layers},
            "layer_count": 0 if self._table is None else len(self._table.resident),
        }

    def shown(self, *, experts: bool) -> dict[str, dict[Labels, float]]:
        """Metrics that are only known from having looked, by name in the catalogue."""
        plan = self._last_plan
        values: dict[str, dict[Labels, float]] = {
            "layer_balancedness": {
                (str(layer),): value for layer, value in self.layer_balancedness().items()
            },
            "group_load": {(group,): load for group, load in self.group_load().items()},
            "group_messages_total": {(g,): n for g, n in self._answers.total.items()},
            "group_latency_seconds_total": {(g,): s for g, s in self._latency_s.total.items()},
            "replicas_added_total": {(g,): n for g, n in self._joined.items()},
            "replicas_dropped_total": {(g,): n for g, n in self._left.items()},
            "plans_total": {(trigger,): n for trigger, n in sorted(self._plans.items())},
            "plan_seconds": {(): plan["loading_s"]} if plan else {},
            "plan_gain_predicted": _known(plan.get("promised")),
            "plan_gain_realised": _known(self._realised),
        }
        if experts and self._table is not None and self._load is not None:
            copies = self._table.copies
            cells = [(c, (str(c[0]), str(c[1]))) for c in np.argwhere(copies > 0).tolist()]
            load = self._load
            values["expert_load"] = {k: round(float(load[la, e]), 3) for (la, e), k in cells}
            values["expert_replicas"] = {k: int(copies[la, e]) for (la, e), k in cells}
        return {f"raymoe_{name}": series for name, series in values.items()}

    def layer_balancedness(self) -> dict[int, float]:
        """By MoE layer with load: the ideal time over that of its slowest group."""
        table, load = self._table, self._load
        if table is None or load is None:
            return {}
        work = np.einsum("le,leg->lg", load, table.share)  # [L, G] pairs/s
        ideal = work.sum(1) / table.speed.sum()
        slowest = (work / table.speed).max(1)
        return {
            layer: round(float(ideal[layer] / slowest[layer]), 4)
            for layer in np.flatnonzero(slowest > 0).tolist()
        }

    def group_load(self) -> dict[str, float]:
        """Pairs/s of each group, over all layers, by the shares of its replicas."""
        table, load = self._table, self._load
        if table is None or load is None:
            return {}
        work = np.einsum("le,leg->g", load, table.share)
        return {g: round(float(w), 2) for g, w in zip(table.group_ids, work, strict=True)}

    def _layer(self, layer: int, with_why: bool) -> dict[str, Any]:
        """{"groups": ids, "load": pairs/s by expert, "replicas": by expert [[index of its
        group, share]]}"""
        table, load = self._table, self._load
        if table is None or load is None or not 0 <= layer < len(table.resident):
            return {"groups": [], "load": [], "replicas": []}
        present = np.flatnonzero(table.copies.any(0) | (load > 0).any(0))
        experts = int(present.max()) + 1 if len(present) else 0
        replicas: list[list[tuple[int, float]]] = [[] for _ in range(experts)]
        for e, g in np.argwhere(table.resident[layer]).tolist():
            replicas[e].append((g, round(float(table.share[layer, e, g]), 6)))
        why = {}
        if with_why and self._why is not None:
            for e, g in np.argwhere(table.resident[layer]).tolist():
                since, reason = self._why((layer, e, table.group_ids[g]))
                why[f"{e},{g}"] = {"since": since, "why": reason}
        return {
            "why": why,
            "groups": list(table.group_ids),
            "load": [round(float(x), 2) for x in load[layer, :experts]],
            "replicas": replicas,
        }

    def _take_history(self, history: History) -> None:
        news = [event for event in history.get("events", ()) if event["at"] > self._told_at]
        for event in reversed(news):
            if not is_detail(event["event"]):
                self.events.add("plan", event["event"], event["at"])
            self._told_at = max(self._told_at, event["at"])
        for plan in reversed(history.get("plans", ())):
            if plan["at"] > self._plan_at + 1e-3:
                self._plans[plan["trigger"]] += 1
                self._plan_at, self._last_plan = plan["at"], plan
            if plan["realised"] is not None:
                self._realised = plan["realised"]

    def _sample(self, values: Values, now: float, at: float) -> None:
        """One point of the history; rates and quantiles are those since the point before."""
        assert self._status is not None
        before, passed_s = self._values, now - self._sampled_s
        self._sampled_s = now
        self._values = {n: dict(values.get(n, {})) for n in (_FIRST_TOKEN, _NEXT_TOKEN, _TOKENS)}
        if not before:
            return
        made = _of(self._values, _TOKENS) - _of(before, _TOKENS)
        point: dict[str, Any] = {
            "at": round(at, 3),
            "tokens_per_s": round(max(float(made), 0.0) / passed_s, 2),
            "balancedness": self._status["balancedness"],
            "groups": sum(group["state"] == "ready" for group in self._status["groups"]),
        }
        for short, name in (("first_token", _FIRST_TOKEN), ("next_token", _NEXT_TOKEN)):
            new = _of(self._values, name, histogram=True) - _of(before, name, histogram=True)
            for q in (0.5, 0.95):
                key = f"{short}_p{int(100 * q)}_s"
                point[key] = quantile(CATALOGUE[name].bounds, new[:-1], q)
        self.history.append(point)

    def _mean_latency_s(self) -> dict[str, float]:
        """By group: mean time from a message to its answer, since the start."""
        took = self._latency_s.total
        return {g: took[g] / n for g, n in self._answers.total.items() if n and g in took}


class _Growing:
    """Totals by group over routers that come and go: each router's own totals only grow."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._seen: dict[str, dict[str, float]] = {}

    def take(self, router_id: str, now: Mapping[str, float]) -> None:
        seen = self._seen.setdefault(router_id, {})
        for group_id, value in now.items():
            self.total[group_id] += value - seen.get(group_id, 0)  # type: ignore[assignment]
        seen.update(now)


def quantile(bounds: Sequence[float], counts: Any, q: float) -> float | None:
    """As Prometheus' histogram_quantile: linear within a bucket. counts [len(bounds) + 1].

    None without observations; the last bound for what lies beyond it.
    """
    total = float(np.sum(counts))
    if total <= 0:
        return None
    rank, below = q * total, 0.0
    for i, bound in enumerate(bounds):
        inside = float(counts[i])
        if below + inside >= rank and inside > 0:
            low = bounds[i - 1] if i else 0.0
            return round(low + (bound - low) * (rank - below) / inside, 6)
        below += inside
    return bounds[-1]


def _of(values: Values, name: str, *, histogram: bool = False) -> Any:
    empty = np.zeros(len(CATALOGUE[name].bounds) + 2) if histogram else 0.0
    return np.asarray(values.get(name, {}).get((), empty), np.float64)


def _known(value: float | None) -> dict[Labels, float]:
    return {} if value is None else {(): value}
