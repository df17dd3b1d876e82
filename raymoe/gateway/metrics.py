"""Counters, gauges and histograms of this process, in Prometheus' text format.

Small on purpose: one event loop writes, so there is nothing to lock, and adding to a counter is
a dictionary update. Names, kinds and help lines are those of `raymoe.observe.catalogue`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from raymoe.observe.catalogue import CATALOGUE, Labels, MetricSpec

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Number = float | list[float]  # a histogram's: the count of each bucket, then the sum
Values = Mapping[Labels, Number]
M = TypeVar("M", bound="Metric")


class Metric:
    """What the catalogue says of it, and `values()` now."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec

    def values(self) -> Values:
        raise NotImplementedError


class Counter(Metric):
    def __init__(self, spec: MetricSpec) -> None:
        super().__init__(spec)
        self._values: dict[Labels, Number] = {} if spec.labels else {(): 0.0}

    def add(self, amount: float = 1, labels: Labels = ()) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount  # type: ignore[operator]

    def values(self) -> Values:
        return self._values


class Reading(Metric):
    """A gauge or counter kept elsewhere, read when asked for: `read` gives {labels: value}."""

    def __init__(self, spec: MetricSpec, read: Callable[[], Mapping[Labels, float]]) -> None:
        super().__init__(spec)
        self._read = read

    def values(self) -> Values:
        return dict(self._read())


class Histogram(Metric):
    def __init__(self, spec: MetricSpec) -> None:
        super().__init__(spec)
        self._series: dict[Labels, list[float]] = {}

    def observe(self, value: float, labels: Labels = ()) -> None:
        bounds = self.spec.bounds
        series = self._series.get(labels)
        if series is None:
            series = self._series[labels] = [0] * (len(bounds) + 1) + [0.0]
        series[bisect_left(bounds, value)] += 1
        series[-1] += value

    def values(self) -> Values:
        return self._series


class Registry:
    """Metrics by their names in the catalogue, with or without the prefix raymoe_."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def counter(self, name: str) -> Counter:
        return self._add(Counter(_spec(name, "counter")))

    def histogram(self, name: str) -> Histogram:
        return self._add(Histogram(_spec(name, "histogram")))

    def reading(self, name: str, read: Callable[[], Mapping[Labels, float]]) -> Reading:
        return self._add(Reading(_spec(name, "gauge", "counter"), read))

    def _add(self, metric: M) -> M:
        self._metrics[metric.spec.name] = metric
        return metric

    def values(self) -> dict[str, Values]:
        """A copy of everything there is now, by name."""
        return {
            name: {k: list(v) if isinstance(v, list) else v for k, v in metric.values().items()}
            for name, metric in self._metrics.items()
        }

    def text(self) -> str:
        return text_of({name: metric.values() for name, metric in self._metrics.items()})


def text_of(values: Mapping[str, Values]) -> str:
    """Prometheus text of values by metric name. A name must be in the catalogue."""
    lines: list[str] = []
    for name, series in values.items():
        spec = CATALOGUE[name]
        unit = f" ({spec.unit})" if spec.unit else ""
        lines += [f"# HELP {name} {spec.text}{unit}", f"# TYPE {name} {spec.kind}"]
        lines += _samples(spec, series)
    return "".join(f"{line}\n" for line in lines)


def _samples(spec: MetricSpec, series: Values) -> Iterable[str]:
    for labels, value in sorted(series.items()):
        own = _labels(spec.labels, labels)
        if not isinstance(value, list):
            yield f"{spec.name}{own} {_number(value)}"
            continue
        total = 0
        for bound, count in zip((*spec.bounds, "+Inf"), value[:-1], strict=True):
            total += int(count)
            bucket = _labels((*spec.labels, "le"), (*labels, str(bound)))
            yield f"{spec.name}_bucket{bucket} {total}"
        yield f"{spec.name}_sum{own} {_number(value[-1])}"
        yield f"{spec.name}_count{own} {total}"


def _spec(name: str, *kinds: str) -> MetricSpec:
    spec = CATALOGUE[name if name.startswith("raymoe_") else f"raymoe_{name}"]
    assert spec.kind in kinds, f"{name} is a {spec.kind}"
    return spec


def _labels(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = ",".join(
        f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)
    )
    return "{" + pairs + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
