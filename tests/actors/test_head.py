"""A head that is away holds nobody up, and what it does late is undone."""

from __future__ import annotations

import threading

import pytest

from actors.head import Head, HeadAway


def test_answers_and_errors_arrive() -> None:
    head = Head()
    for limit_s in (None, 60.0):
        head.limit_s = limit_s
        assert head.ask(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            head.ask(lambda: 1 // 0)


def test_one_that_hangs_is_given_up_and_undone_when_it_ends() -> None:
    head = Head()
    head.limit_s = 0.02
    answer, undone = threading.Event(), threading.Event()
    made: list[str] = []

    def late() -> str:
        answer.wait()
        return "an actor"

    def undo(what: str) -> None:
        made.append(what)
        undone.set()

    with pytest.raises(HeadAway, match="head does not answer"):
        head.ask(late, undo)
    asked: list[int] = []
    head.limit_s = 60.0
    with pytest.raises(HeadAway):
        head.ask(lambda: asked.append(1))
    assert not asked, "nothing else is asked for while one hangs"
    answer.set()
    assert undone.wait(60) and made == ["an actor"]
    while True:  # the thread is about to end
        try:
            assert head.ask(lambda: 4) == 4
            break
        except HeadAway:
            continue


def test_nothing_is_undone_in_time() -> None:
    head = Head()
    head.limit_s = 60.0
    made: list[int] = []
    assert head.ask(lambda: 5, made.append) == 5
    assert not made


def test_what_is_told_is_not_waited_for_and_done_in_order_in_the_end() -> None:
    head = Head()
    head.limit_s = 60.0
    answer, done = threading.Event(), threading.Event()
    order: list[int] = []

    def first() -> None:
        answer.wait()
        order.append(1)
        raise ConnectionError("the first fails")

    head.tell(first)
    head.tell(lambda: order.append(2))
    head.tell(done.set)
    assert head.ask(lambda: 3) == 3, "what is told holds up nothing that is asked"
    assert not order
    answer.set()
    assert done.wait(60) and order == [1, 2]


def test_telling_does_not_wait_for_an_answer_to_somebody_else() -> None:
    head = Head()
    head.limit_s = 60.0
    asked, answer, done = threading.Event(), threading.Event(), threading.Event()

    def hangs() -> None:
        asked.set()
        answer.wait()

    other = threading.Thread(target=lambda: head.ask(hangs))
    other.start()
    try:
        assert asked.wait(60)
        head.tell(done.set)
        assert done.wait(60)
    finally:
        answer.set()
        other.join()


def test_without_a_limit_what_is_told_is_done_at_once() -> None:
    told: list[int] = []
    Head().tell(lambda: told.append(1))
    assert told == [1]
