"""Forecasts: steady, drifting, shifting, empty."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import PlacementError
from placement.forecast import Forecaster, forecast_windows


def off(load, truth):
    """Mean over layers of the L1 distance of the parts."""
    parts = [x / np.maximum(x.sum(1, keepdims=True), 1e-300) for x in (load, truth)]
    return float(np.abs(parts[0] - parts[1]).sum(1).mean())


def windows(rng, weights, pairs=2000):
    return np.stack([[rng.multinomial(pairs, w / w.sum()) for w in layer] for layer in weights])


def test_a_steady_load_is_averaged_over_long():
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1, (3, 16))
    seen = windows(rng, np.repeat(weight[None], 20, 0), pairs=300)
    found = forecast_windows(seen)
    assert off(found.load, weight) < 0.6 * off(seen[-1].astype(float), weight)
    np.testing.assert_allclose(found.load.sum(1), 300, rtol=0.01)


def test_another_load_is_followed_at_once():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(0, 1, (2, 3, 16))
    seen = windows(rng, np.concatenate([np.repeat(a[None], 10, 0), b[None]]))
    found = forecast_windows(seen)
    assert off(found.load, b) < 0.2 < off(forecast_windows(seen[:-1]).load, b)


def test_empty_windows_and_silent_layers_change_nothing():
    rng = np.random.default_rng(2)
    seen = windows(rng, rng.lognormal(0, 1, (6, 3, 8)))
    seen[:, 1] = 0
    a, b = Forecaster(3, 8), Forecaster(3, 8)
    for window in seen:
        a.update(window)
        b.update(window)
        b.update(np.zeros((3, 8)))
    np.testing.assert_array_equal(a.forecast().load, b.forecast().load)
    assert not a.forecast().load[1].any()
    assert np.isfinite(a.forecast().scenarios).all()


def test_nothing_seen_is_a_forecast_of_nothing():
    found = Forecaster(2, 4).forecast()
    assert not found.load.any() and not found.scenarios.any()


def test_scenarios_keep_the_total_and_are_reproducible():
    rng = np.random.default_rng(3)
    seen = windows(rng, rng.lognormal(0, 1, (6, 3, 8)))
    one, two = forecast_windows(seen), forecast_windows(seen)
    np.testing.assert_array_equal(one.scenarios, two.scenarios)
    np.testing.assert_allclose(
        one.scenarios.sum(2), np.broadcast_to(one.load.sum(1), one.scenarios.shape[:2])
    )
    assert (one.scenarios >= 0).all()
    np.testing.assert_allclose(one.scaled(2.0).load, 2 * one.load)


def moods(rng, count, experts=8, tokens=512):
    """Windows of one layer in 16 parts, [W, 16, 1, E]: one half of the experts or the other is
    busy, a part long."""
    calm, found = np.full(experts, 1 / experts), []
    for _ in range(count * 16):
        part = calm.copy()
        half = slice(0, experts // 2) if rng.random() < 0.5 else slice(experts // 2, None)
        part[half] *= 3
        found.append(rng.multinomial(tokens, part / part.sum()))
    return np.array(found).reshape(count, 16, 1, experts)


def test_parts_of_windows_show_what_is_busy_together():
    rng = np.random.default_rng(5)
    parts = moods(rng, 8)
    known, unknown = Forecaster(1, 8), Forecaster(1, 8)
    for window in parts:
        known.update(window.sum(0), window)
        unknown.update(window.sum(0))

    def together(forecast):
        off = forecast.scenarios[:, 0] - forecast.load[0]
        return np.corrcoef(off[:, 0], off[:, 1:].T)[0, 1:]  # expert 0 with 1..7

    found = together(known.forecast())
    assert found[:3].min() > 0.5 and found[3:].max() < -0.5
    assert together(unknown.forecast())[:3].min() < 0.5
    np.testing.assert_array_equal(known.forecast().load, unknown.forecast().load)


def test_scenarios_from_parts_are_as_far_off_as_forecasts_were():
    rng = np.random.default_rng(6)
    parts = moods(rng, 5)
    forecaster = Forecaster(1, 8)
    for window in parts:
        forecaster.update(window.sum(0), window)
    found = forecaster.forecast()
    off = found.scenarios - found.load
    assert 0.5 < np.sqrt((off**2).mean()) / np.sqrt((found.spread**2).mean()) < 2
    np.testing.assert_allclose(found.scenarios.sum(2), found.load.sum(1)[None].repeat(len(off), 0))


def test_too_few_parts_say_nothing_and_many_are_merged():
    rng = np.random.default_rng(7)
    parts = moods(rng, 3)[:, :, 0]
    plain, few, fine, merged = (Forecaster(1, 8) for _ in range(4))
    for window in parts:
        whole = window.sum(0)[None]
        plain.update(whole)
        few.update(whole, window.reshape(2, 8, 8).sum(1)[:, None])
        merged.update(whole, window[:, None])
        fine.update(whole, (window[:, None, None] * [[[0.5]], [[0.5]]]).reshape(32, 1, 8))
    same = np.testing.assert_allclose
    same(few.forecast().scenarios, plain.forecast().scenarios)
    same(fine.forecast().scenarios, merged.forecast().scenarios)
    assert merged.forecast().scenarios.shape != plain.forecast().scenarios.shape


def test_units_do_not_matter():
    rng = np.random.default_rng(4)
    seen = windows(rng, rng.lognormal(0, 1, (6, 3, 8)))
    np.testing.assert_allclose(
        forecast_windows(seen * 1e-4).load, forecast_windows(seen).load * 1e-4
    )


@pytest.mark.parametrize(
    ("wrong", "says"), [(np.nan, "NaN"), (-1.0, "negative"), (np.inf, "infinity")]
)
def test_impossible_counts_are_refused(wrong, says):
    window = np.ones((2, 4))
    window[0, 0] = wrong
    with pytest.raises(PlacementError, match=says):
        Forecaster(2, 4).update(window)


@pytest.mark.parametrize("parts", [np.full((4, 2, 3), -1), np.ones((4, 3, 3))])
def test_impossible_parts_are_refused(parts):
    with pytest.raises(PlacementError):
        Forecaster(2, 3).update(np.ones((2, 3)), parts)


def test_a_window_of_another_model_is_refused():
    with pytest.raises(PlacementError, match="layers"):
        Forecaster(2, 4).update(np.ones((3, 4)))
