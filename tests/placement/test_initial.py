"""The placement at start, and what impossible fleets answer."""

from __future__ import annotations

import numpy as np
import pytest

from placement.errors import DoesNotFit, PlacementError
from placement.initial import place_at_start
from placement.types import Fleet, GroupSpec
from tests.placement.fleets import fleet


def held(spec, placement):
    return placement.bytes_of_group(spec.expert_bytes)


def test_one_replica_each_within_every_budget():
    spec = fleet(groups=4, layers=3, slots=7)
    placement = place_at_start(spec, experts=8)
    assert (placement.copies() == 1).all()
    assert (held(spec, placement) <= spec.budget_bytes).all()
    assert (placement.resident.sum((0, 1)) == 6).all()  # equal groups, equal parts


def test_memory_for_exactly_one_replica_each():
    spec = fleet(groups=4, layers=3, slots=6)
    placement = place_at_start(spec, np.random.default_rng(0).integers(0, 50, (3, 8)))
    assert (placement.copies() == 1).all()
    assert (held(spec, placement) == spec.budget_bytes).all()


def test_fast_groups_get_more_load_where_memory_allows():
    spec = fleet(groups=2, layers=2, slots=100, speeds=[10.0, 1.0])
    placement = place_at_start(spec, experts=22)
    assert placement.resident.sum((0, 1)).tolist() == [40, 4]


def test_unequal_layers_and_fewer_experts_than_groups():
    spec = fleet(groups=6, layers=2, slots=3, experts_of_layer=(3, 5))
    placement = place_at_start(spec)
    assert placement.copies().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_too_small_a_fleet_says_by_how_many_bytes():
    with pytest.raises(DoesNotFit, match="20 bytes are missing") as caught:
        place_at_start(fleet(groups=2, layers=1, slots=3), experts=8)
    assert caught.value.missing_bytes == 20


def test_too_small_pieces_say_so():
    groups = tuple(GroupSpec(id=f"g{i}", node="n", memory_bytes=15) for i in range(2))
    spec = Fleet(groups=groups, expert_bytes=np.array([10]))
    with pytest.raises(DoesNotFit, match="pieces of 10 bytes"):
        place_at_start(spec, experts=3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"speed": 0.0}, "speed"),
        ({"speed": float("nan")}, "speed"),
        ({"bandwidth_bytes_per_s": -1.0}, "bandwidth"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"gamma_s": -1.0}, "gamma_s"),
        ({"id": ""}, "empty id"),
    ],
)
def test_impossible_groups_are_refused(wrong, says):
    with pytest.raises(PlacementError, match=says):
        GroupSpec(**{"id": "a", "node": "n", "memory_bytes": 1, **wrong})


def test_impossible_fleets_are_refused():
    group = GroupSpec(id="a", node="n", memory_bytes=1)
    one = np.array([1])
    for wrong, says in (
        ({"groups": ()}, "no groups"),
        ({"groups": (group, group)}, "two groups"),
        ({"expert_bytes": np.array([0])}, "positive"),
        ({"expert_bytes": np.array([[1]])}, "one size"),
        ({"survive": "rack"}, "survive"),
        ({"reserve_bytes": -1}, "reserve_bytes"),
        ({"tokens_per_s": 0.0}, "tokens_per_s"),
        ({"experts_of_layer": (1, 2)}, "agree"),
    ):
        with pytest.raises(PlacementError, match=says):
            Fleet(**{"groups": (group,), "expert_bytes": one, **wrong})


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ([[1.0, float("nan")]], "NaN"),
        ([[1.0, -1.0]], "negative"),
        ([1.0, 2.0], "shape"),
        ([[1.0], [1.0]], "layers"),
        ([["a"]], "numbers"),
    ],
)
def test_impossible_loads_are_refused(load, says):
    with pytest.raises(PlacementError, match=says):
        place_at_start(fleet(layers=1), load)
