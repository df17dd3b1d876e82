"""The deployment's metrics through Ray's own agents too: where Ray is scraped, so are we.

The names are those of /metrics with Ray's prefix `ray_`, and a tag `deployment`. The controller
tells of everything, so there is one series, not one a gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raymoe.gateway.metrics import Values
from raymoe.observe.catalogue import CATALOGUE, Labels, MetricSpec

EVERY_S = 5.0
Make = Callable[[str, str, str, Labels], Any]  # "counter" or "gauge", name, text, tag keys


class RayMetrics:
    """`tell` it all values every few seconds; from one thread."""

    def __init__(self, deployment: str, make: Make | None = None) -> None:
        self._deployment, self._make = deployment, make or _make
        self._metrics: dict[str, Any] = {}
        self._names: dict[str, Labels] = {}
        self._told: dict[tuple[str, Labels], float] = {}
        self._told_s = -float("inf")

    def due(self, now: float) -> bool:
        """`now`: monotonic seconds."""
        return now - self._told_s >= EVERY_S

    def tell(self, values: Mapping[str, Values], now: float) -> None:
        """Metrics by name in the catalogue. Gauges of what is no longer there fall to 0: Ray goes
        on exporting the last value for as long as this process lives."""
        self._told_s = now
        seen = set()
        for name, series in values.items():
            for part, kind, labels, value in _flat(CATALOGUE[name], series):
                seen.add((part, labels))
                self._tell(CATALOGUE[name], part, kind, labels, value)
        for part, labels in self._told.keys() - seen:
            if self._told[part, labels] and not part.endswith(_GROWING):
                self._metrics[part].set(0.0, self._tags(part, labels))
                self._told[part, labels] = 0.0

    def _tell(self, spec: MetricSpec, part: str, kind: str, labels: Labels, value: float) -> None:
        names = (*spec.labels, "le") if part.endswith("_bucket") else spec.labels
        metric = self._metrics.get(part)
        if metric is None:
            metric = self._make(kind, part, spec.text, (*names, "deployment"))
            self._metrics[part] = metric
            self._names[part] = names
        before = self._told.get((part, labels), 0.0)
        self._told[part, labels] = value
        if kind == "gauge":
            metric.set(value, self._tags(part, labels))
        elif value > before:  # less: whoever counts it has begun anew
            metric.inc(value - before, self._tags(part, labels))

    def _tags(self, part: str, labels: Labels) -> dict[str, str]:
        named = dict(zip(self._names[part], labels, strict=True))
        return {**named, "deployment": self._deployment}


_GROWING = ("_total", "_bucket", "_sum", "_count")


def _flat(spec: MetricSpec, series: Values) -> Iterator[tuple[str, str, Labels, float]]:
    """(name, kind, labels, value). A histogram's parts have Prometheus' names, as gauges: Ray
    would put _total behind those of counters, and its own histograms take single values only."""
    for labels, value in series.items():
        if not isinstance(value, list):
            kind = "counter" if spec.kind == "counter" else "gauge"
            yield spec.name, kind, labels, float(value)
            continue
        yield from _histogram(spec, labels, value)


def _histogram(
    spec: MetricSpec, labels: Labels, value: list[float]
) -> Iterator[tuple[str, str, Labels, float]]:
    total = 0.0
    for bound, count in zip((*spec.bounds, "+Inf"), value[:-1], strict=True):
        total += count
        yield f"{spec.name}_bucket", "gauge", (*labels, str(bound)), total
    yield f"{spec.name}_sum", "gauge", labels, value[-1]
    yield f"{spec.name}_count", "gauge", labels, total


def _make(kind: str, name: str, text: str, tag_keys: Labels) -> Any:
    from ray.util import metrics

    made = metrics.Counter if kind == "counter" else metrics.Gauge
    return made(name, description=text, tag_keys=tag_keys)
