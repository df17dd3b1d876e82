"""What can be set about a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Behaviour of one `ExpertClient`.

    mode               partial: groups weight and sum their pairs, one row a token comes back;
                       rows: one row a pair comes back, weighted and summed here in gate order
    stall_limit_s      how long a batch waits for an expert without a live replica; short, since
                       the engine hears of cancelled requests only between two tries
    slow_limit_s       how long one message may be out at a group that answers others meanwhile
    retry_s            pairs without a live replica are tried again so often, and at each new table
    message_tokens     a message spans at most so many tokens, so that none holds a group long
    deadline_multiple  of the predicted time; then a group counts as hung
    deadline_floor_s   no deadline is shorter
    first_deadline_s   before anything is known about a group's speed
    spin_s             how long to poll before sleeping while a batch is out, while that pays
    reconnect_s        first and longest pause between attempts to reach a lost group
    samples            timings kept a group between two `take_timings`
    """

    mode: Literal["partial", "rows"] = "partial"
    stall_limit_s: float = 5.0
    slow_limit_s: float = 30.0
    retry_s: float = 0.05
    message_tokens: int = 1024
    deadline_multiple: float = 8.0
    deadline_floor_s: float = 0.2
    first_deadline_s: float = 5.0
    spin_s: float = 30e-6
    connect_timeout_s: float = 2.0
    reconnect_s: tuple[float, float] = (0.02, 2.0)
    samples: int = 256
