"""The group actor's class without Ray: replicas come from the checkpoint or from another group."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.expert_group import ExpertGroup
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import load_config
from raymoe.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return read_spec(folder)


@pytest.fixture
def settings(tmp_path: Path, model: ModelSpec) -> dict[str, Any]:
    secret = tmp_path / "secret"
    secret.write_text("a secret of some length")
    return load_config(None, {"model": model.path, "secret_file": str(secret)}).model_dump(
        mode="json"
    )


@pytest.fixture
def groups(model: ModelSpec, settings: dict[str, Any]) -> Iterator[list[ExpertGroup]]:
    made = [
        ExpertGroup(
            group_id=f"g{n}",
            incarnation=1,
            config=settings,
            spec_json=model.to_json(),
            memory_bytes=6 * max(model.expert_bytes),
            device="cpu",
            slowdown=1.0,
        )
        for n in range(2)
    ]
    yield made
    for group in made:
        group.close()


def load(group: ExpertGroup, pairs: list[tuple[int, int]]) -> int:
    """From the checkpoint; the bytes then resident."""
    answer = group.bring(pairs, None, None, 1)
    assert answer["failed"] == []
    return int(answer["resident_bytes"])


def test_a_later_life_is_not_measured_again(model: ModelSpec, settings: dict[str, Any]) -> None:
    group = ExpertGroup(
        group_id="g0",
        incarnation=2,
        config=settings,
        spec_json=model.to_json(),
        memory_bytes=6 * max(model.expert_bytes),
        device="cpu",
        slowdown=1.0,
        speed=123.0,
    )
    assert group.describe(1)["speed"] == 123.0
    group.close()


def test_load_copy_drop(groups: list[ExpertGroup], model: ModelSpec) -> None:
    first, second = groups
    size = model.expert_bytes[0]
    assert load(first, [(0, 0), (0, 3), (1, 2)]) == 3 * size
    assert load(first, [(0, 0)]) == 3 * size, "loading again changes nothing"
    endpoint = first.describe(1)["endpoint"]
    copied = second.bring([(0, 3), (0, 1), (1, 2)], endpoint, None, 1)
    assert copied["resident_bytes"] == 2 * size, "what the source lacks does not stop the rest"
    assert [tuple(f[:2]) for f in copied["failed"]] == [(0, 1)]
    assert "not here" in copied["failed"][0][2]
    resident = np.array(second.report()["resident"])
    assert resident.tolist() == [[False, False, False, True], [False, False, True, False]]
    assert first.drop([(0, 0)], 1)["resident_bytes"] == 2 * size
    assert first.drop([(0, 0)], 1)["resident_bytes"] == 2 * size, "again changes nothing"


def test_a_copy_that_nobody_waits_for_leaves_the_core_to_requests(
    groups: list[ExpertGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    used_s = 0.02

    def busy(layer: int, expert: int) -> None:
        until = time.thread_time() + used_s
        while time.thread_time() < until:
            pass

    monkeypatch.setattr(groups[0]._runtime, "add_from_checkpoint", busy)
    started = time.monotonic()
    groups[0].bring([(0, 0), (0, 1), (0, 2)], None, 1e12, 1)
    assert time.monotonic() - started >= 0.99 * 3 * 4 * used_s, "three parts of four at rest"


def test_a_source_that_is_gone_is_given_up_at_once(groups: list[ExpertGroup]) -> None:
    first, second = groups
    load(first, [(0, 0), (0, 3)])
    endpoint = first.describe(1)["endpoint"]
    first.close()
    answer = second.bring([(0, 0), (0, 3)], endpoint, None, 1)
    assert [tuple(f[:2]) for f in answer["failed"]] == [(0, 0), (0, 3)]
    assert answer["resident_bytes"] == 0


def test_an_older_controller_is_not_obeyed(groups: list[ExpertGroup]) -> None:
    group = groups[0]
    load(group, [(0, 0)])
    assert group.ping(2)["samples"] == []
    for call in (lambda: group.ping(1), lambda: group.drop([(0, 0)], 1), lambda: load(group, [])):
        with pytest.raises(ConfigError, match="term 2 is in charge"):
            call()
    assert np.array(group.report()["resident"]).sum() == 1


def test_only_the_newest_call_of_hold_waits(groups: list[ExpertGroup]) -> None:
    group, answers = groups[0], []
    threads = [
        threading.Thread(target=lambda term=n: answers.append(group.hold(term)), daemon=True)
        for n in range(1, 11)
    ]
    for n, thread in enumerate(threads):  # each controller of a group's life makes one
        thread.start()
        if n:
            threads[n - 1].join(60)
            assert not threads[n - 1].is_alive()
    assert answers == [False] * 9
    group.close()
    threads[-1].join(60)
    assert answers[-1] is True


class InThread:
    """Work that is under way; `answer` waits for what it returns."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._answers: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(work()), daemon=True)
        self._thread.start()

    def ended(self, wait_s: float) -> bool:
        self._thread.join(wait_s)
        return bool(self._answers)

    def answer(self) -> Any:
        assert self.ended(60), "it goes on for ever"
        return self._answers[0]


