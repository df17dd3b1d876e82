"""Two tensor-parallel ranks in processes of their own, as the engine of a router."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raymoe.config import parse_config
from raymoe.vllm_plugin.engine import VllmEngine
from tests.vllm.engines import Text, differences, engine_of, generate, prompts
from tests.vllm.groups import Fleet
from tests.vllm.heard import PATIENCE_S, Heard, request
from tests.zoo import VOCAB, tiny_checkpoint

STALL_S = 4.0
ASKED = prompts(VOCAB, 3)
TOKENS = 24

pytestmark = pytest.mark.timeout(600)  # four processes that import vLLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a shared expert, which every rank has a part of."""
    folder: Path = tmp_path_factory.mktemp("model")
    return tiny_checkpoint("qwen2_moe", folder, hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def reference(model: Path) -> list[Text]:
    """What stock vLLM makes of the prompts, in one process."""
    with engine_of(model, skip_tokenizer_init=True) as engine:
        return generate(engine, ASKED, TOKENS)


@pytest.fixture(scope="module")
def engine(
    model: Path, fleet: Fleet, heard: Heard, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("router")
    (folder / "board").mkdir()
    settings = fleet.settings(folder / "secret")
    values: dict[str, Any] = {
        "model": str(model),
        "engine": "vllm",
        "secret_file": settings["secret_file"],
        "data_plane": {"stall_limit_s": STALL_S},
        "routers": {"max_context_tokens": 256, "kv_bytes": 1 << 26},
        "vllm": {"engine_args": {"tensor_parallel_size": 2, "block_size": 32}},
    }
    engine = VllmEngine(
        parse_config(values, source="test"),
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


def ask(engine: VllmEngine, heard: Heard, name: str) -> list[Text]:
    for number, prompt in enumerate(ASKED):
        asked = request(
            f"{name}-{number}", tuple(prompt["prompt_token_ids"]), temperature=0.0,
            max_tokens=TOKENS,
        )  # fmt: skip
        engine.submit(asked)
    return [
        Text(ids=tuple(heard.wait(f"{name}-{number}")), leads=()) for number in range(len(ASKED))
    ]


def test_tokens_are_those_of_stock_vllm(
    engine: VllmEngine, heard: Heard, fleet: Fleet, reference: list[Text]
) -> None:
    """Each rank finds the plugin by its entry point and has its own links and control."""
    assert differences(reference, ask(engine, heard, "greedy")) == []
    counted: set[str] = set()
    end = time.monotonic() + PATIENCE_S
    while counted != {"router-0", "router-1"}:  # both have dispatched
        assert time.monotonic() < end, counted
        reports = fleet.control.take_reports()
        counted |= {r.name for r in reports if r.counts is not None and r.counts.any()}
        time.sleep(0.05)


def test_a_void_step_ends_its_requests_and_nothing_else(
    engine: VllmEngine, heard: Heard, fleet: Fleet, reference: list[Text]
) -> None:
    """The odd experts are lost for longer than a step waits, in both ranks or in one."""
    engine.submit(request("lost", tuple(ASKED[0]["prompt_token_ids"]), temperature=0.0,
                          max_tokens=150))  # fmt: skip
    heard.wait("lost", tokens=2)
    fleet.kill("b")
    heard.wait("lost")
    last = heard.of("lost")[-1]
    assert (last.finish, last.error_kind) == ("error", "unavailable")
    told = tuple(heard.tokens("lost"))[:TOKENS]  # nothing of the void step
    right = Text(ids=reference[0].ids[: len(told)], leads=reference[0].leads)
    assert differences([right], [Text(ids=told, leads=())]) == []
    fleet.add("a", fleet.every)
    fleet.publish(b=())
    fleet.wait_until_used()
    assert differences(reference, ask(engine, heard, "after")) == []


def test_the_end_leaves_nothing(engine: VllmEngine) -> None:
    """The last test of this engine."""
    board = engine._folder
    noted = {line for file in board.glob("traces-*") for line in file.read_text().splitlines()}
    shared = {path for path in noted if path.startswith("/dev/shm/") and Path(path).exists()}
    assert any("psm_" in path for path in shared) and any("cpushm" in path for path in shared)
    before = psutil.Process().children(recursive=True)
    said = ("Worker", "spawn_main")  # as vLLM calls it, or as Python does
    ranks = [p for p in before if any(word in " ".join(p.cmdline()) for word in said)]
    assert len(ranks) >= 2, [p.cmdline() for p in before]
    engine.close()
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert not [path for path in noted if Path(path).exists()]
