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

    def answered(self, group_id: str, seconds: float) -> None:
        """Counts one answer. Other threads may be reading: a new group makes new dictionaries."""
        if group_id in self.answers:
            self.answers[group_id] += 1
            self.latency_s[group_id] += seconds
        else:
            self.answers = {**self.answers, group_id: 1}
            self.latency_s = {**self.latency_s, group_id: seconds}
