"""`raymoe top` and `raymoe explain` against a made-up fleet over HTTP; a real pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from raymoe.cli import main
from raymoe.cli_explain import age
from raymoe.cli_top import bar, screen, spark
from tests.ui.browser import Server
from tests.ui.fleet import START, FakeFleet
from tests.ui.test_hub import page_app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fleet() -> FakeFleet:
    fleet = FakeFleet()
    for _ in range(10):
        fleet.look()
    fleet.add(2, 5, 0, "layer 2 was slowest")
    fleet.look()
    return fleet


@pytest.fixture(scope="module")
def port(fleet: FakeFleet) -> Iterator[str]:
    def app_of() -> FastAPI:
        app = page_app(fleet)

        @app.get("/placement")
        async def placement() -> dict[str, Any]:
            share = {"share": 0.5, "since": time.time() - 300}
            replicas = [{"group": g, "why": f"reason {g}", **share} for g in ("g0", "g2")]
            row = {"expert": 0, "load": 30.0, "replicas": replicas}
            lost = {"expert": 1, "load": 10.0, "replicas": []}
            return {"epoch": 9, "layers": [{"layer": 0, "name": "mlp", "experts": [row, lost]}]}

        return app

    server = Server(app_of)
    yield str(server.port)
    server.stop()


def test_top_once_shows_the_fleet(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--layer", "2", "--port", port]) == 0
    out = capsys.readouterr().out
    assert "demo (qwen3_moe)" in out and "ready" in out
    for group in ("g0", "g1", "g2"):
        assert sum(line.startswith(group) for line in out.splitlines()) == 2, "fleet and experts"
    assert "layer 2 expert 5 added on g0: layer 2 was slowest" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["top", "--once", "--layer", "6"], "no MoE layer 6"),
        (["top", "--once", "--layer", "-1"], "--layer"),
        (["top"], "--once"),
        (["explain", "1", "0"], "from 0 to 0"),
        (["explain", "0", "2"], "from 0 to 1"),
    ],
)
def test_bad_words_are_refused_with_what_to_do(
    port: str, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([*words, "--port", port]) == 2
    assert said in capsys.readouterr().err


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["top", "--once"], ["explain", "0", "0"]):
        assert main([*words, "--port", "1"]) == 2
        assert "no raymoe answers" in capsys.readouterr().err


def test_explain(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "0", "0", "--port", port]) == 0
    out = capsys.readouterr().out
    assert "75.0 % of its layer (even: 50.0 %), number 1 of 2" in out
    assert "g2        50.0 % of its pairs, since 5 min ago: reason g2" in out
    assert main(["explain", "0", "1", "--url", f"http://127.0.0.1:{port}/"]) == 0
    assert "no ready replica" in capsys.readouterr().out
    assert main(["explain", "0", "0", "--json", "--port", port]) == 0
    assert json.loads(capsys.readouterr().out)["replicas"][1]["group"] == "g2"
    assert [age(s) for s in (-1, 119, 120, 7200, 200000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]


def test_a_screen_fits_whatever_the_terminal(fleet: FakeFleet) -> None:
    view: dict[str, Any] = {
        **fleet.observer.view(0, 0.0, [2]),
        "status": fleet.status(),
    }
    view["layer"] = {"index": 2, **view["layers"]["2"]}
    for columns in (20, 40, 80, 200):
        for rows in (10, 24, 60):
            for more in ({}, {"trouble": "x" * 300}):
                lines = screen({**view, **more}, (columns, rows), help_line=True)
                assert len(lines) <= rows and max(map(len, lines)) <= columns
                assert lines[-1].startswith("q: end")
    empty = {**view, "history": [], "events": [], "group_load": {}, "layer_balancedness": {}}
    empty |= {"layer": {"index": 0, "groups": [], "load": [], "replicas": []}}
    empty["status"] = {**view["status"], "groups": [], "routers": [], "balancedness": None}
    assert "  none yet" in screen(empty, (100, 40))
    assert START > 0 and bar(0, 0, 4) == "····" and spark([0, 1, 2]) == " ▄█"


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_top_ends_on_a_key_and_leaves_the_terminal_as_it_was(port: str, key: bytes) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "raymoe.cli", "top", "--port", port])
    seen, pressed = b"", False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                got = os.read(fd, 65536)
            except OSError:  # the child has closed its end
                break
            if not got:
                break
            seen += got
        if not pressed and b"q: end" in seen:
            os.write(fd, key)
            pressed = True
    else:
        os.kill(pid, signal.SIGKILL)  # it would wait for somebody to read
    assert pressed, seen
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0
    assert seen.count(b"\x1b[?1049h") == 1 and seen.rstrip().endswith(b"\x1b[?1049l")


def test_help_names_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raymoe.cli", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert "top" in done.stdout and "explain" in done.stdout
