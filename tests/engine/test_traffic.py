"""Random traffic with everything at once: arrivals, cancellations, preemption, failing experts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.errors import ExpertsUnavailable
from raymoe.requests import GenerationRequest
from tests.engine.support import SMALL, Outcome, prompt, request, run, stock_engine, stock_model

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.2},
    {"temperature": 1.2, "top_p": 0.8, "frequency_penalty": 0.5},
    {"logprobs": 1, "min_tokens": 3, "ignore_eos": False},
    {"prompt_logprobs": 0, "repetition_penalty": 1.2},
]


def random_requests(draw: random.Random, count: int) -> list[GenerationRequest]:
    return [
        request(
            str(n),
            prompt(draw.randint(1, 30), n % 4),  # some begin alike
            priority=draw.randint(0, 1),
            **{**draw.choice(KINDS), "seed": n, "max_tokens": draw.randint(1, 30)},
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("family", "seed", "stall_end_s"),
    [("qwen3_moe", 0, 600.0), ("gpt_oss", 1, 0.0), ("qwen3_next", 1, 600.0)],
)
def test_every_request_gets_its_own_tokens_or_its_own_end(
    family: str, seed: int, stall_end_s: float
) -> None:
    draw = random.Random(seed)
    requests = random_requests(draw, 14)
    plenty = stock_engine(family)
    expected = {each.request_id: run(plenty, [each])[each.request_id] for each in requests}
    model: Any = stock_model(family)
    scarce = {"kv_bytes": 1_700_000, "lanes_share": 0.97, "compiled": False, "max_batch": 6}
    if family == "qwen3_next":
        scarce = {"kv_bytes": 90_000, "max_batch": 6}
    stalls = {"stall_end_s": stall_end_s, "stall_pause_s": 0.0}
    engine = Engine(model, None, EngineConfig(**{**SMALL, **scarce, **stalls}))
    failures: list[Exception] = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: fail(failures))
    outcomes = {each.request_id: Outcome() for each in requests}
    waiting, cancelled, unavailable = list(requests), set(), 0
    for _ in range(5000):
        if waiting and draw.random() < 0.4:
            engine.add(waiting.pop())
        if draw.random() < 0.03:
            name = draw.choice(requests).request_id
            engine.cancel(name)
            cancelled.add(name)
        if failures or engine._blame.suspicious:
            pass  # what fails alone as well ends with an error, rightly: test_blame.py
        elif draw.random() < 0.1:
            failures.append(RuntimeError("broken"))
        elif draw.random() < (0.06 if stall_end_s else 0.01):
            failures.append(ExpertsUnavailable(1, (0,), 1.0))
        for event in engine.step():
            outcomes[event.request_id].take(event)
            unavailable += event.finish == "error"
        if not waiting and not engine.has_work:
            break
    assert engine.pool.used == 0 and not engine.has_work
    assert engine.preemptions > 0
    ends = [one.finish for one in outcomes.values()]
    assert ends.count("error") == unavailable
    assert engine.stats.stalled_steps > 0
    assert (unavailable > 0) == (stall_end_s == 0)
    for name, found in outcomes.items():
        truth = expected[name]
        if found.finish == truth.finish:
            assert found.tokens == truth.tokens
            assert len(found.logprobs) == len(truth.logprobs)
            assert len(found.prompt_logprobs) == len(truth.prompt_logprobs)
        else:
            assert found.finish == "error" or name in cancelled
            assert found.tokens == truth.tokens[: len(found.tokens)]
    assert ends.count("length") + ends.count("stop") > 3


def fail(failures: list[Exception]) -> None:
    if failures:
        raise failures.pop()
