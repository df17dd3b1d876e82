"""VllmEngine's own part, over a stand-in for AsyncLLM: frames, cancelling, void steps, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymoe.checkpoint.reader import read_spec
from raymoe.config import parse_config
from raymoe.errors import ConfigError, Overloaded, RequestError
from raymoe.requests import GenerationRequest, SamplingParams, TokenEvent
from raymoe.vllm_plugin import engine as module
from raymoe.vllm_plugin.board import Board

PATIENCE_S = 30.0
CONTEXT = 32


class StandIn:
    """Token n of a text is n. `hold` stops it between two steps."""

    def __init__(self) -> None:
        text = SimpleNamespace(eos_token_id=None)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                try_get_generation_config=lambda: {"eos_token_id": [30]},
                hf_config=SimpleNamespace(get_text_config=lambda: text),
                max_model_len=CONTEXT,
                get_vocab_size=lambda: 40,
            ),
            cache_config=SimpleNamespace(num_gpu_blocks=8, block_size=16),
        )
        self.errored = False
        self.go = asyncio.Event()
        self.go.set()
        self.aborted: list[str] = []
        self.asked: list[tuple[str, int, int]] = []
        self.resets = 0
        self.ended = False

    async def generate(
        self, prompt: Any, params: Any, request_id: str, priority: int
    ) -> AsyncIterator[Any]:
        tokens = len(prompt["prompt_token_ids"])
        self.asked.append((request_id, tokens, priority))
        try:
            for left in range(params.max_tokens - 1, -1, -1):
                await self.go.wait()
                await asyncio.sleep(0.002)
                finish = "stop" if tokens in params.stop_token_ids else None if left else "length"
                made = SimpleNamespace(token_ids=[tokens], logprobs=None, finish_reason=finish)
                yield SimpleNamespace(
                    outputs=[made], finished=bool(finish), prompt_logprobs=None, num_cached_tokens=0
                )
                tokens += 1
                if finish:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return self.resets > 1  # the first time a step still has blocks

    def shutdown(self, timeout: float) -> None:
        self.ended = True


class Heard:
    """What was published, in frames."""

    def __init__(self) -> None:
        self.frames: list[list[TokenEvent]] = []
        self.dead = threading.Event()

    def of(self, name: str) -> list[TokenEvent]:
        return [e for frame in list(self.frames) for e in frame if e.request_id == name]

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.of(name) for token in event.token_ids]

    def wait(self, name: str, tokens: int | None = None) -> None:
        def there() -> bool:
            if tokens is not None:
                return len(self.tokens(name)) >= tokens
            return any(event.finish for event in self.of(name))

        wait_for(there)


def wait_for(there: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, StandIn, Heard]]:
    llm = StandIn()

    async def make(*_: Any) -> StandIn:
        Board(tmp_path).tell_client({"out_of_reach": 0})
        return llm

    monkeypatch.setattr(module.VllmEngine, "_make", make)
    config = parse_config(
        {"model": "models/demo", "engine": "vllm", "routers": {"max_batch": 2, "max_waiting": 2}},
        source="test",
    )
    heard = Heard()
    engine = module.VllmEngine(
        config,
        read_spec(Path("models/demo")),
        name="r",
        node="n",
        folder=tmp_path,
        controller=lambda: ("h", 1),
    )
    engine.start(lambda events: heard.frames.append(list(events)), heard.dead.set)
    yield engine, llm, heard
    engine.close()
    assert llm.ended


def request(name: str, length: int = 3, **more: Any) -> GenerationRequest:
    sampling = {"seed": 1, "temperature": 0.0, "max_tokens": 20, **more.pop("sampling", {})}
    return GenerationRequest(
        request_id=name, prompt_ids=(1,) * length, sampling=SamplingParams(**sampling), **more
    )


def test_tokens_limits_and_refusals(made: tuple[Any, StandIn, Heard]) -> None:
    engine, llm, heard = made
    assert engine.model.longest_tokens == CONTEXT and engine.model.eos_ids == (30,)
    engine.submit(request("a", priority=5))
    heard.wait("a")
    assert heard.tokens("a") == list(range(3, 23)) and heard.of("a")[-1].finish == "length"
    assert llm.asked == [("a", 3, 5)]
    engine.submit(request("b", length=28))
    heard.wait("b")
    assert heard.tokens("b") == [28, 29, 30] and heard.of("b")[-1].finish == "stop"
    engine.submit(request("c", output_ids=(9, 30)))  # it had ended
    heard.wait("c")
    assert heard.tokens("c") == [] and heard.of("c")[-1].finish == "stop"
    with pytest.raises(RequestError, match="from 1 to 31"):
        engine.submit(request("d", length=CONTEXT))
    llm.go.clear()
    for name in "efgh":
        engine.submit(request(name))
    assert engine.load() == (0, 4)
    with pytest.raises(Overloaded):
        engine.submit(request("i"))
    engine.submit(request("j", output_ids=(4, 5)))  # it was let in elsewhere
    wait_for(lambda: [name for name, *_ in llm.asked][-5:] == list("efghj"))
    engine.cancel(["e", "f", "g", "h", "j", "unknown"])
    wait_for(lambda: engine.load() == (0, 0))
    wait_for(lambda: sorted(llm.aborted) == ["e", "f", "g", "h", "j"])


def test_a_step_is_one_frame(made: tuple[Any, StandIn, Heard]) -> None:
    engine, llm, heard = made
    llm.go.clear()
    for name in "ab":
        engine.submit(request(name, sampling={"max_tokens": 1}))
    wait_for(lambda: len(llm.asked) == 2)
    engine._loop.call_soon_threadsafe(llm.go.set)
    heard.wait("a")
    heard.wait("b")
    assert len(heard.frames) == 1


def test_a_void_step_ends_its_requests_and_the_others_go_on(
    made: tuple[Any, StandIn, Heard], tmp_path: Path
) -> None:
    engine, llm, heard = made
    worker = Board(tmp_path)
    for name in ("in", "beside"):
        engine.submit(request(name))
    heard.wait("in", tokens=2)
    heard.wait("beside", tokens=2)
    engine._loop.call_soon_threadsafe(llm.go.clear)
    worker.void()
    engine._loop.call_soon_threadsafe(llm.go.set)  # what comes now is of void steps
    engine.submit(request("new"))
    time.sleep(0.2)
    before = {name: heard.tokens(name) for name in ("in", "beside", "new")}
    time.sleep(0.1)
    assert {name: heard.tokens(name) for name in before} == before
    assert before["new"] == []
    worker.name_requests(["in", "cancelled since"])
    for name in ("in", "beside", "new"):
        heard.wait(name)
    last = heard.of("in")[-1]
    assert (last.finish, last.error_kind) == ("error", "unavailable")
    assert heard.tokens("in") == before["in"]
    # published tokens are not computed again, unpublished ones are not missing
    assert heard.tokens("beside") == heard.tokens("new") == list(range(3, 23))
    assert not worker.pending and llm.resets == 2 and "beside" in llm.aborted
    again = [tokens for name, tokens, _ in llm.asked if name == "beside"]
    assert again == [3, 3 + len(before["beside"])]
    assert engine.load() == (0, 0)


def test_the_end_of_vllm_is_told_once(made: tuple[Any, StandIn, Heard]) -> None:
    engine, llm, heard = made
    llm.errored = True
    assert heard.dead.wait(PATIENCE_S) and engine.died


def test_what_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def make(*_: Any) -> None:
        raise ConfigError("no")

    monkeypatch.setattr(module.VllmEngine, "_make", make)
    with pytest.raises(ConfigError, match="no"):
        module.VllmEngine(
            parse_config({"model": "models/demo", "engine": "vllm"}, source="test"),
            read_spec(Path("models/demo")),
            name="r",
            node="n",
            folder=tmp_path,
            controller=lambda: ("h", 1),
        )
