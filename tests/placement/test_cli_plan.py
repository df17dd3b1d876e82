"""`raymoe plan` and `raymoe simulate` from files, as an operator calls them."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from placement.errors import PlacementError
from raymoe.cli_plan import add_plan_parser
from raymoe.cli_simulate import add_simulate_parser
from raymoe.plan_files import parse_bytes

FLEET = """
expert_bytes: 10
tokens_per_s: 1e5
groups:
  - {id: a, node: n0, memory_bytes: 120, speed: 1.0, bandwidth_bytes_per_s: 1e6}
  - {id: b, node: n0, memory_bytes: 120, speed: 1.0, bandwidth_bytes_per_s: 1e6}
  - {id: c, node: n1, memory_bytes: 120, speed: 0.25, bandwidth_bytes_per_s: 1e6}
"""


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1, (2, 12))
    counts = rng.poisson(weight * 200, (5, 2, 12))
    np.savez(tmp_path / "counts.npz", counts=counts)
    (tmp_path / "fleet.yaml").write_text(FLEET)
    return tmp_path


def call(*words):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    add_plan_parser(commands)
    add_simulate_parser(commands)
    args = parser.parse_args([str(w) for w in words])
    return args.run(args)


def inputs(folder):
    return "--load", folder / "counts.npz", "--fleet", folder / "fleet.yaml"


def test_a_plan_is_written_in_the_fleets_order(files, capsys):
    out = files / "plan.npz"
    assert call("plan", *inputs(files), "--out", out) == 0
    with np.load(out) as data:
        resident, share = data["resident"], data["share"]
    assert resident.shape == share.shape == (2, 12, 3) and resident.dtype == bool
    np.testing.assert_allclose(share.sum(2), 1)
    assert (resident.sum((0, 1)) <= 12).all() and resident.any(2).all()
    assert "full plan" in capsys.readouterr().out


def test_delta_from_a_current_placement_with_reasons_and_a_picture(files, capsys):
    start = np.zeros((2, 12, 3), bool)
    for e in range(12):
        start[:, e, e % 3] = True
    np.savez(files / "now.npz", resident=start, share=start * 1.0)
    more = ("--current", files / "now.npz", "--mode", "delta", "--explain")
    picture = files / "plan.png"
    assert call("plan", *inputs(files), *more, "--plot", picture, "--out", files / "o.npz") == 0
    said = capsys.readouterr().out
    assert "delta plan" in said and "gains" in said and "--window-s is not given" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert call("plan", *inputs(files), *more, "--json", "--interval-bytes", "0") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "keep" and answer["loads"] == 0


def test_the_budget_limits_extra_replicas(files, capsys):
    assert call("plan", *inputs(files), "--json", "--budget", "20B") == 0
    assert json.loads(capsys.readouterr().out)["extra_replicas"] <= 2


def test_a_smaller_budget_takes_replicas_away(files, capsys):
    (files / "fleet.yaml").write_text(FLEET.replace("120", "240"))
    np.savez(files / "now.npz", resident=np.ones((2, 12, 3), bool), share=np.ones((2, 12, 3)) / 3)
    words = ("--current", files / "now.npz", "--mode", "delta", "--explain", "--json")
    assert call("plan", *inputs(files), *words, "--budget", "40B") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "delta" and answer["extra_replicas"] <= 4 and answer["drops"] >= 44
    assert any("more than the budget" in line for line in answer["reasons"])


def test_a_plan_from_scratch_is_explained_by_layer(files, capsys):
    assert call("plan", *inputs(files), "--mode", "full", "--explain") == 0
    said = capsys.readouterr().out
    assert all(f"layer {layer}: " in said for layer in range(2)) and "beyond one of each" in said


def test_simulate_prints_and_answers_json(files, capsys):
    more = ("--event", "2:slow:a:0.5", "--event", "3:lose:c", "--static")
    assert call("simulate", *inputs(files), *more) == 0
    said = capsys.readouterr().out
    assert "live: time-balancedness" in said and "static:" in said and "slow a" in said
    assert call("simulate", *inputs(files), "--json") == 0
    assert json.loads(capsys.readouterr().out)["live"]["windows"] == 5


@pytest.mark.parametrize(
    ("fleet", "says"),
    [
        (FLEET.replace("speed: 0.25", "sped: 0.25"), "unknown fields sped"),
        (FLEET.replace("expert_bytes", "expert_size"), "unknown fields expert_size"),
        (FLEET.replace("id: b", "id: a"), "two groups have the id 'a'"),
        (FLEET.replace("speed: 0.25", "speed: 0"), "group c: speed is 0"),
        (FLEET.replace("memory_bytes: 120", "memory_bytes: 60"), "60 bytes are missing"),
        (FLEET.replace("expert_bytes: 10", "expert_bytes: [10, 10, 10]"), "lists 3 layers"),
        (FLEET.replace("expert_bytes: 10", "expert_bytes: big"), "not a number"),
        (FLEET.replace("memory_bytes: 120", "memory_bytes: 12.5"), "whole bytes"),
        ("expert_bytes: 10", "lacks `groups`"),
        ("expert_bytes: 10\ngroups: []", "no groups"),
        ("expert_bytes: 10\ngroups: [{id: a}]", "lacks `memory_bytes`"),
        (": : :", "not YAML"),
        ("- 1", "mapping"),
    ],
)
def test_impossible_fleets_end_with_a_sentence(files, fleet, says):
    (files / "fleet.yaml").write_text(fleet)
    with pytest.raises(PlacementError, match=says):
        call("plan", *inputs(files))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"count": np.ones((1, 2, 3))}, "must hold `counts`"),
        ({"counts": np.ones((2, 3))}, "windows, layers, experts"),
        ({"counts": np.full((1, 2, 12), np.nan)}, "NaN"),
        ({"counts": np.full((1, 2, 12), -1)}, "negative"),
        ({"counts": np.full((1, 2, 12), "x")}, "numbers"),
        ({"counts": np.full((1, 2, 12), 1j)}, "complex"),
        ({"counts": np.array([None])}, "plain arrays"),
    ],
)
def test_impossible_counts_end_with_a_sentence(files, arrays, says):
    np.savez(files / "counts.npz", **arrays)
    with pytest.raises(PlacementError, match=says):
        call("plan", *inputs(files))


def test_missing_and_broken_files_end_with_a_sentence(files):
    with pytest.raises(PlacementError, match="does not exist"):
        call("plan", "--load", files / "no.npz", "--fleet", files / "fleet.yaml")
    with pytest.raises(PlacementError, match="cannot read"):
        call("plan", "--load", files / "counts.npz", "--fleet", files / "no.yaml")
    np.save(files / "one.npy", np.ones((1, 2, 12)))
    with pytest.raises(PlacementError, match=r"one array; give an \.npz"):
        call("plan", "--load", files / "one.npy", "--fleet", files / "fleet.yaml")
    (files / "counts.npz").write_text("hello")
    with pytest.raises(PlacementError, match=r"not an \.npz"):
        call("plan", *inputs(files))


def test_a_current_placement_of_another_fleet_is_refused(files):
    np.savez(files / "now.npz", resident=np.ones((2, 12, 2), bool), share=np.ones((2, 12, 2)))
    with pytest.raises(PlacementError, match="shape"):
        call("plan", *inputs(files), "--current", files / "now.npz")


def test_a_current_placement_with_shares_that_are_none_is_refused(files):
    start = np.ones((2, 12, 3))
    np.savez(files / "now.npz", resident=start > 0, share=start * np.nan)
    with pytest.raises(PlacementError, match="share in"):
        call("plan", *inputs(files), "--current", files / "now.npz")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("12", "must be a list"),
        ("[12, x]", "not a number"),
        ("[12, 0]", "at least one expert"),
        ("[12]", "make them agree"),
        ("[12, 11]", "expert 11 of layer 1"),
    ],
)
def test_experts_of_layer_must_agree_with_the_load(files, words, says):
    path = files / "fleet.yaml"
    path.write_text(path.read_text() + f"experts_of_layer: {words}\n")
    for command in ("plan", "simulate"):
        with pytest.raises(PlacementError, match=says):
            call(command, *inputs(files))


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--budget", "inf"),
        ("plan", "--horizon-s", "inf"),
        ("plan", "--move-cost", "inf"),
        ("plan", "--margin", "nan"),
        ("plan", "--window-s", "inf"),
        ("simulate", "--autoscale", "--patience-s", "nan"),
    ],
)
def test_impossible_numbers_are_refused(files, words):
    with pytest.raises(PlacementError):
        call(words[0], *inputs(files), *words[1:])


IMPOSSIBLE = ("x", "1:slow", "1:slow:zz", "1:slow:a:0", "1:slow:a:inf", "1:explode:a", "99:lose:a")


@pytest.mark.parametrize("event", [*IMPOSSIBLE, "1:lose:a:7", "1:slow:a:0.5:3"])
def test_impossible_events_are_refused(files, event):
    with pytest.raises(PlacementError):
        call("simulate", *inputs(files), "--event", event)


def test_bytes_are_read_as_people_write_them():
    assert [parse_bytes(t) for t in ("1500", "2GiB", "300 MB", "1.5kB")] == [
        1500,
        2 << 30,
        300_000_000,
        1500,
    ]
    for wrong in ("", "big", "5 apples"):
        with pytest.raises(PlacementError):
            parse_bytes(wrong)


def test_a_load_of_nothing_is_played_and_is_level(files, capsys):
    np.savez(files / "counts.npz", counts=np.zeros((3, 2, 12), np.int64))
    assert call("simulate", *inputs(files), "--json") == 0
    data = json.loads(capsys.readouterr().out)["live"]
    assert data["balancedness"] == data["worst_window"] == 1 and data["loaded_bytes"] == 0


def test_autoscaling_is_compared_with_a_fleet_for_the_peak(files, capsys):
    words = ("--window-s", "0.05", "--autoscale", "--start-s", "0.01")
    assert call("simulate", *inputs(files), *words) == 0
    out = capsys.readouterr().out
    assert "x the peak fleet's group-seconds" in out
    assert call("simulate", *inputs(files), *words, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert {"live", "elastic", "peak"} <= set(data)
    assert data["peak"]["group_s"] > 0 and len(data["elastic"]["groups"]) == 5


def test_kinds_come_from_the_file(files, capsys):
    text = (files / "fleet.yaml").read_text()
    path = files / "fleet.yaml"
    path.write_text(text + "kinds: [{name: big, memory_bytes: 240, speed: 2, price: 3}]\n")
    args = (*inputs(files), "--window-s", "0.02", "--autoscale")
    assert call("simulate", *args) == 0
    assert "x big" in capsys.readouterr().out
    for bad, what in (("[]", "at least one kind"), ("[{name: a}]", "lacks"), ("[{x: 1}]", "x")):
        path.write_text(text + f"kinds: {bad}\n")
        with pytest.raises(PlacementError, match=what):
            call("simulate", *args)
