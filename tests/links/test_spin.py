"""Looking before sleeping goes on while it pays, and is tried again now and then."""

from __future__ import annotations

from raymoe.links.spin import Spin


def spun(spin: Spin, waits: int, came: bool) -> int:
    """How many of so many waits looked."""
    looked = 0
    for _ in range(waits):
        if spin.limit_s():
            looked += 1
            spin.note(came)
    return looked


def test_it_spins_while_something_comes_in_time() -> None:
    spin = Spin(1e-4)
    spun(spin, 600, came=True)
    assert spun(spin, 1000, came=True) == 1000


def test_it_stops_when_nothing_does_and_tries_again_now_and_then() -> None:
    spin = Spin(1e-4)
    spun(spin, 600, came=True)
    spun(spin, 64, came=False)
    assert 0 < spun(spin, 640, came=False) <= 40
    spun(spin, 512, came=True)  # it pays again
    assert spun(spin, 100, came=True) == 100


def test_no_limit_is_never() -> None:
    assert spun(Spin(0.0), 300, came=True) == 0
