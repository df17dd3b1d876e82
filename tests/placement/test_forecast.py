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
    np.testing.assert_allclose(one.scenarios.sum(2), np.broadcast_to(one.load.sum(1), (10, 3)))
    assert (one.scenarios >= 0).all()
    np.testing.assert_allclose(one.scaled(2.0).load, 2 * one.load)


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


def test_a_window_of_another_model_is_refused():
    with pytest.raises(PlacementError, match="layers"):
        Forecaster(2, 4).update(np.ones((3, 4)))
