"""Completing a placement: what is held stays, budgets hold, nothing is placed twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.complete import complete
from placement.types import Fleet, GroupSpec


def fleet(memory: list[int], sizes: list[int], reserve: int = 0) -> Fleet:
    return Fleet(
        groups=tuple(
            GroupSpec(id=f"g{i}", node="n", memory_bytes=m, speed=1.0 + i % 3)
            for i, m in enumerate(memory)
        ),
        expert_bytes=np.array(sizes),
        reserve_bytes=reserve,
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_held_stays_and_budgets_hold(data: st.DataObject) -> None:
    layers, experts, groups = (data.draw(st.integers(1, n)) for n in (4, 6, 4))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=layers, max_size=layers))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    held = rng.random((layers, experts, groups)) < data.draw(st.sampled_from([0.0, 0.2, 0.6]))
    used = np.einsum("leg,l->g", held.astype(int), np.array(sizes))
    spare = data.draw(st.lists(st.integers(0, 20), min_size=groups, max_size=groups))
    made = fleet([int(u) + s for u, s in zip(used, spare, strict=True)], sizes)
    placed = complete(made, held)
    assert (placed.resident & held == held).all()
    now = np.einsum("leg,l->g", placed.resident.astype(int), np.array(sizes))
    assert (now <= made.budget_bytes).all()
    added = placed.resident & ~held
    assert (added.sum(2) <= 1).all()
    assert not (added.any(2) & held.any(2)).any(), "an expert that is held needs no other replica"
    left_out = ~placed.resident.any(2)
    room = made.budget_bytes - now
    for layer, expert in np.argwhere(left_out):
        assert room.max() < sizes[layer], (layer, expert)


def test_the_reserve_is_for_losing_a_group() -> None:
    held = np.zeros((1, 2, 2), np.bool_)
    held[0, 0, 0] = True
    tight = fleet([20, 20], [10], reserve=10)
    lost = held.copy()
    tight_survivor = Fleet(
        groups=tight.groups[:1], expert_bytes=tight.expert_bytes, reserve_bytes=10
    )
    assert not complete(tight_survivor, lost[:, :, :1]).resident[0, 1].any()
    assert complete(tight_survivor, lost[:, :, :1], use_reserve=True).resident[0, 1].any()


def test_the_heaviest_goes_where_it_is_done_soonest() -> None:
    made = fleet([100, 100], [10])  # speeds 1 and 2
    load = np.array([[1.0, 10.0]])
    resident = complete(made, np.zeros((1, 2, 2), np.bool_), load).resident
    assert resident[0, 1].tolist() == [False, True]
