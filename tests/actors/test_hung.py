"""A controller that does not answer is ended by routers, and its successor is not. Without Ray."""

from __future__ import annotations

import pytest

from actors.hung import LIMIT_S, HungController
from actors.spawn import PENDING, RUNNING, STARTING, Place

Killed = list[tuple[str, int, str]]


def silent(hung: HungController, place: Place, seconds: float) -> None:
    for _ in range(int(seconds / 5)):
        hung.silent(5.0, lambda: place)


def test_a_controller_that_is_silent_for_long_is_ended() -> None:
    killed: Killed = []
    hung = HungController(lambda *what: killed.append(what))
    silent(hung, Place(RUNNING, "n1", 7), LIMIT_S - 5)
    hung.answered()
    silent(hung, Place(RUNNING, "n1", 7), LIMIT_S - 5)
    assert not killed
    silent(hung, Place(RUNNING, "n1", 7), 5)
    assert killed == [("n1", 7, "PlacementController")]
    silent(hung, Place(RUNNING, "n1", 8), LIMIT_S - 5)
    assert len(killed) == 1, "the next one has its own time"


@pytest.mark.parametrize("stage", [PENDING, STARTING])
def test_one_that_starts_is_let_start(stage: str) -> None:
    killed: Killed = []
    hung = HungController(lambda *what: killed.append(what))
    silent(hung, Place(stage, "n1", 7), 10 * LIMIT_S)
    assert not killed


def test_the_successor_of_one_that_another_router_has_ended_is_let_live() -> None:
    killed: Killed = []
    hung = HungController(lambda *what: killed.append(what))
    silent(hung, Place(RUNNING, "n1", 7), LIMIT_S - 5)
    silent(hung, Place(RUNNING, "n1", 8), 5)
    assert killed == [("n1", 7, "PlacementController")], "which is no process any more"


def test_what_ray_cannot_tell_is_asked_again() -> None:
    killed: Killed = []
    hung = HungController(lambda *what: killed.append(what))

    def away() -> Place:
        raise ConnectionError("Ray's head does not answer")

    for _ in range(3):
        with pytest.raises(ConnectionError):
            hung.silent(LIMIT_S, away)
    hung.silent(LIMIT_S, lambda: Place(RUNNING, "n1", 7))
    assert killed == [("n1", 7, "PlacementController")]
