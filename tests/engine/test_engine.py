from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.facts import longest_context
from raymoe.errors import ConfigError, ExpertsUnavailable, Overloaded, RequestError
from tests.engine.support import (
    SMALL,
    Outcome,
    finish,
    generate,
    prompt,
    request,
    run,
    stock_engine,
    stock_model,
)


@pytest.fixture(scope="module")
def truth() -> Any:
    return stock_model()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return stock_engine()


def test_requests_join_and_leave_between_steps(truth: Any, engine: Engine) -> None:
    outcomes = {str(n): Outcome() for n in range(6)}
    prompts = [prompt(length, length) for length in (1, 40, 7, 23, 16, 5)]
    new = [9, 3, 1, 12, 6, 8]
    for n in range(6):
        engine.add(request(str(n), prompts[n], max_tokens=new[n]))
        for _ in range(n):
            for event in engine.step():
                outcomes[event.request_id].take(event)
    finish(engine, outcomes)
    eos = engine.eos_ids
    for n, one in enumerate(map(str, range(6))):
        tokens, _ = generate(truth, prompts[n], new[n])
        assert not eos & set(tokens)
        assert outcomes[one].tokens == tokens
        assert outcomes[one].finish == "length"


def test_end_of_text_ends_and_ignore_eos_does_not(engine: Engine) -> None:
    ids = prompt(9)
    tokens = run(engine, [request("a", ids, max_tokens=8)])["a"].tokens
    last = tokens[4]
    at = tokens.index(last) + 1
    engine.eos_ids = frozenset({last})
    try:
        stopped = run(engine, [request("a", ids, max_tokens=8, ignore_eos=False)])["a"]
        going = run(engine, [request("a", ids, max_tokens=8)])["a"]
    finally:
        engine.eos_ids = frozenset({2})
    assert (stopped.tokens, stopped.finish) == (tokens[:at], "stop")
    assert (going.tokens, going.finish) == (tokens, "length")


def test_eos_ids_come_from_the_generation_config_then_the_config() -> None:
    model: Any = stock_model()
    model.generation_config.eos_token_id = [7, 9]
    assert Engine(model, None, EngineConfig(**SMALL)).eos_ids == {7, 9}
    model.generation_config.eos_token_id = None
    assert Engine(model, None, EngineConfig(**SMALL)).eos_ids == {2}


def test_rotary_embeddings_that_depend_on_the_company_are_kept_short() -> None:
    model: Any = stock_model()
    assert longest_context(model) == 512
    model.config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
    }  # fmt: skip
    assert longest_context(model) == 128
    model.config.rope_parameters = {"full_attention": model.config.rope_parameters}
    assert longest_context(model) == 128
    model.config.rope_parameters["full_attention"]["rope_type"] = "yarn"
    assert longest_context(model) == 512


def test_stop_token_ids_count_even_when_eos_does_not(engine: Engine) -> None:
    ids = prompt(9)
    tokens = run(engine, [request("a", ids, max_tokens=8)])["a"].tokens
    stopped = run(engine, [request("a", ids, max_tokens=8, stop_token_ids=(tokens[2], 499))])["a"]
    assert stopped.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert stopped.finish == "stop"


def test_min_tokens_bans_what_would_end_it(engine: Engine) -> None:
    ids = prompt(9)
    tokens = run(engine, [request("a", ids, max_tokens=8)])["a"].tokens
    fields: dict[str, Any] = {"max_tokens": 8, "stop_token_ids": (tokens[0],)}
    assert run(engine, [request("a", ids, **fields)])["a"].tokens == tokens[:1]
    later = run(engine, [request("a", ids, min_tokens=5, **fields)])["a"]
    assert len(later.tokens) >= 5
    assert tokens[0] not in later.tokens[:5]


def test_logprobs_are_stock_logits(truth: Any, engine: Engine) -> None:
    ids = prompt(11)
    tokens, logits = generate(truth, ids, 5)
    expected = torch.log_softmax(logits, -1)
    for fields in ({}, {"repetition_penalty": 1.5, "logit_bias": ((3, 1.0),)}):
        found = run(engine, [request("a", ids, max_tokens=5, logprobs=3, **fields)])["a"]
        assert len(found.logprobs) == 5
        same = next((n for n in range(5) if found.tokens[n] != tokens[n]), 5)
        for n in range(same):
            one, row = found.logprobs[n], expected[n]
            assert one.token == pytest.approx(float(row[tokens[n]]), abs=1e-4)
            assert [token for token, _ in one.top] == row.topk(3).indices.tolist()
    assert run(engine, [request("a", ids, max_tokens=2)])["a"].logprobs == []


