"""The per-batch split against a brute force, the LP optimum, and its own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from placement.errors import PlacementError
from placement.split import LayerSplit


def prepared(resident, speed=None, alpha=None, gamma=None):
    resident = np.asarray(resident, bool)
    g = resident.shape[1]
    zeros = np.zeros(g)
    return LayerSplit(
        resident,
        np.ones(g) if speed is None else np.asarray(speed, float),
        zeros if alpha is None else np.asarray(alpha, float),
        zeros if gamma is None else np.asarray(gamma, float),
    )


def slowest(parts, speed, alpha=0.0, gamma=0.0):
    return float((alpha + parts.sum(0) / speed + gamma * (parts > 0).sum(0)).max())


def lp_optimum(resident, counts, speed):
    """Slowest group's time when tokens may be cut anywhere."""
    where = np.argwhere(resident)
    cost = np.zeros(len(where) + 1)
    cost[-1] = 1
    equal = np.zeros((len(counts), len(where) + 1))
    upper = np.zeros((resident.shape[1], len(where) + 1))
    for i, (e, g) in enumerate(where):
        equal[e, i] = 1
        upper[g, i] = 1 / speed[g]
    upper[:, -1] = -1
    held = resident.any(1)
    found = linprog(
        cost, A_ub=upper, b_ub=np.zeros(len(speed)), A_eq=equal[held], b_eq=counts[held]
    )
    return found.fun


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_many_replicated_experts_are_levelled_together(gamma):
    """The array form (over 12 replicated experts): same promises, close to the LP."""
    rng = np.random.default_rng(3)
    gaps = []
    for _ in range(30):
        resident = random_layer(rng, 40, 8, 60)
        speed = rng.choice([0.25, 0.5, 1.0], 8)
        counts = rng.multinomial(6000, rng.dirichlet(np.full(40, 0.5)))
        parts = prepared(resident, speed, gamma=np.full(8, gamma)).split(counts)
        assert (parts.sum(1) == counts).all() and (parts >= 0).all()
        assert not parts[~resident].any()
        gaps.append(slowest(parts, speed, gamma=gamma) / lp_optimum(resident, counts, speed) - 1)
    assert np.mean(gaps) < 0.01


def random_layer(rng, experts, groups, extra):
    resident = np.zeros((experts, groups), bool)
    resident[np.arange(experts), rng.integers(groups, size=experts)] = True
    for e in rng.integers(experts, size=extra):
        free = np.flatnonzero(~resident[e])
        if len(free):
            resident[e, rng.choice(free)] = True
    return resident


def test_rows_sum_to_counts_and_only_residents_get_tokens():
    rng = np.random.default_rng(1)
    for _ in range(50):
        resident = random_layer(rng, 12, 5, rng.integers(0, 20))
        counts = rng.integers(0, 9, 12) * rng.integers(0, 2, 12)
        parts = prepared(resident, rng.uniform(0.2, 2, 5)).split(counts)
        assert parts.dtype == np.int64
        assert (parts >= 0).all()
        assert (parts.sum(1) == counts).all()
        assert not parts[~resident].any()


def test_a_layer_without_replicated_active_expert_is_the_lookup():
    resident = np.eye(4, dtype=bool)
    resident[0, 3] = True
    layer = prepared(resident)
    parts = layer.split(np.array([0, 5, 6, 7]))
    assert parts[[1, 2, 3], layer.home[[1, 2, 3]]].tolist() == [5, 6, 7]
    assert parts[0].tolist() == [0, 0, 0, 0]


def test_home_is_minus_one_and_tokens_are_refused_without_a_ready_replica():
    layer = prepared([[1, 0], [0, 0]])
    assert layer.home.tolist() == [0, -1]
    assert layer.split(np.array([3, 0])).tolist() == [[3, 0], [0, 0]]
    with pytest.raises(PlacementError, match=r"\[1\]"):
        layer.split(np.array([1, 1]))


def test_speeds_are_followed():
    parts = prepared([[1, 1]], speed=[3.0, 1.0]).split(np.array([400]))
    assert parts.tolist() == [[300, 100]]


