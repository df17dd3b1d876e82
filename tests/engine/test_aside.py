"""Experts that are away stop the requests that need them, and nobody else."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.engine.aside import SettingAside
from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.local import LocalExperts
from raymoe.errors import ExpertsUnavailable
from raymoe.experts.shard import ExpertShard
from raymoe.requests import GenerationRequest
from tests.engine.support import SMALL, Outcome, finish, prompt, request, run
from tests.zoo import tiny_checkpoint


class Lossy:
    """Experts of which some (layer, expert) are away: found out in `combine`, or said before."""

    def __init__(self, experts: LocalExperts) -> None:
        self._experts = experts
        self.away: set[tuple[int, int]] = set()
        self.asked: set[tuple[int, int]] = set()
        self.refused = 0
        self.says_so = False

    def absent(self, layer: int) -> list[int] | None:
        found = sorted(expert for at, expert in self.away if at == layer)
        return found if self.says_so and found else None

    def dispatch(self, layer: int, hidden: Any, expert_ids: Any, gate_weights: Any) -> Any:
        self.asked |= {(layer, expert) for expert in expert_ids.flatten().tolist()}
        needed = {(layer, expert) for expert in expert_ids.flatten().tolist()} & self.away
        if needed:
            return [ExpertsUnavailable(layer, tuple(expert for _, expert in needed), 0.2)]
        return self._experts.dispatch(layer, hidden, expert_ids, gate_weights)

    def abandon(self, pending: Any) -> None:
        assert isinstance(pending, Tensor | list)

    def combine(self, pending: Any) -> Any:
        if isinstance(pending, list):
            self.refused += 1
            raise pending[0]
        return self._experts.combine(pending)


def make(path: Path, **config: Any) -> tuple[Lossy, Engine]:
    spec = read_spec(path)
    shard = ExpertShard(spec, budget_bytes=1 << 30)
    for layer, count in enumerate(spec.experts_of_layer):
        for expert in range(count):
            shard.add(layer, expert, load_expert(spec, layer, expert))
    lossy = Lossy(LocalExperts(shard))
    experts = SettingAside(lossy, patience_s=0.0)
    settings = {**SMALL, "stall_pause_s": 0.0, **config}
    return lossy, Engine(load_dense(spec, experts), experts, EngineConfig(**settings))


@pytest.fixture(scope="module", params=[0, 3], ids=["whole", "micro-batches"])
def qwen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Lossy, Engine]:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("aside"))
    return make(path, microbatch_tokens=request.param)


def requests_and_needs(
    lossy: Lossy, engine: Engine
) -> tuple[list[GenerationRequest], dict[str, Outcome], dict[tuple[int, int], set[str]]]:
    """Requests, what each gives alone, and who needs each (layer, expert)."""
    requests = [request(str(n), prompt(2 + n // 4, n % 3), max_tokens=2 + n % 4) for n in range(12)]
    alone, needs = {}, defaultdict(set)
    for each in requests:
        lossy.asked = set()
        alone.update(run(engine, [each]))
        for needed in lossy.asked:
            needs[needed].add(each.request_id)
    return requests, alone, needs


def steps(engine: Engine, outcomes: dict[str, Outcome], count: int) -> None:
    for _ in range(count):
        for event in engine.step():
            outcomes[event.request_id].take(event)


@pytest.mark.parametrize("microbatch_tokens", [0, 3])
@pytest.mark.parametrize("says_so", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text"])
def test_who_does_not_need_what_is_away_goes_on(
    family: str, says_so: bool, microbatch_tokens: int, tmp_path: Path
) -> None:
    path = tiny_checkpoint(family, tmp_path)
    lossy, engine = make(path, prefix_cache=False, microbatch_tokens=microbatch_tokens)
    requests, alone, needs = requests_and_needs(lossy, engine)
    lost = min(needs, key=lambda each: abs(len(needs[each]) - 6))
    assert 2 <= len(needs[lost]) <= 10
    lossy.away, lossy.says_so, lossy.refused = {lost}, says_so, 0
    outcomes = {each.request_id: Outcome() for each in requests}
    for each in requests:
        engine.add(each)
    steps(engine, outcomes, 30)
    for name, one in outcomes.items():
        assert (one.finish is None) == (name in needs[lost])
        assert one.tokens == alone[name].tokens[: len(one.tokens)]
    assert (lossy.refused == 0) == says_so
    lossy.away = set()
    finish(engine, outcomes)
    assert outcomes == alone


def test_experts_that_come_and_go(qwen: tuple[Lossy, Engine]) -> None:
    """With blocks shared: what a request set aside has written is shown to nobody."""
    lossy, engine = qwen
    requests, alone, needs = requests_and_needs(lossy, engine)
    draw = random.Random(3)
    lossy.says_so = False
    outcomes = {each.request_id: Outcome() for each in requests}
    coming = list(requests)
    for _ in range(2000):
        if coming and draw.random() < 0.3:
            engine.add(coming.pop())
        lossy.away = set(draw.sample(sorted(needs), 3)) if draw.random() < 0.6 else set()
        steps(engine, outcomes, 1)
        if not coming and not engine.has_work:
            break
    lossy.away = set()
    assert outcomes == alone
    assert engine.pool.used == 0


@pytest.mark.parametrize("says_so", [False, True])
def test_a_prompt_cut_in_two_is_set_aside_beside_others(says_so: bool, tmp_path: Path) -> None:
    """Both micro-batches have rows of it, and ask before either knows: no step is lost by that."""
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    lossy, engine = make(path, prefix_cache=False, microbatch_tokens=3)
    decoding, long = request("0", prompt(2, 9), max_tokens=6), request("long", prompt(30, 7))
    alone, needs = {}, []
    for each in (decoding, long):
        lossy.asked = set()
        alone.update(run(engine, [each]))
        needs.append(lossy.asked)
    asked_twice = 0
    for lost in sorted(needs[1] - needs[0]):
        outcomes = {"0": Outcome(), "long": Outcome()}
        engine.add(decoding)
        steps(engine, outcomes, 2)
        lossy.away, lossy.says_so, lossy.refused = {lost}, says_so, 0
        engine.add(long)
        for step in range(3):
            steps(engine, outcomes, 1)
            assert len(outcomes["0"].tokens) == 3 + step
            asked_twice += step == 0 and lossy.refused == 2
        assert outcomes["long"].finish is None
        lossy.away = set()
        finish(engine, outcomes)
        assert outcomes == alone
    assert asked_twice >= 3 or says_so
    assert engine.pool.used == 0


def test_when_nobody_can_go_on_requests_can_still_be_cancelled_and_end(
    qwen: tuple[Lossy, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy, engine = qwen
    now_s = [100.0]
    slept: list[float] = []
    monkeypatch.setattr("raymoe.engine.engine.monotonic", lambda: now_s[0])
    monkeypatch.setattr("raymoe.engine.engine.sleep", slept.append)
    lossy.says_so = True
    lossy.away = {(0, expert) for expert in range(8)}
    for name in "ab":
        engine.add(request(name, prompt(9), max_tokens=6))
    assert engine.step() == []
    tried = lossy.asked = set()
    assert engine.step() == [] and engine.step() == []
    assert lossy.asked == tried and slept  # it does not spin
    engine.cancel("a")
    (event,) = engine.step()
    assert (event.request_id, event.finish) == ("a", "cancelled")
    now_s[0] += engine.config.stall_end_s
    (event,) = engine.step()
    assert (event.request_id, event.error_kind) == ("b", "unavailable")
    assert event.error is not None and "layer 0" in event.error
    assert not engine.has_work and engine.pool.used == 0
    lossy.away = set()


def test_a_layer_waits_where_nobody_can_be_set_aside() -> None:
    lossy = Lossy(LocalExperts(None))  # type: ignore[arg-type]
    lossy.away = {(0, 1)}
    hidden, ids = torch.zeros(1, 4), torch.tensor([[1]])
    for patience_s, tries in ((0.0, 1), (0.02, 2)):
        lossy.refused = 0
        experts = SettingAside(lossy, patience_s=patience_s)
        with pytest.raises(ExpertsUnavailable):
            experts.combine(experts.dispatch(0, hidden, ids, torch.ones(1, 1)))
        assert lossy.refused >= tries
