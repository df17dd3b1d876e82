"""One request that cannot be computed ends alone; an engine that cannot compute says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from raymoe.engine import engine as module
from raymoe.engine.batch import Chunks
from raymoe.engine.engine import Engine
from tests.engine.support import Outcome, finish, prompt, request, run, stock_engine

BAD = 23  # the seed of requests that fail
NAMES = ("a", "bad", "c")
Break = Callable[[Engine, pytest.MonkeyPatch], None]


def forward_breaks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine._model.forward

    def broken(chunks: Chunks, rows: list[int]) -> Any:
        if any(one.sampling.seed == BAD for one, _ in chunks):
            raise RuntimeError("this one is too much")
        return forward(chunks, rows)

    monkeypatch.setattr(engine._model, "forward", broken)


def sampling_breaks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    take = module.take_tokens

    def broken(logits: Any, found: Any, eos_ids: Any) -> Any:
        logits.mul_(2.0)  # what sampling changes in place must not count twice
        if any(one.sequence.sampling.seed == BAD for one in found):
            raise IndexError("this one is too much")
        return take(logits.mul_(0.5), found, eos_ids)

    monkeypatch.setattr(module, "take_tokens", broken)


def requests(**bad: Any) -> list[Any]:
    return [
        request(name, prompt(9, ord(name[0])), max_tokens=6, **(bad if name == "bad" else {}))
        for name in NAMES
    ]


@pytest.mark.parametrize("breaks", [forward_breaks, sampling_breaks])
@pytest.mark.parametrize(
    ("family", "compiled"), [("qwen3_moe", True), ("qwen3_moe", False), ("qwen3_next", True)]
)
def test_the_others_go_on(
    breaks: Break, family: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stock_engine(family, compiled=compiled)  # without C decoding rows have lanes
    good = run(engine, requests())
    breaks(engine, monkeypatch)
    found = run(engine, requests(seed=BAD))
    assert found["bad"].finish == "error" and "too much" in str(found["bad"].error)
    assert found["bad"].tokens == []
    for name in ("a", "c"):
        assert found[name].tokens == good[name].tokens
        assert found[name].finish == "length"
    assert run(engine, requests())["bad"].tokens == good["bad"].tokens


def test_two_alone_end_and_the_third_is_the_engines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = stock_engine()
    forward_breaks(engine, monkeypatch)
    for name in ("x", "y"):
        assert run(engine, [request(name, seed=BAD)])[name].finish == "error"
    engine.add(request("z", seed=BAD))
    assert engine.step() == []
    with pytest.raises(RuntimeError, match="too much"):
        engine.step()


def test_a_success_in_between_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = stock_engine()
    forward_breaks(engine, monkeypatch)
    for turn in range(4):
        outcomes = {name: Outcome() for name in ("x", "good")}
        engine.add(request("x", seed=BAD))
        engine.add(request("good", max_tokens=2))
        finish(engine, outcomes)
        assert (outcomes["x"].finish, outcomes["good"].finish) == ("error", "length"), turn


def test_a_failure_half_way_through_a_commit_is_the_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = stock_engine()
    engine.add(request("a"))

    def broken(*_: Any) -> None:
        raise RuntimeError("half way")

    monkeypatch.setattr(engine._scheduler, "commit", broken)
    with pytest.raises(RuntimeError, match="half way"):
        engine.step()
