"""Speeds from timings: a slowed group shows, noise and preempted messages do not."""

from __future__ import annotations

import numpy as np

from actors.fleet import Sample
from actors.publisher import with_terms
from actors.speeds import SpeedBook
from placement.table import make_table
from placement.types import Placement
from tests.placement.fleets import fleet

KINDS = {"g0": "a", "g1": "a", "g2": "a"}


def samples(
    rng: np.random.Generator, factor: float, count: int = 200, preempted: float = 0.0
) -> list[Sample]:
    """Messages of 1..64 pairs over 1..8 experts, 10 % noise; some take 30 ms longer."""
    pairs = rng.integers(1, 65, count)
    active = np.minimum(pairs, rng.integers(1, 9, count))
    seconds = (2e-5 + pairs * 1e-6 + active * 2e-5) * factor * rng.normal(1, 0.1, count).clip(0.5)
    seconds = seconds + 0.03 * (rng.uniform(size=count) < preempted)
    return [(int(p), int(a), float(s)) for p, a, s in zip(pairs, active, seconds, strict=True)]


def told(factors: dict[str, float], rounds: int = 6, preempted: float = 0.0) -> SpeedBook:
    rng, book = np.random.default_rng(0), SpeedBook()
    for n in range(rounds):
        for group, factor in factors.items():
            book.add(group, "a", samples(rng, factor, preempted=preempted), float(n))
    return book


def test_equal_groups_are_equal_whatever_the_noise() -> None:
    book = told({"g0": 1.0, "g1": 1.08, "g2": 0.95}, preempted=0.2)
    assert {g: m.speed for g, m in book.measured(KINDS).items()} == dict.fromkeys(KINDS, 1.0)


def test_a_group_slowed_at_run_time_shows_within_a_few_windows_and_recovers() -> None:
    rng, book = np.random.default_rng(0), told({"g0": 1.0, "g1": 1.0, "g2": 1.0})
    for n in range(3):
        book.add("g1", "a", samples(rng, 3.0), 10.0 + n)
    speeds = {g: m.speed for g, m in book.measured(KINDS).items()}
    assert speeds["g0"] == speeds["g2"] == 1.0
    assert 0.28 < speeds["g1"] < 0.39
    slow, fast = book.measured(KINDS)["g1"], book.measured(KINDS)["g0"]
    np.testing.assert_allclose(slow.gamma_s / fast.gamma_s, 1 / speeds["g1"])
    for n in range(3):
        book.add("g1", "a", samples(rng, 1.0), 20.0 + n)
    assert book.measured(KINDS)["g1"].speed == 1.0


def test_a_slow_group_whose_messages_get_small_is_not_taken_for_slower_and_slower() -> None:
    rng, book = np.random.default_rng(0), SpeedBook()
    kinds = {"fast": "a", "slow": "b"}

    def report(group: str, factor: float, pairs: int, now: float) -> None:
        """Decoding: much the same message again and again, its time mostly fixed."""
        sizes = rng.integers(max(1, pairs - 1), pairs + 2, 100)
        seconds = (2e-4 + sizes * 1e-6) * factor * rng.normal(1, 0.1, 100).clip(0.5)
        seconds += 3e-3 * (rng.uniform(size=100) < 0.1)
        told = [(int(n), int(n), float(s)) for n, s in zip(sizes, seconds, strict=True)]
        book.add(group, kinds[group], told, now)

    pairs = 24
    for now in range(60):
        report("fast", 1.0, 32, now)
        report("slow", 3.0, pairs, now)
        measured = book.measured(kinds)
        if now > 20:  # it gets load by what was measured
            pairs = max(1, round(24 * measured["slow"].speed))
            assert 1 / 4.5 < measured["slow"].speed < 1 / 2, now
    assert pairs < 12


def test_a_group_without_traffic_gets_another_chance() -> None:
    book = told({"g0": 1.0, "g1": 1.0})
    rng = np.random.default_rng(1)
    book.add("g1", "a", samples(rng, 4.0), 10.0)
    assert book.measured(KINDS)["g1"].speed < 0.4
    book.add("g1", "a", [], 30.0)
    assert book.measured(KINDS)["g1"].speed < 0.4
    book.add("g1", "a", [], 100.0)
    assert book.measured(KINDS)["g1"].speed == 1.0


def test_nothing_is_said_before_enough_was_seen() -> None:
    book = SpeedBook()
    assert book.measured(KINDS) == {} and book.tokens_per_s(0.0) is None
    book.add("g0", "a", samples(np.random.default_rng(0), 1.0, count=20), 0.0)
    assert book.measured(KINDS) == {}


def test_the_rate_is_that_of_whole_messages() -> None:
    book = told({"g0": 1.0, "g1": 1.0})
    rng = np.random.default_rng(5)
    taken = np.array(samples(rng, 1.0, count=4000))
    expected = taken[:, 0].sum() / taken[:, 2].sum()
    rate = book.tokens_per_s(0.0)
    assert rate is not None
    np.testing.assert_allclose(rate, expected, rtol=0.1)


def test_routers_get_the_terms_apart_unless_groups_shall_count_alike() -> None:
    book = told({"g0": 1.0, "g1": 3.0})
    measured = book.measured({"g0": "a", "g1": "a"})
    spec = fleet(groups=2, layers=1, speeds=[measured["g0"].speed, measured["g1"].speed])
    resident = np.ones((1, 2, 2), np.bool_)
    even = Placement(resident=resident, share=resident / 2)
    table = with_terms(make_table(spec, even, term=1, epoch=1), measured)
    assert table.alpha_s[1] > 2 * table.alpha_s[0] and table.speed[0] > 2 * table.speed[1]
    alike = make_table(fleet(groups=2, layers=1), even, term=1, epoch=1)
    shown = with_terms(alike, measured)
    assert shown.speed[0] == shown.speed[1] and shown.gamma_s[0] == shown.gamma_s[1]
    partly = with_terms(alike, {"g0": measured["g0"]})
    assert partly is alike
