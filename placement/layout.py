"""A layout to be improved, and what changing it costs: what search and polish both work on."""

from __future__ import annotations

from dataclasses import dataclass

from placement.dwell import Held
from placement.types import Bools, Floats, Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The arrays are shared: `resident` and `room` change in place (give copies).

    load      float64 [L, M, E] scenarios in pairs/s
    resident  bool [L, E, G]
    allowed   bool [G], groups that may receive replicas
    room      int64 [G], bytes still free
    size      int64 [L], bytes of one replica
    rate      float64 [G] pairs/s; base float64 [G] work already there, in pairs/s
    price     float64 [G], what loading one byte onto the group costs, in seconds of work a second
    margin    least gain of an action over its price, as a part of the layer's time
    byte_limit  most bytes loaded in all
    pool      most bytes by which it may grow
    node      int [G], given when losses are to be survived: copies belong on several nodes
    held      copies that may not go, or not come back, yet
    """

    load: Floats
    resident: Bools
    allowed: Bools
    room: Ints
    size: Ints
    rate: Floats
    base: Floats
    price: Floats
    margin: float
    byte_limit: float = float("inf")
    pool: float = float("inf")
    node: Ints | None = None
    held: Held | None = None
