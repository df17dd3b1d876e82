"""One real deployment a session: `raymoe serve` as a child process, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.local import free_port
from tests.e2e.collector import Collector, collecting

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"


class Deployment:
    """A running `raymoe serve`: its process, its port, what it printed."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*RAYMOE, "serve", *arguments, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", **(env or {})},
        )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("ready:"):
                return
        pytest.fail("raymoe serve ended before it was ready:\n" + "\n".join(self.lines))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self, signum: int = signal.SIGTERM) -> float:
        """Seconds until it had ended; fails the test when it does not, or leaves something."""
        tree = self.tree()
        memory = set(os.listdir("/dev/shm"))
        started = time.monotonic()
        self.process.send_signal(signum)
        out, _ = self.process.communicate(timeout=60)
        self.lines += out.splitlines()
        seconds = time.monotonic() - started
        _, alive = psutil.wait_procs(tree, timeout=1)
        assert not alive, f"left behind: {[p.cmdline() for p in alive]}"
        left = set(os.listdir("/dev/shm")) - memory
        assert not {name for name in left if not _in_use(f"/dev/shm/{name}")}
        assert self.process.returncode == 0, "\n".join(self.lines)
        return seconds


def _in_use(path: str) -> bool:
    """Whether a running process has it open or mapped: then it is not ours, ours have ended."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if path in Path(f"/proc/{process.pid}/maps").read_text():
                return True
            if any(opened.path == path for opened in process.open_files()):
                return True
    return False


RAYMOE = [sys.executable, "-m", "raymoe.cli"]


def run_raymoe(
    *arguments: str, timeout_s: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One raymoe command to its end."""
    return subprocess.run(
        [*RAYMOE, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_s,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", **(env or {})},
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray of their own come before those that share one: two deployments at once
    on two cores only slow each other down."""
    items.sort(
        key=lambda item: (
            "tests/e2e/" in item.path.as_posix()
            and "deployment" in getattr(item, "fixturenames", ())
        )
    )


@pytest.fixture(scope="package")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of `deployment` log, in JSON, each request too."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """What `deployment` sends its spans to."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="package")
def deployment(log_folder: Path, collector: Collector) -> Iterator[Deployment]:
    """The demo model on three groups and two routers; shared by the tests of this folder."""
    logs = ("--log-format", "json", "--log-requests", "--log-folder", str(log_folder))
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    running = Deployment(str(DEMO), "--groups", "3", "--routers", "2", *logs, env=env)
    try:
        running.wait_ready()
        yield running
        running.stop()
        noise = [line for line in running.lines if "(raylet)" in line or "Traceback" in line]
        assert not noise, "an operator has to read this"
    finally:
        if running.process.poll() is None:
            running.process.kill()