@pytest.mark.parametrize("length", [2, 16, 17, 45])
def test_prompt_logprobs_over_chunks(truth: Any, engine: Engine, length: int) -> None:
    ids = prompt(length)
    with torch.no_grad():
        rows = torch.log_softmax(truth(torch.tensor([ids])).logits[0], -1)
    others = [request(str(n), prompt(9, n), max_tokens=6) for n in range(3)]
    found = run(engine, [*others, request("a", ids, max_tokens=3, prompt_logprobs=2)])["a"]
    assert len(found.prompt_logprobs) == length - 1
    for n, one in enumerate(found.prompt_logprobs):
        assert one.token == pytest.approx(float(rows[n, ids[n + 1]]), abs=1e-4)
        assert [token for token, _ in one.top] == rows[n].topk(2).indices.tolist()


def test_max_tokens_0_reads_the_prompt_only(engine: Engine) -> None:
    found = run(engine, [request("a", prompt(20), max_tokens=0, prompt_logprobs=0)])["a"]
    assert (found.tokens, found.finish, len(found.prompt_logprobs)) == ([], "length", 19)


def test_the_context_limit_ends_a_request() -> None:
    engine = stock_engine(max_context=20)
    found = run(engine, [request("a", prompt(15), max_tokens=50)])["a"]
    assert (len(found.tokens), found.finish) == (5, "length")


def test_what_can_never_run_is_refused_with_both_numbers() -> None:
    engine = stock_engine(max_context=20)
    with pytest.raises(RequestError, match=r"20 tokens .* 20") as caught:
        engine.add(request("a", prompt(20)))
    assert caught.value.field == "prompt"
    with pytest.raises(RequestError, match="no tokens"):
        engine.add(request("a", ()))
    assert not engine.has_work
    tokens_held = stock_engine(kv_bytes=20_000)
    assert tokens_held.max_context == tokens_held.pool.capacity_tokens < 60
    with pytest.raises(RequestError, match=str(tokens_held.max_context)):
        tokens_held.add(request("a", prompt(60)))
    # The longest that is admitted also ends.
    longest = prompt(tokens_held.max_context - 1)
    assert len(run(tokens_held, [request("a", longest, max_tokens=9)])["a"].tokens) == 1


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 are the least"):
        stock_engine(kv_bytes=2000)
    for bad in ({"kv_bytes": 0}, {"block_tokens": 0}, {"max_batch": 0}, {"max_context": 1}):
        with pytest.raises(ConfigError):
            EngineConfig(**bad)


def test_a_name_is_used_once_at_a_time_and_the_queue_is_bounded() -> None:
    engine = stock_engine(max_waiting=1, max_batch=1)
    engine.add(request("a", max_tokens=1))
    with pytest.raises(RequestError, match="already"):
        engine.add(request("a"))
    engine.add(request("b", max_tokens=1))
    with pytest.raises(Overloaded):
        engine.add(request("c"))
    finish(engine, {"a": Outcome(), "b": Outcome()})
    run(engine, [request("a", max_tokens=1)])


def test_cancel_frees_blocks_wherever_the_request_is(engine: Engine) -> None:
    outcomes = {name: Outcome() for name in "abc"}
    engine.add(request("a", prompt(5), max_tokens=40))
    for event in engine.step():
        outcomes[event.request_id].take(event)
    engine.add(request("b", prompt(60), max_tokens=40))  # in the middle of its prompt
    engine.step()
    engine.add(request("c", prompt(5), max_tokens=40))  # never ran
    for name in "abc":
        engine.cancel(name)
    engine.cancel("nobody")
    for event in engine.step():
        outcomes[event.request_id].take(event)
    assert {one.finish for one in outcomes.values()} == {"cancelled"}
    assert engine.pool.used == 0 and not engine.has_work
    engine.cancel("a")
    assert engine.step() == []


def test_add_and_cancel_from_many_threads(engine: Engine) -> None:
    outcomes = {f"{thread}-{n}": Outcome() for thread in range(4) for n in range(12)}

    def client(thread: int) -> None:
        for n in range(12):
            engine.add(request(f"{thread}-{n}", prompt(3 + n, n), max_tokens=4))
            if n % 3 == 0:
                engine.cancel(f"{thread}-{n}")

    threads = [threading.Thread(target=client, args=(thread,)) for thread in range(4)]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads) or engine.has_work:
        for event in engine.step():
            outcomes[event.request_id].take(event)
    ends = [one.finish for one in outcomes.values()]
    assert ends.count("length") + ends.count("cancelled") == 48
    assert ends.count("length") >= 32
    assert engine.pool.used == 0


