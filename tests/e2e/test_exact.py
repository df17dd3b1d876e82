"""The rule by which streams are judged: it forgives near ties, and nothing else."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from raymoe.engine.randomness import uniform
from tests.e2e.exact import Drawing, Step, near_ties

PROMPT = (5, 6, 7)
TOKENS = 40
Choose = Callable[[tuple[int, ...], dict[int, float]], int]


def top_of(ids: tuple[int, ...]) -> dict[int, float]:
    """Log probabilities that depend on every token before; every 8th time the best two tie."""
    drawn = random.Random(hash(ids))
    values = sorted((drawn.uniform(-9, -1) for _ in range(5)), reverse=True)
    values[0] += 0.5
    if sum(ids) % 8 == 0:
        values[1] = values[0] - 2e-5
    return dict(zip(drawn.sample(range(100), 5), values, strict=True))


def best(ids: tuple[int, ...], top: dict[int, float]) -> int:
    return max(top, key=lambda token: top[token])


def second(ids: tuple[int, ...], top: dict[int, float]) -> int:
    """What another batch may take: the second where it ties with the first."""
    first, rival = sorted(top, key=lambda token: -top[token])[:2]
    return rival if top[first] - top[rival] < 1e-4 else first


def drawn(ids: tuple[int, ...], top: dict[int, float]) -> int:
    """At temperature 1, with seed 3."""
    total = sum(map(_weight, top.values()))
    point = uniform(3, 0, len(ids)) * total
    for token in sorted(top):
        point -= _weight(top[token])
        if point < 0:
            return token
    raise AssertionError


def _weight(logprob: float) -> float:
    return math.exp(logprob)


def stream(choose: Choose, ids: tuple[int, ...], count: int) -> list[Step]:
    steps: list[Step] = []
    for _ in range(count):
        top = top_of(ids)
        steps.append(Step(choose(ids, top), top))
        ids = (*ids, steps[-1].token)
    return steps


def said_by(choose: Choose) -> list[int]:
    return [step.token for step in stream(choose, PROMPT, TOKENS)]


def quiet(choose: Choose) -> Callable[[tuple[int, ...], int], list[Step]]:
    return lambda ids, count: stream(choose, ids, count)


def test_an_equal_stream_has_no_tie() -> None:
    assert near_ties(PROMPT, said_by(best), quiet(best)) == 0


def test_near_ties_are_counted_and_what_follows_them_is_followed() -> None:
    said = said_by(second)
    assert said != said_by(best)
    assert near_ties(PROMPT, said, quiet(best)) >= 2


@pytest.mark.parametrize("choose", [best, second, drawn])
@pytest.mark.parametrize("at", [0, 17, TOKENS - 1])
def test_a_token_changed_lost_repeated_or_exchanged_is_found(choose: Choose, at: int) -> None:
    """Also in a stream that had its near ties, and after them."""
    said = said_by(choose)
    drawing = Drawing(temperature=1.0, seed=3) if choose is drawn else None
    again = quiet(drawn if choose is drawn else best)
    near_ties(PROMPT, said, again, drawing)
    unlikely = next(t for t in itertools.count(100) if t != said[at])
    wrong = [[*said[:at], unlikely, *said[at + 1 :]]]
    if at + 1 < TOKENS:
        wrong.append([*said[:at], *said[at + 1 :], said[0]])
        wrong.append([*said[: at + 1], said[at], *said[at + 1 : -1]])
        wrong.append([*said[:at], said[at + 1], said[at], *said[at + 2 :]])
    for bad in wrong:
        if bad == said:
            continue
        with pytest.raises(AssertionError, match="no near tie"):
            near_ties(PROMPT, bad, again, drawing)


def test_a_likely_token_that_is_no_near_tie_is_found() -> None:
    """The second best, where it is clearly second."""
    said = said_by(best)
    at = next(
        n
        for n in range(TOKENS)
        if second((*PROMPT, *said[:n]), top_of((*PROMPT, *said[:n]))) == said[n]
    )
    top = top_of((*PROMPT, *said[:at]))
    rival = sorted(top, key=lambda token: -top[token])[1]
    bad = [*said[:at], rival]
    with pytest.raises(AssertionError, match="no near tie"):
        near_ties(PROMPT, bad, quiet(best))


def test_a_sampled_stream_is_held_to_its_seed() -> None:
    said = said_by(drawn)
    assert near_ties(PROMPT, said, quiet(drawn), Drawing(temperature=1.0, seed=3)) == 0
    other = said_by(best)
    assert other != said
    with pytest.raises(AssertionError, match="no near tie"):
        near_ties(PROMPT, other, quiet(drawn), Drawing(temperature=1.0, seed=3))


def test_a_sampled_token_at_the_edge_of_its_interval_is_a_near_tie() -> None:
    point = uniform(3, 0, len(PROMPT))
    # tokens 1 and 2, and the point as good as between them
    top = {1: math.log(point - 1e-6), 2: math.log(1 - point + 1e-6)}
    drawing = Drawing(temperature=1.0, seed=3)
    for told, said in ((1, 2), (2, 1), (1, 1)):
        quiet_one = [Step(told, top)]

        def again(_ids: tuple[int, ...], _n: int, one: list[Step] = quiet_one) -> list[Step]:
            return one

        assert near_ties(PROMPT, [said], again, drawing) == (told != said)
    top = {1: math.log(point - 0.01), 2: math.log(1 - point + 0.01)}
    with pytest.raises(AssertionError, match="no near tie"):
        near_ties(PROMPT, [1], lambda _ids, _n: [Step(2, top)], drawing)
