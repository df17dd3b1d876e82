"""When the door opens: decisions only, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from actors.door import await_open, health_url


def opened(answers: Callable[[str, float], bool], urls: Iterable[str] = ("a", "b")) -> float | None:
    """When it opened, in seconds of a clock that only sleeping moves; None when it gave up."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    came = await_open(
        lambda: list(urls),
        lambda url: answers(url, now[0]),
        limit_s=60,
        hold_s=7,
        clock=lambda: now[0],
        sleep=sleep,
    )
    return now[0] if came else None


def test_it_opens_when_all_have_answered_for_long_enough() -> None:
    assert opened(lambda url, now: True) == 7
    assert opened(lambda url, now: now >= (20 if url == "b" else 3)) == 27


def test_a_break_starts_the_time_anew() -> None:
    assert opened(lambda url, now: not 5 <= now < 6) == 13


def test_it_gives_up_when_one_never_answers_or_there_is_none() -> None:
    assert opened(lambda url, now: url == "a") is None
    assert opened(lambda url, now: True, urls=()) is None


@pytest.mark.parametrize(
    ("host", "ip", "prefix", "url"),
    [
        ("0.0.0.0", "10.1.2.3", "/", "http://10.1.2.3:8000/health"),
        (None, "10.1.2.3", "", "http://10.1.2.3:8000/health"),
        ("127.0.0.1", "10.1.2.3", "/demo", "http://127.0.0.1:8000/demo/health"),
        ("::", "fd00::1", "/", "http://[fd00::1]:8000/health"),
    ],
)
def test_where_it_asks(host: str | None, ip: str, prefix: str, url: str) -> None:
    assert health_url(host, ip, 8000, prefix) == url
