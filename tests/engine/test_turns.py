"""Two micro-batches in turns: the same tokens, each wait filled, nothing left by failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.engine.aside import SettingAside
from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.local import LocalExperts
from raymoe.engine.paged import halved
from raymoe.engine.sequence import Sequence, start_sequence
from raymoe.engine.turns import in_turns, others_turn, rows_here
from raymoe.errors import ConfigError
from raymoe.experts.shard import ExpertShard
from tests.engine.support import SMALL, Outcome, prompt, request, run
from tests.zoo import tiny_checkpoint


class Noting:
    """Experts in this process that note the order of calls and fail when told to."""

    def __init__(self, experts: LocalExperts) -> None:
        self._experts = experts
        self.calls: list[tuple[str, int, int]] = []
        self.abandoned: list[Any] = []
        self.fail_at: int | None = None  # the combine, counted from now, that raises

    def dispatch(self, layer: int, hidden: Any, expert_ids: Any, gate_weights: Any) -> Any:
        self.calls.append(("dispatch", layer, len(hidden)))
        pending = self._experts.dispatch(layer, hidden, expert_ids, gate_weights)
        return layer, len(hidden), pending

    def combine(self, pending: Any) -> Any:
        layer, rows, sent = pending
        self.calls.append(("combine", layer, rows))
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                raise RuntimeError("a group's answer made no sense")
        return self._experts.combine(sent)

    def abandon(self, pending: Any) -> None:
        self.abandoned.append(pending[:2])


def make(path: Path, least: int, **config: Any) -> tuple[Noting, Engine]:
    spec = read_spec(path)
    shard = ExpertShard(spec, budget_bytes=1 << 30)
    for layer, count in enumerate(spec.experts_of_layer):
        for expert in range(count):
            shard.add(layer, expert, load_expert(spec, layer, expert))
    noting = Noting(LocalExperts(shard))
    experts = SettingAside(noting, patience_s=0.0)
    settings = {**SMALL, "stall_pause_s": 0.0, "microbatch_tokens": least, **config}
    return noting, Engine(load_dense(spec, experts), experts, EngineConfig(**settings))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "qwen2_moe", "deepseek_v2"])
def test_same_tokens_and_each_wait_is_filled(family: str, compiled: bool, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path)
    requests = [request(str(n), prompt(3 + 5 * n, n % 4), max_tokens=4 + n % 3) for n in range(9)]
    _, engine = make(path, 0, compiled=compiled)
    expected = run(engine, requests)
    noting, halving = make(path, 3, compiled=compiled)
    noting.calls.clear()
    assert run(halving, requests) == expected
    doubled = [
        at
        for at, (a, b) in enumerate(zip(noting.calls, noting.calls[1:], strict=False))
        if a[0] == b[0] == "dispatch" and a[1] == b[1]
    ]
    assert len(doubled) >= 8  # two of one layer are out at once
    for at in doubled:
        (_, _, first), (_, _, second) = noting.calls[at : at + 2]
        assert noting.calls[at + 2] == ("combine", noting.calls[at][1], first)
        assert first <= second <= first + 4  # Llama 4 sends a row a pair
    assert halving.pool.used == 0 and not noting.abandoned


def sequence(tokens: int, computed: int = 0) -> Sequence:
    one = start_sequence(request("a", prompt(tokens)), 0)
    one.computed = computed
    return one


def test_a_step_is_halved_at_its_middle_token() -> None:
    long, decoding = sequence(40, 7), sequence(9, 8)
    halves = halved([(decoding, 1), (long, 20), (sequence(6), 5)], 13)
    assert halves is not None
    (a, b), (c, d) = halves
    assert (a[1], b[1], c[1], d[1]) == (1, 12, 8, 5)
    assert (b[0].computed, c[0].computed) == (7, 19) and long.computed == 7
    assert c[0].blocks is long.blocks  # both write into the same


def test_small_steps_and_decode_rows_run_as_one() -> None:
    assert halved([(sequence(40), 25)], 13) is None
    assert halved([(sequence(40), 40)], 0) is None
    assert halved([(sequence(9, 8), 1) for _ in range(30)], 5) is None
    with pytest.raises(ConfigError, match="microbatch_tokens"):
        EngineConfig(microbatch_tokens=-1)


@pytest.mark.parametrize("at", range(4))
def test_a_failure_in_one_ends_the_other_too(at: int, tmp_path: Path) -> None:
    """The step is tried again, request by request, and its tokens are the same."""
    noting, engine = make(tiny_checkpoint("qwen3_moe", tmp_path), 3)
    requests = [request(str(n), prompt(11, n), max_tokens=3) for n in range(3)]
    expected = run(engine, requests)
    noting.fail_at, noting.calls = at, []
    outcomes = {each.request_id: Outcome() for each in requests}
    for each in requests:
        engine.add(each)
    for event in engine.step():
        outcomes[event.request_id].take(event)
    layer = noting.calls[-1][1]
    dispatched = sum(call[0] == "dispatch" and call[1] >= layer for call in noting.calls)
    combined = sum(call[0] == "combine" and call[1] >= layer for call in noting.calls)
    assert dispatched - combined == len(noting.abandoned)
    noting.fail_at = None
    while engine.has_work:
        for event in engine.step():
            outcomes[event.request_id].take(event)
    assert outcomes == expected
    assert engine.pool.used == 0


def test_what_one_raises_is_raised_and_the_other_does_not_run_on() -> None:
    seen: list[str] = []

    def waits() -> torch.Tensor:
        try:
            assert rows_here() == slice(None, 2)
            others_turn()
        finally:
            seen.append("ended")
        seen.append("went on")
        return torch.zeros(1)

    def fails() -> torch.Tensor:
        assert rows_here() == slice(2, None)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_turns(waits, fails, 2)
    assert seen == ["ended"]
    assert rows_here() == slice(None)
    others_turn()  # nobody's


def test_one_may_end_without_waiting() -> None:
    def waits() -> torch.Tensor:
        others_turn()
        others_turn()
        return torch.ones(2)

    first, second = in_turns(waits, lambda: torch.zeros(1), 1)
    assert first.tolist() == [1, 1] and second.tolist() == [0]
    first, second = in_turns(lambda: torch.zeros(1), waits, 1)
    assert first.tolist() == [0] and second.tolist() == [1, 1]
