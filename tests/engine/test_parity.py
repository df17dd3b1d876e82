"""Families against stock transformers: greedy tokens of ragged prompts that join and leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymoe.checkpoint.families import load_config, model_class
from raymoe.engine.cached import CachedModel
from raymoe.engine.paged import PagedModel
from tests.checkpoint.parity import NEAR_TIE
from tests.devices import HAS_CUDA
from tests.engine.support import Outcome, finish, generate, local_engine, prompt, request
from tests.zoo import FAMILIES, REQUIRED, tiny_checkpoint

# Beyond the promised families, one of each further kind of attention.
MORE = ("mimo_v2_flash", "longcat_flash", "gemma4_text", "flint")
SLOW = ("qwen3_next", "jamba", "minimax", "deepseek_v32")

ON_DEVICE = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "gemma4_text")

PROMPTS = (3, 40, 17, 50)  # one and a half of the tiny sliding window
NEW = (12, 4, 8, 6)


def compare(family: str, folder: Path, kind: type, device: str = "cpu") -> None:
    path = tiny_checkpoint(family, folder)
    stock: Any = model_class(load_config(path))
    stock = stock.from_pretrained(path, dtype="float32").eval().to(device)
    engine = local_engine(path, device, chunk_tokens=24, max_batch=3, kv_bytes=4 << 20)
    assert isinstance(engine._model, kind)
    requests = [
        request(str(n), prompt(PROMPTS[n], n), max_tokens=NEW[n], min_tokens=NEW[n],
                ignore_eos=False)
        for n in range(4)
    ]  # fmt: skip
    outcomes = {str(n): Outcome() for n in range(4)}
    for each in requests[:2]:
        engine.add(each)
    for _ in range(3):
        for event in engine.step():
            outcomes[event.request_id].take(event)
    for each in requests[2:]:
        engine.add(each)
    finish(engine, outcomes)
    near_ties = 0
    for n in range(4):
        tokens, logits = generate(stock, prompt(PROMPTS[n], n), NEW[n])
        found = outcomes[str(n)].tokens
        assert len(found) == len(tokens)
        if found != tokens:
            at = next(at for at in range(NEW[n]) if found[at] != tokens[at])
            best = logits[at].topk(2).values
            assert best[0] - best[1] < NEAR_TIE, f"prompt {n} differs at token {at}"
            near_ties += 1
    print(f"{family}: 4 prompts, {near_ties} near-ties")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parity
@pytest.mark.parametrize("family", [*REQUIRED, *MORE])
def test_packed_families(family: str, folder: Path) -> None:
    compare(family, folder, PagedModel)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device here")
@pytest.mark.parametrize("family", ON_DEVICE)
def test_families_on_a_device(family: str, folder: Path) -> None:
    """Float32 without TF32, which is how torch starts."""
    assert not torch.backends.cuda.matmul.allow_tf32
    compare(family, folder, PagedModel, "cuda")


@pytest.mark.parity
@pytest.mark.parametrize("family", SLOW)
def test_families_with_other_state(family: str, folder: Path) -> None:
    assert family in FAMILIES
    compare(family, folder, CachedModel)
