from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from raymoe.engine import runnable
from raymoe.engine.cached import CachedModel
from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.paged import PagedModel
from raymoe.engine.probe import silenced
from tests.engine.support import SMALL, Outcome, prompt, request, run, stock_engine, stock_model


class Doubling:
    """Experts that double their input."""

    def dispatch(self, layer: int, hidden: Any, expert_ids: Any, gate_weights: Any) -> Any:
        return hidden * 2

    def combine(self, pending: Any) -> Any:
        return pending


def test_silence_is_for_one_thread_only() -> None:
    experts = Doubling()
    x = torch.ones(1, 2)
    heard: list[float] = []

    def other() -> None:
        heard.append(float(experts.combine(experts.dispatch(0, x, None, None)).sum()))

    with silenced(experts):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(experts.combine(experts.dispatch(0, x, None, None)), x)
    assert heard == [4.0]
    assert torch.equal(experts.combine(experts.dispatch(0, x, None, None)), x * 2)


@pytest.mark.parametrize(
    ("family", "kind", "token_bytes"),
    [
        ("qwen3_moe", PagedModel, 3 * 2 * (16 + 16) * 4),
        ("deepseek_v3", PagedModel, 3 * 4 * (32 + 32) * 4),  # values padded from 16 to 32
        ("qwen3_next", CachedModel, 1 * 2 * (16 + 16) * 4),  # one layer of four is attention
    ],
)
def test_what_a_token_costs_is_measured(family: str, kind: type, token_bytes: int) -> None:
    model = stock_engine(family)._model
    assert isinstance(model, kind)
    assert model.token_bytes == token_bytes


def test_a_family_whose_name_tells_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for family in ("jamba", "minimax", "lfm2_moe"):
        monkeypatch.setattr(runnable, "attention_kind", lambda model: "softmax")
        assert not stock_engine(family).packed
        assert family in caplog.text


def test_states_besides_keys_and_values_count_as_blocks() -> None:
    engine = stock_engine("qwen3_next")
    assert engine.pool.blocks_of(1) > 1
    assert engine.pool.capacity_tokens < (engine.pool.blocks - 1) * engine.pool.block_tokens


def test_cached_requests_join_leave_and_are_preempted() -> None:
    requests = [request(str(n), prompt(5 + 6 * n, n), max_tokens=12) for n in range(4)]
    plenty = stock_engine("qwen3_next")
    expected = {each.request_id: run(plenty, [each])[each.request_id].tokens for each in requests}
    scarce = stock_engine("qwen3_next", kv_bytes=46 * 1024)
    found = run(scarce, requests)
    assert scarce.preemptions > 0
    assert {name: one.tokens for name, one in found.items()} == expected


def test_a_broken_step_of_a_cached_model_begins_its_requests_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = stock_model("qwen3_next")
    engine = Engine(model, None, EngineConfig(**SMALL))
    requests = [request(str(n), prompt(5 + 6 * n, n), max_tokens=5) for n in range(2)]
    expected = run(engine, requests)
    outcomes = {str(n): Outcome() for n in range(2)}
    for each in requests:
        engine.add(each)
    layer, calls = model.model.layers[2], 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 6):  # each time the second of both, after the first has gone through
            raise RuntimeError("in the middle of a forward")

    hook = layer.register_forward_pre_hook(fail)
    while engine.has_work:
        for event in engine.step():
            outcomes[event.request_id].take(event)
    hook.remove()
    assert caplog.text.count("a step failed") == 2
    assert outcomes == expected
