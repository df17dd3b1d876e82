"""Where a client's time goes, and what went wrong: plain running totals."""

from __future__ import annotations

from dataclasses import dataclass


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