@pytest.mark.parametrize("from_peer", [False, True])
def test_a_load_that_nobody_waits_for_makes_way(groups: list[ExpertGroup], from_peer: bool) -> None:
    group, other = groups
    every = [(0, 0), (0, 1), (1, 2)]
    load(other, every)
    source = other.describe(1)["endpoint"] if from_peer else None
    under_way = InThread(lambda: group.bring(every, source, 1.0, 1))  # days
    assert not under_way.ended(0.3)
    while not under_way.ended(0.01):
        group.make_way(1)
    told = under_way.answer()
    assert told["failed"] == [] and len(told["left"]) >= 2, "of its first replica, or after it"
    left = told["left"]
    assert np.array(group.describe(1)["resident"]).sum() == 3 - len(left)
    assert group.bring(left, source, None, 1)["left"] == []
    assert np.array(group.describe(1)["resident"]).sum() == 3


def test_a_newer_controller_does_not_wait_for_a_load_of_the_older(
    groups: list[ExpertGroup],
) -> None:
    group = groups[0]
    old = InThread(lambda: group.bring([(0, 0), (0, 1)], None, 1.0, 1))
    while not group._bringing.locked():
        time.sleep(0.01)
    group.describe(2)
    assert group.bring([(1, 1)], None, None, 2)["failed"] == []
    assert len(old.answer()["left"] + old.answer()["failed"]) >= 1


def test_a_load_that_hangs_is_told_of_and_keeps_no_second_thread(
    groups: list[ExpertGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    group, gate = groups[0], threading.Event()
    add = group._runtime.add_from_checkpoint

    def hang(layer: int, expert: int) -> None:
        assert gate.wait(60)
        add(layer, expert)

    monkeypatch.setattr(group._runtime, "add_from_checkpoint", hang)
    monkeypatch.setattr("actors.expert_group._TURN_S", 0.05)
    assert group.ping(1)["reading_s"] == 0.0
    under_way = InThread(lambda: load(group, [(0, 0)]))
    while not group.ping(1)["reading_s"] > 0.05:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="does not answer"):
        load(group, [(0, 1)])
    gate.set()
    assert under_way.answer() > 0 and group.ping(1)["reading_s"] == 0.0
    load(group, [(0, 1)])


def test_a_load_and_a_drop_end_when_a_newer_controller_comes(
    groups: list[ExpertGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = groups[0]
    load(group, [(1, 0), (1, 1)])
    there = []

    def newer_after(work: Any, term: int) -> Any:
        def done(layer: int, expert: int) -> None:
            work(layer, expert)
            there.append(group.ping(term)["resident"])

        return done

    runtime = group._runtime
    monkeypatch.setattr(runtime, "add_from_checkpoint", newer_after(runtime.add_from_checkpoint, 2))
    failed = group.bring([(0, 0), (0, 1), (0, 2)], None, None, 1)["failed"]
    assert [tuple(f[:2]) for f in failed] == [(0, 1), (0, 2)] and "term 2" in failed[0][2]
    resident = np.array(group.describe(2)["resident"])
    assert resident.sum() == 3 and (np.packbits(resident) == there[0]).all()
    drop = runtime.drop

    def dropped(layer: int, expert: int) -> None:
        drop(layer, expert)
        group._term = 3

    monkeypatch.setattr(runtime, "drop", dropped)
    with pytest.raises(ConfigError, match="term 3"):
        group.drop([(1, 0), (1, 1)], 2)
    assert np.array(group.describe(3)["resident"])[1].tolist() == [False, True, False, False]


def test_a_group_can_be_slowed_at_run_time(groups: list[ExpertGroup]) -> None:
    groups[0].set_slowdown(3.0)
    with pytest.raises(ConfigError, match="1 or more"):
        groups[0].set_slowdown(0.5)


def test_over_the_budget_says_by_how_much(groups: list[ExpertGroup]) -> None:
    every = [(layer, expert) for layer in range(2) for expert in range(4)]
    failed = groups[0].bring(every, None, None, 1)["failed"]
    assert [tuple(f[:2]) for f in failed] == every[6:] and "bytes" in failed[0][2]
    assert np.array(groups[0].report()["resident"]).sum() == 6, "what fits stays"


def test_describe_measures_the_speed(groups: list[ExpertGroup]) -> None:
    told = groups[0].describe(1)
    assert told["speed"] > 0
    assert told["resident_bytes"] == 0
    assert told["endpoint"]["incarnation"] == 1


def test_a_device_that_is_not_there_is_refused(model: ModelSpec, settings: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match="cuda"):
        ExpertGroup(
            group_id="g0",
            incarnation=1,
            config=settings,
            spec_json=model.to_json(),
            memory_bytes=1,
            device="cuda",
            slowdown=1.0,
        )
