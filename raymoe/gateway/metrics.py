"""Counters, gauges and histograms of this process, in Prometheus' text format.

Small on purpose: one event loop writes, so there is nothing to lock, and adding to a counter is
a dictionary update.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[str, ...]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metric:
    """A name, a help line, label names; `lines` is its text."""

    kind = ""

    def __init__(self, name: str, text: str, label_names: Labels = ()) -> None:
        self.name = name
        self.text = text
        self.label_names = label_names

    def samples(self) -> Iterable[str]:
        raise NotImplementedError

    def lines(self) -> list[str]:
        head = [f"# HELP {self.name} {self.text}", f"# TYPE {self.name} {self.kind}"]
        return head + list(self.samples())


class Counter(Metric):
    kind = "counter"

    def __init__(self, name: str, text: str, label_names: Labels = ()) -> None:
        super().__init__(name, text, label_names)
        self.values: dict[Labels, float] = {} if label_names else {(): 0}

    def add(self, amount: float = 1, labels: Labels = ()) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def samples(self) -> Iterable[str]:
        for labels, value in sorted(self.values.items()):
            yield f"{self.name}{_labels(self.label_names, labels)} {_number(value)}"


class Reading(Metric):
    """A gauge or counter kept elsewhere, read when asked for: `read` gives {labels: value}."""

    def __init__(
        self,
        name: str,
        text: str,
        read: Callable[[], Mapping[Labels, float]],
        label_names: Labels = (),
        kind: str = "gauge",
    ) -> None:
        super().__init__(name, text, label_names)
        self.kind = kind
        self._read = read

    def samples(self) -> Iterable[str]:
        for labels, value in sorted(self._read().items()):
            yield f"{self.name}{_labels(self.label_names, labels)} {_number(value)}"


class Histogram(Metric):
    """Seconds by bucket."""

    kind = "histogram"

    def __init__(
        self, name: str, text: str, label_names: Labels = (), bounds: tuple[float, ...] = _SECONDS
    ) -> None:
        super().__init__(name, text, label_names)
        self._bounds = bounds
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, value: float, labels: Labels = ()) -> None:
        counts = self._counts.setdefault(labels, [0] * (len(self._bounds) + 1))
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] = self._sums.get(labels, 0.0) + value

    def samples(self) -> Iterable[str]:
        names = (*self.label_names, "le")
        for labels, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*self._bounds, "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_labels(names, (*labels, str(bound)))} {total}"
            own = _labels(self.label_names, labels)
            yield f"{self.name}_sum{own} {_number(self._sums[labels])}"
            yield f"{self.name}_count{own} {total}"


class Registry:
    """All metrics of a gateway."""

    def __init__(self) -> None:
        self._metrics: list[Metric] = []

    def counter(self, name: str, text: str, label_names: Labels = ()) -> Counter:
        metric = Counter(name, text, label_names)
        self._metrics.append(metric)
        return metric

    def histogram(self, name: str, text: str, label_names: Labels = ()) -> Histogram:
        metric = Histogram(name, text, label_names)
        self._metrics.append(metric)
        return metric

    def reading(
        self,
        name: str,
        text: str,
        read: Callable[[], Mapping[Labels, float]],
        label_names: Labels = (),
        kind: str = "gauge",
    ) -> Reading:
        metric = Reading(name, text, read, label_names, kind)
        self._metrics.append(metric)
        return metric

    def text(self) -> str:
        return "\n".join(line for metric in self._metrics for line in metric.lines()) + "\n"


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
