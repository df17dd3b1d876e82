"""Where a client's time goes, and what went wrong: plain running totals."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ClientStats:
    """Totals since the client was made. Seconds are the engine's thread's."""

    batches: int = 0
    dispatch_s: float = 0.0  # choosing replicas, writing messages
    wait_s: float = 0.0  # nothing to do but wait for groups
    combine_s: float = 0.0  # adding replies up
    retried_pairs: int = 0
    nacks: int = 0
    errors: int = 0
    slow: int = 0  # deadlines moved, because the group was making progress
    deadlines: int = 0  # links given up, because it was not
    links_lost: int = 0
    last_error: str = ""
    answers: dict[str, int] = field(default_factory=dict)  # by group: messages it answered
    latency_s: dict[str, float] = field(default_factory=dict)  # by group: sending to answer
    busy_s: dict[str, float] = field(default_factory=dict)  # by group: its own time computing
    pairs: dict[str, int] = field(default_factory=dict)  # by group: in those answers
    layers: list[list[float]] = field(default_factory=list)
    """By layer: batches, then the seconds of dispatch, wait and combine."""

    def answered(self, group_id: str, seconds: float, pairs: int, busy_s: float) -> None:
        """Counts one answer. Other threads may be reading: a new group makes new dictionaries."""
        if group_id in self.answers:
            self.answers[group_id] += 1
            self.latency_s[group_id] += seconds
            self.busy_s[group_id] += busy_s
            self.pairs[group_id] += pairs
        else:
            self.answers = {**self.answers, group_id: 1}
            self.latency_s = {**self.latency_s, group_id: seconds}
            self.busy_s = {**self.busy_s, group_id: busy_s}
            self.pairs = {**self.pairs, group_id: pairs}

    def dispatched(self, layer: int, seconds: float) -> None:
        """A batch of a layer is out."""
        self.dispatch_s += seconds
        self._of(layer)[1] += seconds

    def combined(self, layer: int, waited_s: float, seconds: float) -> None:
        """A batch of a layer is back, or given up; `seconds` beside the wait."""
        self.batches += 1
        self.wait_s += waited_s
        self.combine_s += seconds
        row = self._of(layer)
        row[0] += 1
        row[2] += waited_s
        row[3] += seconds

    def _of(self, layer: int) -> list[float]:
        while len(self.layers) <= layer:
            self.layers.append([0, 0.0, 0.0, 0.0])
        return self.layers[layer]