def test_tokens_stay_together_unless_that_lowers_the_slowest_group():
    resident = [[1, 1, 0], [0, 0, 1]]
    layer = prepared(resident, speed=[10.0] * 3, gamma=[1.0] * 3)
    together = layer.split(np.array([50, 90]))  # group 2 is the slowest either way
    assert (together[0] > 0).sum() == 1
    apart = layer.split(np.array([150, 20]))
    assert (apart[0] > 0).sum() == 2


def test_close_to_the_lp_on_random_layers():
    rng = np.random.default_rng(2)
    gaps = []
    for _ in range(60):
        groups = int(rng.integers(2, 9))
        resident = random_layer(rng, 32, groups, int(rng.integers(1, 24)))
        speed = rng.choice([0.25, 0.5, 1.0], groups)
        counts = rng.multinomial(4000, rng.dirichlet(np.full(32, 0.5)))
        parts = prepared(resident, speed).split(counts)
        best = lp_optimum(resident, counts, speed)
        gaps.append(slowest(parts, speed) / best - 1)
    assert np.mean(gaps) < 0.01
    assert min(gaps) > -1e-6  # the oracle is a bound


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_near_the_best_of_all_integer_splits(data):
    """Brute force over every integer split of up to three replicated experts."""
    groups = data.draw(st.integers(2, 3))
    experts = data.draw(st.integers(1, 3))
    masks = [data.draw(st.integers(1, 2**groups - 1)) for _ in range(experts)]
    resident = np.array([[m >> g & 1 for g in range(groups)] for m in masks], bool)
    counts = np.array([data.draw(st.integers(0, 5)) for _ in range(experts)])
    speed = np.array([data.draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(groups)])
    gamma = np.full(groups, data.draw(st.sampled_from([0.0, 0.7])))
    parts = prepared(resident, speed, gamma=gamma).split(counts)
    choices = [
        [
            c
            for c in itertools.product(range(n + 1), repeat=groups)
            if sum(c) == n and not any(x and not r for x, r in zip(c, row, strict=True))
        ]
        for n, row in zip(counts, resident, strict=True)
    ]
    best = min(slowest(np.array(c), speed, gamma=gamma) for c in itertools.product(*choices))
    token = 1 / speed.min() + gamma[0]  # one step at a time may end one token (and one run) off
    assert slowest(parts, speed, gamma=gamma) <= best + token + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 7))
def test_tokens_are_pushed_along_chains_of_groups(seed, groups):
    """Expert g lives on groups g and g + 1 only: levelling has to go through every group."""
    rng = np.random.default_rng(seed)
    resident = np.zeros((2 * groups - 1, groups), bool)
    for g in range(groups):
        resident[g, g] = True
    for g in range(groups - 1):
        resident[groups + g, [g, g + 1]] = True
    counts = np.append(rng.integers(0, 2000, groups), np.full(groups - 1, 500))
    speed = rng.choice([0.5, 1.0], groups)
    parts = prepared(resident, speed).split(counts)
    best = lp_optimum(resident, counts, speed)
    assert slowest(parts, speed) <= best * 1.004 + groups / speed.min()


def test_small_batches_close_experts_rather_than_wait():
    """Few tokens and dear weights: an expert moves as a whole when that ends sooner."""
    rng = np.random.default_rng(5)
    worst = []
    for _ in range(40):
        resident = random_layer(rng, 5, 3, 6)
        counts = rng.integers(0, 4, 5)
        layer = prepared(resident, gamma=np.full(3, 8.0))
        best = min(
            slowest(np.array(c), np.ones(3), gamma=8.0)
            for c in itertools.product(
                *[
                    [
                        c
                        for c in itertools.product(range(n + 1), repeat=3)
                        if sum(c) == n and not any(x and not r for x, r in zip(c, row, strict=True))
                    ]
                    for n, row in zip(counts, resident, strict=True)
                ]
            )
        )
        worst.append(slowest(layer.split(counts), np.ones(3), gamma=8.0) / max(best, 1e-9))
    assert np.mean(worst) < 1.05
