"""Starting with impossible settings says so in one sentence; stopping leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import DEMO, Deployment, run_raymoe


def refused(*arguments: str) -> str:
    """The one sentence with which `raymoe serve` ends."""
    done = run_raymoe("serve", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    sentence = [line for line in done.stderr.splitlines() if line.startswith("raymoe:")]
    assert len(sentence) == 1, done.stderr
    return sentence[0]


def test_port_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refused(str(DEMO), "--port", str(port))


def test_checkpoint_missing() -> None:
    assert "no-such-model" in refused("./no-such-model")


def test_checkpoint_corrupt(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "model.safetensors" in refused(str(tmp_path / "m"))


def test_not_an_moe(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "m")
    config = json.loads((DEMO / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "expert" in refused(str(tmp_path / "m")).lower()


def test_zero_groups() -> None:
    assert "groups" in refused(str(DEMO), "--groups", "0")


def test_unknown_setting(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": str(DEMO), "gruops": 2}))
    assert "gruops" in refused("--config", str(tmp_path / "c.yaml"))


def test_no_model() -> None:
    assert "model" in refused()


def test_budget_too_small_says_by_how_many_bytes(tmp_path: Path) -> None:
    groups = [{"kind": "small", "count": 2, "memory_bytes": 4_000_000}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": str(DEMO), "groups": groups}))
    assert "bytes" in refused("--config", str(tmp_path / "c.yaml"))


@pytest.mark.ray
def test_interrupted_while_it_starts() -> None:
    running = Deployment(str(DEMO))
    assert running.process.stdout is not None
    for line in running.process.stdout:
        if line.startswith("starting"):
            break
    assert running.stop(signal.SIGINT) < 20
