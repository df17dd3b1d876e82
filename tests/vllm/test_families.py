"""Every family said to be supported: tiny random checkpoints, greedy tokens as stock vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymoe.vllm_plugin.supported import FAMILIES
from tests.vllm.engines import differences, engine_of, generate, prompts, remote_engine, remote_of
from tests.vllm.groups import Fleet
from tests.zoo import VOCAB, tiny_checkpoint

SHAPE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""vLLM's attention on the CPU has no heads of 16."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_are_those_of_stock_vllm(family: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(family, tmp_path, **SHAPE)
    asked = prompts(VOCAB)
    options = {"skip_tokenizer_init": True}
    with engine_of(model, **options) as engine:
        reference = generate(engine, asked)
    fleet = Fleet(model, {"a": lambda layer, e: (layer + e) % 2 == 0, "b": lambda *_: True})
    try:
        with remote_engine(model, fleet.settings(tmp_path / "secret"), **options) as engine:
            fleet.wait_until_used()
            (names,) = engine.apply_model(lambda model: [n for n, _ in model.named_parameters()])
            assert names and not [n for n in names if "experts" in n and "shared" not in n]
            assert differences(reference, generate(engine, asked)) == []
            assert remote_of(engine).client.stats.batches > 24
        if family == "qwen2_moe":  # the one with a shared expert, compiled too
            compiled = {**options, "enforce_eager": False}
            with remote_engine(model, fleet.settings(tmp_path / "secret"), **compiled) as engine:
                assert differences(reference, generate(engine, asked)) == []
                assert remote_of(engine).client.stats.batches > 24
    finally:
        fleet.close()
