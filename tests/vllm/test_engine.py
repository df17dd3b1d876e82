"""Offline vLLM over two groups on the demo model: the tokens of stock vLLM, come what may."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from raymoe.errors import ConfigError, ExpertsUnavailable
from tests.vllm.engines import (
    Text,
    at_dispatch,
    differences,
    engine_of,
    generate,
    prompts,
    remote_engine,
    remote_of,
)
from tests.vllm.groups import Fleet

DEMO = Path("models/demo")
ASKED = prompts(vocab=4096)


@pytest.fixture(scope="module")
def reference() -> list[Text]:
    """What stock vLLM, with all experts in it, makes of the prompts."""
    with engine_of(DEMO) as engine:
        return generate(engine, ASKED)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """a holds the even experts, b holds every one."""
    fleet = Fleet(DEMO, {"a": lambda _, expert: expert % 2 == 0, "b": lambda *_: True})
    yield fleet
    fleet.close()


@pytest.fixture
def engine(fleet: Fleet, tmp_path: Path) -> Iterator[LLM]:
    with remote_engine(DEMO, fleet.settings(tmp_path / "secret")) as engine:
        fleet.wait_until_used()
        yield engine


def test_tokens_are_those_of_stock_vllm(fleet: Fleet, engine: LLM, reference: list[Text]) -> None:
    remote = remote_of(engine)
    assert remote.client.stats.batches == 0, "start-up sent something"
    (names,) = engine.apply_model(lambda model: [n for n, _ in model.named_parameters()])
    assert names and not [n for n in names if "experts" in n]

    assert differences(reference, generate(engine, ASKED)) == []

    stats = remote.client.stats
    steps, rest = divmod(stats.batches, fleet.spec.layers)
    assert steps > 24 and rest == 0
    assert stats.links_lost == 0 and stats.errors == 0
    remote.control.close()  # sends nothing more, so what follows is all there is
    pairs = sum(int(r.counts.sum()) for r in fleet.control.take_reports() if r.counts is not None)
    pairs += int(remote.client.take_counts().sum())
    tokens = sum(len(p["prompt_token_ids"]) + 24 - 1 for p in ASKED)
    assert pairs == tokens * fleet.spec.top_k * fleet.spec.layers


def test_a_group_killed_in_a_layer_changes_no_token(
    fleet: Fleet, engine: LLM, reference: list[Text]
) -> None:
    with at_dispatch(engine, 10 * fleet.spec.layers + 3, lambda: fleet.kill("a")):
        texts = generate(engine, ASKED)
    assert differences(reference, texts) == []
    assert remote_of(engine).client.stats.links_lost == 1


def test_a_new_table_while_it_generates(fleet: Fleet, engine: LLM, reference: list[Text]) -> None:
    def move() -> None:
        """a serves everything, b only one expert of each layer."""
        fleet.add("a", fleet.every)
        fleet.publish(b=[pair for pair in fleet.every if pair[1] == 1])
        fleet.wait_until_used()

    with at_dispatch(engine, 10 * fleet.spec.layers + 3, move):
        texts = generate(engine, ASKED)
    assert differences(reference, texts) == []
    assert remote_of(engine).client.epoch == (1, 2)


def test_experts_without_a_group_are_waited_for(
    fleet: Fleet, engine: LLM, reference: list[Text]
) -> None:
    """The only group with the odd experts dies; the step waits until another has loaded them, and
    the table that says so reaches the engine while it waits."""

    def restore() -> None:
        fleet.add("a", fleet.every)
        fleet.publish(b=())

    restoring = threading.Thread(target=restore)

    def lose() -> None:
        fleet.kill("b")
        restoring.start()

    with at_dispatch(engine, 10 * fleet.spec.layers + 3, lose):
        texts = generate(engine, ASKED)
    restoring.join()
    assert differences(reference, texts) == []


def test_experts_that_stay_away_end_the_engine_by_name(fleet: Fleet, tmp_path: Path) -> None:
    settings = fleet.settings(tmp_path / "secret", stall_limit_s=0.5)
    with remote_engine(DEMO, settings) as engine:
        fleet.wait_until_used()
        with (
            at_dispatch(engine, 3, lambda: fleet.kill("b")),
            pytest.raises(ExpertsUnavailable, match="MoE layer"),
        ):
            generate(engine, ASKED)


def test_what_cannot_be_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    settings = {"controller": "127.0.0.1:1", "secret_file": str(tmp_path / "absent")}
    with (
        pytest.raises(ConfigError, match="LoRA"),
        remote_engine(DEMO, settings, enable_lora=True),
    ):
        pass
    with pytest.raises(ConfigError, match="secret file"), remote_engine(DEMO, settings):
        pass
    with (
        pytest.raises(ConfigError, match="additional_config"),
        engine_of(DEMO, load_format="raymoe"),
    ):
        pass
