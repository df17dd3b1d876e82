"""Starting with impossible settings says so in one sentence; stopping leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from actors.local import check_port_free, free_port
from tests.e2e.conftest import DEMO, RAYMOE, ROOT, Deployment, run_raymoe


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


def test_tokenizer_missing(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer.json" in refused(str(tmp_path / "m"))


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


def test_temp_dir_missing(tmp_path: Path) -> None:
    settings = {"model": str(DEMO), "ray": {"temp_dir": "/nonexistent"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert "ray.temp_dir" in refused("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_imports(signum: int) -> None:
    starting = subprocess.Popen(
        [*RAYMOE, "serve", str(DEMO)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    _await_handler(starting.pid, signum)
    starting.send_signal(signum)
    out, _ = starting.communicate(timeout=60)
    assert starting.returncode == 0, out
    assert "Traceback" not in out


def _await_handler(pid: int, signum: int) -> None:
    """Waits until the command line is there; Python's own start is before any handler of ours.

    Python handles SIGINT from the beginning, so SIGTERM, set last of the two, is looked at.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & (1 << (signal.SIGTERM - 1)):
            return
        time.sleep(0.01)
    pytest.fail("no handler for SIGTERM within a minute")


@pytest.mark.ray
def test_a_router_that_cannot_start_says_why(tmp_path: Path) -> None:
    settings = {"model": str(DEMO), "groups": 1, "routers": {"kv_bytes": 1000}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    port = str(free_port())
    assert "kv_bytes" in refused("--config", str(tmp_path / "c.yaml"), "--port", port)


@pytest.mark.ray
def test_the_end_of_ray_is_noticed() -> None:
    running = Deployment(str(DEMO), "--groups", "1")
    running.wait_ready()
    tree = running.tree()
    for process in tree:
        if process.name() == "gcs_server":
            process.kill()
    out, _ = running.process.communicate(timeout=60)
    assert running.process.returncode == 2
    assert "raymoe: Ray does not answer any more" in out
    kept = next(line for line in out.splitlines() if line.startswith("Ray's logs are kept in "))
    folder = Path(kept.removeprefix("Ray's logs are kept in "))
    assert folder.is_dir()
    assert not (folder.parent / "secret").exists()
    shutil.rmtree(folder.parent)
    assert not psutil.wait_procs(tree, timeout=2)[1]


@pytest.mark.ray
def test_a_stream_ends_before_the_stop_does() -> None:
    """And a start removes what a killed one has left: its proxy held the port."""
    killed = Deployment(str(DEMO), "--groups", "1")
    killed.wait_ready()
    killed.process.kill()
    killed.process.wait()
    running = Deployment(str(DEMO), "--groups", "1")
    running.wait_ready()
    assert any(line.startswith("removed /") for line in running.lines)
    check_port_free("127.0.0.1", killed.port)
    body = {"model": "demo", "prompt": "In the", "max_tokens": 24, "stream": True}
    request = urllib.request.Request(
        running.url + "/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        running.process.send_signal(signal.SIGTERM)
        events = [line for line in answer if line.startswith(b"data:")]
    assert events[-1].strip() == b"data: [DONE]"
    running.process.communicate(timeout=30)
    assert running.process.returncode == 0


@pytest.mark.ray
def test_interrupted_while_it_starts() -> None:
    running = Deployment(str(DEMO))
    assert running.process.stdout is not None
    for line in running.process.stdout:
        if line.startswith("starting"):
            break
    assert running.stop(signal.SIGINT) < 20