class FailingExperts:
    """The seam with identity experts; raises what it is told to at chosen calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures: dict[int, Exception] = {}

    def dispatch(self, layer: int, hidden: Any, expert_ids: Any, gate_weights: Any) -> Any:
        self.calls += 1
        failure = self.failures.pop(self.calls, None)
        if failure is not None:
            raise failure
        return hidden

    def combine(self, pending: Any) -> Any:
        return pending


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[FailingExperts, Engine]:
    from raymoe.checkpoint.dense import load_dense
    from raymoe.checkpoint.reader import read_spec
    from tests.zoo import tiny_checkpoint

    spec = read_spec(tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("engine")))
    experts = FailingExperts()
    return experts, Engine(load_dense(spec, experts), experts, EngineConfig(**SMALL))


def test_an_engine_is_built_without_calling_any_expert(
    failing: tuple[FailingExperts, Engine],
) -> None:
    experts, _ = failing
    assert experts.calls == 0
    assert "dispatch" not in vars(experts)  # nothing of the probe is left


class Clock:
    """The engine's own, which moves by what is slept and by what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        monkeypatch.setattr("raymoe.engine.engine.monotonic", lambda: self.now_s)
        monkeypatch.setattr("raymoe.engine.engine.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def fail_next(experts: FailingExperts, call: int = 1) -> None:
    """Of the coming calls of an expert layer, one finds no live replica."""
    experts.failures[experts.calls + call] = ExpertsUnavailable(1, (3,), 5.0)


def test_requests_wait_for_lost_experts_and_go_on(
    failing: tuple[FailingExperts, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, engine = failing
    clock = Clock(monkeypatch)
    monkeypatch.setattr(engine, "config", replace(engine.config, stall_pause_s=20.0))
    requests = [request(name, prompt(25, ord(name)), max_tokens=6) for name in "ab"]
    good = run(engine, requests)
    outcomes = {name: Outcome() for name in "ab"}
    for each in requests:
        engine.add(each)
    failed, before = 0, engine.stats.stalled_steps
    while engine.has_work:
        for each_try in range(3):  # in prefill as in decode, in the first layer and in the second
            fail_next(experts, 1 + each_try % 2)
            assert engine.step() == []
            failed += 1
            clock.now_s += 0.3 * engine.config.stall_end_s  # in sum beyond it, not in one stall
        for event in engine.step():
            outcomes[event.request_id].take(event)
    assert outcomes == good
    assert engine.stats.stalled_steps - before == failed
    assert len(clock.slept) == failed  # these experts do not wait, so the engine does
    assert max(clock.slept) <= engine.config.stall_pause_s


def test_a_request_that_was_stalled_for_too_long_ends(
    failing: tuple[FailingExperts, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, engine = failing
    clock = Clock(monkeypatch)
    good = run(engine, [request("a", prompt(9), max_tokens=6)])["a"].tokens
    outcomes = {name: Outcome() for name in "abc"}
    engine.add(request("a", prompt(9), max_tokens=6))
    fail_next(experts)
    assert engine.step() == []
    clock.now_s += engine.config.stall_end_s - 1
    engine.add(request("b", prompt(9), max_tokens=6))
    fail_next(experts)
    assert engine.step() == []
    clock.now_s += 2
    fail_next(experts)
    (event,) = engine.step()  # the one that came later has time left
    assert (event.request_id, event.finish, event.error_kind) == ("a", "error", "unavailable")
    assert event.error is not None
    assert "layer 1" in event.error and "within 601" in event.error
    outcomes["a"].take(event)
    engine.add(request("c", prompt(9), max_tokens=6))
    finish(engine, outcomes)
    assert outcomes["b"].tokens == outcomes["c"].tokens == good


def test_a_stalled_request_can_be_cancelled(failing: tuple[FailingExperts, Engine]) -> None:
    experts, engine = failing
    engine.add(request("a", prompt(9), max_tokens=6))
    for _ in range(2):
        fail_next(experts)
        assert engine.step() == []
    engine.cancel("a")
    (event,) = engine.step()
    assert (event.request_id, event.finish) == ("a", "cancelled")
    assert not engine.has_work
    assert engine.pool.used == 0


@pytest.mark.parametrize("name", ["stall_end_s", "stall_pause_s"])
def test_negative_stall_times_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: -1.0})  # type: ignore[arg-type]


def test_a_step_that_broke_can_be_run_again(failing: tuple[FailingExperts, Engine]) -> None:
    experts, engine = failing
    requests = [request(name, prompt(25, ord(name)), max_tokens=7) for name in "abc"]
    good = run(engine, requests)
    outcomes = {name: Outcome() for name in "abc"}
    for each in requests:
        engine.add(each)
    step = 0
    while engine.has_work:
        step += 1
        experts.failures[experts.calls + 1 + step % 3] = RuntimeError("of another kind")
        assert engine.step() == []
        for event in engine.step():
            outcomes[event.request_id].take(event)
    assert {name: one.tokens for name, one in outcomes.items()} == {
        name: one.tokens for name, one in good.items()
    }


def test_statistics_add_up(truth: Any) -> None:
    engine = stock_engine()
    run(
        engine,
        [request("a", prompt(20), max_tokens=5), request("b", prompt(9, 1), max_tokens=3)],
    )
    assert engine.stats.prefill_tokens == 29
    assert engine.stats.decode_tokens == 4 + 2
    assert engine.stats.forward_s > 0
