"""Tables: order, wire form, shares over ready replicas."""

from __future__ import annotations

import json

import msgpack
import numpy as np
import pytest

from placement.errors import PlacementError
from placement.split import TableSplit
from placement.table import Table, make_table
from placement.types import Placement
from tests.placement.fleets import fleet


def placed():
    resident = np.zeros((2, 3, 4), bool)
    resident[:, :, 0] = True
    resident[0, 0, 2] = resident[0, 0, 3] = True
    share = resident / resident.sum(2, keepdims=True)
    share[0, 0] = [0.5, 0, 0.2, 0.3]
    return Placement(resident=resident, share=share)


def test_round_trip_through_json_and_msgpack():
    table = make_table(fleet(layers=2), placed(), term=3, epoch=7)
    for pack, unpack in ((json.dumps, json.loads), (msgpack.packb, msgpack.unpackb)):
        again = Table.from_dict(unpack(pack(table.to_dict())))
        assert again.order == (3, 7)
        assert again.group_ids == table.group_ids
        for name in ("resident", "share", "speed", "alpha_s", "gamma_s"):
            np.testing.assert_array_equal(getattr(again, name), getattr(table, name))


def test_a_broken_dict_is_refused():
    data = make_table(fleet(layers=2), placed(), term=1, epoch=1).to_dict()
    for name, value in (("shape", [2, 3]), ("resident", "@"), ("share", "AAAA"), ("speed", [1.0])):
        with pytest.raises(PlacementError):
            Table.from_dict({**data, name: value})
    with pytest.raises(PlacementError):
        Table.from_dict({})


def test_a_higher_term_wins_over_any_epoch():
    old = make_table(fleet(layers=2), placed(), term=1, epoch=900)
    new = make_table(fleet(layers=2), placed(), term=2, epoch=1)
    assert old < new and not new < old


def test_shares_of_replicas_still_loading_go_to_the_ready_ones():
    ready = placed().resident.copy()
    ready[0, 0, 0] = False
    table = make_table(fleet(layers=2), placed(), term=1, epoch=1, ready=ready)
    np.testing.assert_allclose(table.share[0, 0], [0, 0, 0.4, 0.6])


def test_an_expert_whose_new_home_loads_is_served_by_the_old_one():
    ready = np.zeros((2, 3, 4), bool)
    ready[:, :, 1] = True
    table = make_table(fleet(layers=2), placed(), term=1, epoch=1, ready=ready)
    assert (table.resident == ready).all()
    np.testing.assert_allclose(table.share.sum(2), 1)
    assert (TableSplit(table).home == 1).all()


def test_no_ready_replica_means_no_share():
    ready = placed().resident.copy()
    ready[1, 2] = False
    table = make_table(fleet(layers=2), placed(), term=1, epoch=1, ready=ready)
    assert not table.share[1, 2].any()
    assert TableSplit(table).home[1, 2] == -1
