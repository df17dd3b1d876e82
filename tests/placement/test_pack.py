"""Replica counts, packing and pouring against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from placement.pack import pack, replica_counts
from placement.pour import even_shares, host_lists, pour


def test_extra_replicas_go_to_the_largest_load_per_copy():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 1.2, (20, 9))
    extra = rng.integers(0, 12, 20)
    found = replica_counts(load, extra, np.ones_like(load, bool), 5)
    for row, many in enumerate(extra):
        copies = np.ones(9, int)
        for _ in range(many):
            copies[np.where(copies < 5, load[row] / copies, -1).argmax()] += 1
        assert found[row].tolist() == copies.tolist()


def test_equal_loads_are_given_replicas_from_the_smallest_id():
    found = replica_counts(np.ones((1, 5)), np.array([2]), np.ones((1, 5), bool), 4)
    assert found.tolist() == [[2, 2, 1, 1, 1]]


def test_packing_respects_caps_and_never_doubles():
    rng = np.random.default_rng(1)
    load = rng.lognormal(0, 1, (30, 12))
    copies = replica_counts(load, rng.integers(0, 8, 30), np.ones_like(load, bool), 4)
    caps = np.full((30, 4), 5)
    resident = pack(load, copies, caps, np.array([1.0, 1.0, 0.5, 0.25]))
    assert (resident.sum(1) <= caps).all()
    assert (resident.sum(2) >= 1).all()
    assert (resident.sum(2) <= copies).all()


def test_packing_is_near_the_best_of_all_packings():
    """Brute force over every assignment of 6 experts to 3 unequal groups: LPT's known bound."""
    rng = np.random.default_rng(2)
    rate = np.array([2.0, 1.0, 0.5])
    for _ in range(10):
        load = rng.lognormal(0, 1, (1, 6))
        resident = pack(load, np.ones((1, 6), int), np.full((1, 3), 6), rate)
        level = (np.einsum("leg,le->g", resident, load) / rate).max()
        every = np.array(list(itertools.product(range(3), repeat=6)))
        held = np.stack([(load[0] * (every == g)).sum(1) for g in range(3)], 1) / rate
        assert level <= held.max(1).min() * 5 / 3


def test_pouring_comes_close_to_the_lp():
    rng = np.random.default_rng(3)
    gaps = []
    for _ in range(25):
        groups, experts = int(rng.integers(2, 7)), 14
        resident = np.zeros((1, experts, groups), bool)
        resident[0, np.arange(experts), rng.integers(groups, size=experts)] = True
        resident |= rng.uniform(size=resident.shape) < 0.15
        load = rng.lognormal(0, 1, (1, 1, experts))
        rate = rng.choice([0.25, 0.5, 1.0], groups)
        hosts, copies = host_lists(resident)
        poured = pour(load, hosts, copies, rate, np.zeros(groups), sweeps=6)
        np.testing.assert_allclose(poured.pairs.sum(), load.sum())
        gaps.append(poured.level.max() / lp(resident[0], load[0, 0], rate) - 1)
    assert np.mean(gaps) < 0.01
    assert min(gaps) > -1e-6


def lp(resident, load, rate):
    where = np.argwhere(resident)
    equal = np.zeros((len(load), len(where) + 1))
    upper = np.zeros((len(rate), len(where) + 1))
    for i, (e, g) in enumerate(where):
        equal[e, i], upper[g, i] = 1, 1 / rate[g]
    upper[:, -1] = -1
    cost = np.append(np.zeros(len(where)), 1.0)
    return linprog(cost, A_ub=upper, b_ub=np.zeros(len(rate)), A_eq=equal, b_eq=load).fun


def test_shares_sum_to_one_on_residents_only():
    rng = np.random.default_rng(4)
    resident = rng.uniform(size=(4, 10, 5)) < 0.4
    resident[:, :, 0] |= ~resident.any(2)
    load = rng.lognormal(0, 1, (4, 10))
    load[1] = 0
    share = even_shares(load, resident, np.array([1, 1, 0.5, 0.5, 0.1]), np.zeros(5))
    np.testing.assert_allclose(share.sum(2), 1)
    assert not share[~resident].any()
    assert (share >= 0).all()


@pytest.mark.parametrize("base", [0.0, 3.0])
def test_work_already_there_is_poured_around(base):
    hosts, copies = host_lists(np.ones((1, 1, 2), bool))
    poured = pour(np.array([[[9.0]]]), hosts, copies, np.ones(2), np.array([base, 0.0]))
    np.testing.assert_allclose(poured.level[0, 0], [(9 + base) / 2] * 2)
