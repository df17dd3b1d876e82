"""What a group's end of the data plane allows."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymoe.links.fair import Fairness
from raymoe.links.link import SlotTerms


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a Server."""

    shm: bool = True
    tcp_host: str | None = "127.0.0.1"  # None: no TCP
    tcp_port: int = 0  # 0: the system chooses
    advertise_host: str = ""  # what other nodes connect to; tcp_host when empty
    inproc: bool = False  # reachable from this process, for tests
    terms: SlotTerms = field(default_factory=SlotTerms)  # the most a link gets
    fairness: Fairness = field(default_factory=Fairness)
    max_links: int = 256
    max_strangers: int = 16  # unauthenticated connections
    handshake_s: float = 5.0
    lease_s: float = 60.0  # a link silent for so long is closed: clients ping
    spin_s: float = 0.0  # poll() looks so long before it sleeps, while that pays; 0: not at all
