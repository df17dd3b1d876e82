"""The knapsack against scipy.optimize.milp."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from placement import knapsack
from placement.errors import PlacementError
from placement.knapsack import choose


def best_time(time, size, budget):
    layers, options = time.shape
    one_each = np.kron(np.eye(layers), np.ones(options))
    found = milp(
        time.ravel(),
        integrality=np.ones(time.size),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size.ravel()[None], -np.inf, budget),
        ],
    )
    return found.fun


def random_problem(rng, layers, options):
    gain = rng.exponential(1.0, (layers, options)) * rng.uniform(0, 1, (layers, 1))
    time = 10 - np.cumsum(gain, axis=1)
    size = np.arange(options) * rng.choice([3, 5, 8], layers)[:, None]
    return time, size


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("units", [20_000, 0])
def test_as_good_as_milp(seed, units, monkeypatch):
    monkeypatch.setattr(knapsack, "GRID", units)  # 0: the list of undominated states
    rng = np.random.default_rng(seed)
    time, size = random_problem(rng, int(rng.integers(1, 9)), int(rng.integers(1, 7)))
    time += rng.normal(0, 1, time.shape)  # curves need not fall
    budget = int(rng.integers(0, size.max() * len(size) + 2))
    picks = choose(time, size * 1024, budget * 1024)
    rows = np.arange(len(picks))
    assert size[rows, picks].sum() <= budget
    assert time[rows, picks].sum() == pytest.approx(best_time(time, size, budget), abs=1e-6)


def test_a_thinned_list_stays_within_the_budget_and_close(monkeypatch):
    monkeypatch.setattr(knapsack, "GRID", 0)
    monkeypatch.setattr(knapsack, "STATES", 200)
    rng = np.random.default_rng(3)
    time, _ = random_problem(rng, 10, 8)
    size = np.arange(8) * rng.integers(1000, 2000, 10)[:, None]
    picks = choose(time, size, 40_000)
    rows = np.arange(10)
    assert size[rows, picks].sum() <= 40_000
    assert time[rows, picks].sum() <= best_time(time, size, 40_000) * 1.02


def test_of_equal_times_the_fewer_bytes():
    assert choose(np.array([[5.0, 5.0, 4.0, 4.0]]), np.array([[0, 1, 2, 3]]), 3).tolist() == [2]


@pytest.mark.parametrize(
    ("time", "size", "says"),
    [
        ([[1.0, 2.0]], [[0]], "shape"),
        ([[1.0, np.nan]], [[0, 1]], "finite"),
        ([[1.0, 2.0]], [[1, 2]], "first"),
        ([[1.0, 2.0]], [[0, -2]], ">= 0"),
    ],
)
def test_impossible_problems_are_refused(time, size, says):
    with pytest.raises(PlacementError, match=says):
        choose(np.array(time), np.array(size), 5)
