"""Speeds from timings."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import PlacementError
from placement.fit import TimeFit


def feed(fit, rng, alpha, pair, gamma, count=300, noise=0.05):
    for _ in range(count):
        active = int(rng.integers(1, 17))
        pairs = active * int(rng.integers(1, 65))
        seconds = (alpha + pair * pairs + gamma * active) * rng.lognormal(0, noise)
        fit.add(pairs, active, seconds)


@pytest.mark.parametrize("truth", [(1e-4, 5e-6, 8e-5), (0.0, 5e-6, 0.0), (1e-3, 1e-6, 0.0)])
def test_the_terms_come_back(truth):
    fit = TimeFit()
    feed(fit, np.random.default_rng(0), *truth)
    found = fit.speed()
    for have, want in zip((found.alpha_s, found.pair_s, found.gamma_s), truth, strict=True):
        assert have == pytest.approx(want, rel=0.2, abs=2e-5)
    assert found.pairs_per_s == pytest.approx(1 / truth[1], rel=0.1)


def test_a_group_that_slows_down_is_followed():
    fit, rng = TimeFit(keep=0.98), np.random.default_rng(1)
    feed(fit, rng, 1e-4, 5e-6, 8e-5)
    feed(fit, rng, 3e-4, 15e-6, 24e-5)
    assert fit.speed().pair_s == pytest.approx(15e-6, rel=0.1)


def test_nothing_is_said_before_enough_is_known_and_broken_clocks_are_ignored():
    fit = TimeFit()
    for seconds in (float("nan"), -1.0, 0.0, float("inf")) * 10:
        fit.add(10, 2, seconds)
    assert fit.speed() is None


def test_batches_that_all_look_alike_give_a_usable_speed():
    fit = TimeFit()
    for _ in range(50):
        fit.add(64, 8, 1e-3)
    found = fit.speed()
    assert found.pair_s > 0
    total = found.alpha_s + 64 * found.pair_s + 8 * found.gamma_s
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_impossible_fading_is_refused():
    with pytest.raises(PlacementError, match="keep"):
        TimeFit(keep=0.0)
