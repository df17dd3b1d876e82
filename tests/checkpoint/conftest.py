from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.spec import ModelSpec
from tests.zoo import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny checkpoints that tests only read."""
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="session")
def qwen3(checkpoints: Path) -> Path:
    """A tiny Qwen3-MoE in bfloat16, in several files with an index."""
    folder = checkpoints / "bf16"
    folder.mkdir()
    return tiny_checkpoint("qwen3_moe", folder, dtype="bfloat16", max_shard_size="150KB")


@pytest.fixture(scope="session")
def qwen3_spec(qwen3: Path) -> ModelSpec:
    return read_spec(qwen3)
