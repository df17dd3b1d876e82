"""VllmEngine, as a router runs it, over two groups: tokens as the embedded engine makes them."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymoe.config import parse_config
from raymoe.errors import ConfigError, RequestError
from raymoe.gateway.tokenizer import GatewayTokenizer
from raymoe.grammar.build import regex_grammar
from raymoe.requests import TokenEvent
from raymoe.vllm_plugin.engine import VllmEngine
from tests.engine.support import local_engine
from tests.vllm.engines import prompts
from tests.vllm.groups import Fleet
from tests.vllm.heard import PATIENCE_S, Heard, request

DEMO = Path("models/demo")
ASKED = [tuple(prompt["prompt_token_ids"]) for prompt in prompts(vocab=4096)]
STALL_S = 6.0

WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "frequency_penalty": 0.7, "min_tokens": 12},
    {"temperature": 0.8, "repetition_penalty": 1.3, "typical_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": ((11, 3.0), (12, -5.0))},
    {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def model() -> Path:
    return DEMO


@pytest.fixture(scope="module")
def engine(
    fleet: Fleet, heard: Heard, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("router")
    (folder / "board").mkdir()
    settings = fleet.settings(folder / "secret")
    config = parse_config(
        {
            "model": str(DEMO),
            "engine": "vllm",
            "secret_file": settings["secret_file"],
            "data_plane": {"stall_limit_s": STALL_S},
            "routers": {"max_context_tokens": 256, "kv_bytes": 1 << 28},
        },
        source="test",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # as in a router's process
        engine = VllmEngine(
            config,
            fleet.spec,
            name="router",
            node=settings["node"],
            folder=folder / "board",
            controller=lambda: fleet.control.address,
        )
        engine.start(heard, heard.dead.set)
        fleet.wait_until_used()
        yield engine
        engine.close()


@pytest.fixture(scope="module")
def reference() -> dict[str, list[TokenEvent]]:
    """What the embedded engine makes of the same requests."""
    embedded = local_engine(DEMO, block_tokens=16, chunk_tokens=64, kv_bytes=1 << 28)
    made: dict[str, list[TokenEvent]] = {}
    for number, way in enumerate(WAYS):
        embedded.add(request(f"way-{number}", ASKED[number], **way))
    while embedded.has_work:
        for event in embedded.step():
            made.setdefault(event.request_id, []).append(event)
    return made


def ids(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_every_way_to_draw_gives_the_embedded_engines_tokens(
    engine: VllmEngine, heard: Heard, reference: dict[str, list[TokenEvent]]
) -> None:
    for number, way in enumerate(WAYS):
        engine.submit(request(f"way-{number}", ASKED[number], **way))
    for number in range(len(WAYS)):
        assert heard.wait(f"way-{number}") == ids(reference[f"way-{number}"]), WAYS[number]
        assert heard.of(f"way-{number}")[-1].finish == "length"
    ours, theirs = heard.of("way-5"), reference["way-5"]
    for here, there in zip(
        [one for e in ours for one in (*e.prompt_logprobs, *e.logprobs)],
        [one for e in theirs for one in (*e.prompt_logprobs, *e.logprobs)],
        strict=True,
    ):
        assert here.token == pytest.approx(there.token, abs=1e-3)
        assert [p for _, p in here.top] == pytest.approx([p for _, p in there.top], abs=1e-3)


def test_a_request_goes_on_where_another_router_was_lost(
    engine: VllmEngine, heard: Heard, reference: dict[str, list[TokenEvent]]
) -> None:
    for number, way in enumerate(WAYS):
        whole = ids(reference[f"way-{number}"])
        begun = request(f"on-{number}", ASKED[number], **{**way, "prompt_logprobs": None})
        engine.submit(replace(begun, output_ids=tuple(whole[: 3 + number])))
    for number in range(len(WAYS)):
        rest = ids(reference[f"way-{number}"])[3 + number :]
        assert heard.wait(f"on-{number}") == rest, WAYS[number]


def test_an_output_follows_its_grammar_also_when_it_goes_on(
    engine: VllmEngine, heard: Heard
) -> None:
    pattern = "[0-9]{3}-[a-z]{4}"
    one = request(
        "grammar", ASKED[0], grammar=regex_grammar(pattern), temperature=1.0, ignore_eos=False,
        max_tokens=40,
    )  # fmt: skip
    engine.submit(one)
    tokens = heard.wait("grammar")
    assert heard.of("grammar")[-1].finish == "stop"
    text = GatewayTokenizer.load(str(DEMO)).decode(tokens)
    assert re.fullmatch(pattern, text), text
    assert len(tokens) > 2
    engine.submit(replace(one, request_id="grammar-on", output_ids=tuple(tokens[:2])))
    assert heard.wait("grammar-on") == tokens[2:]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"enable_expert_parallel": True}, "enable_expert_parallel"),
        ({"no_such_argument": 1}, "vLLM refuses its arguments: .*no_such_argument"),
        ({"dtype": "no-dtype"}, "vLLM refuses its arguments: .*dtype"),
    ],
)
def test_wrong_arguments_are_refused_before_a_process_starts(
    arguments: dict[str, Any], sentence: str, fleet: Fleet, tmp_path: Path
) -> None:
    config = parse_config(
        {"model": str(DEMO), "engine": "vllm", "vllm": {"engine_args": arguments}}, source="test"
    )
    with pytest.raises(ConfigError, match=sentence):
        VllmEngine(
            config,
            fleet.spec,
            name="other",
            node="n",
            folder=tmp_path,
            controller=lambda: fleet.control.address,
        )


def test_what_can_never_run_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(RequestError, match="256 tokens; from 1 to 255"):
        engine.submit(request("long", (5,) * 256))
    with pytest.raises(RequestError, match="grammar cannot be followed"):
        engine.submit(request("grammar?", ASKED[0], grammar="{"))


def test_a_cancelled_request_leaves_the_engine(engine: VllmEngine, heard: Heard) -> None:
    engine.submit(request("gone", ASKED[0], max_tokens=200))
    heard.wait("gone", tokens=2)
    engine.cancel(["gone", "unknown"])
    end = time.monotonic() + PATIENCE_S
    while engine.load() != (0, 0) or engine.profile()["kv_used_blocks"]:
        assert time.monotonic() < end, (engine.load(), engine.profile())
        # vLLM reports after a step only: have it make one
        engine.submit(request(f"one-{time.monotonic()}", ASKED[1], max_tokens=1))
        time.sleep(0.2)
    assert all(event.finish is None for event in heard.of("gone"))


def test_a_void_step_ends_its_requests_and_nothing_else(
    engine: VllmEngine, heard: Heard, fleet: Fleet, reference: dict[str, list[TokenEvent]]
) -> None:
    """The odd experts are lost for longer than a step waits; then another group has them."""
    void: set[str] = set()
    handle = engine._board.handle

    def note() -> None:
        void.update(engine._board.requests() or ())
        handle()

    engine._board.handle = note  # type: ignore[method-assign]
    long = {"temperature": 0.0, "max_tokens": 150}
    for name in ("lost-0", "lost-1"):
        engine.submit(request(name, ASKED[int(name[-1])], **long))
    for name in ("lost-0", "lost-1"):
        heard.wait(name, tokens=2)
    fleet.kill("b")
    time.sleep(STALL_S / 2)  # as a rule the step is waiting now, and this one not in it
    engine.submit(request("beside", ASKED[0], temperature=0.0))
    for name in ("lost-0", "lost-1"):
        heard.wait(name)
        last = heard.of(name)[-1]
        assert (last.finish, last.error_kind) == ("error", "unavailable")
    fleet.add("a", fleet.every)
    fleet.publish(b=())
    right = ids(reference["way-0"])
    tokens = heard.wait("beside")
    assert {"lost-0", "lost-1"} <= void <= {"lost-0", "lost-1", "beside"}
    assert tokens == right if "beside" not in void else right[: len(tokens)] == tokens
    assert heard.tokens("lost-0")[:20] == right[: len(heard.tokens("lost-0"))]
    # nothing of the void step is left in the prefix cache
    engine.submit(request("after", ASKED[0], temperature=0.0))
    assert heard.wait("after") == right


def test_the_end_of_vllm_is_noticed(engine: VllmEngine, heard: Heard) -> None:
    """The last test of this engine."""
    children = psutil.Process().children(recursive=True)
    said = ("EngineCore", "spawn_main")  # as vLLM calls it, or as Python does
    cores = [p for p in children if any(word in " ".join(p.cmdline()) for word in said)]
    assert len(cores) == 1, [(p.name(), p.cmdline()) for p in children]  # its worker is in it
    os.kill(cores[0].pid, signal.SIGKILL)
    assert heard.dead.wait(PATIENCE_S)
    assert engine.died
    engine.close()
    assert not psutil.wait_procs(cores, timeout=30)[1]
