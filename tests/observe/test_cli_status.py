"""`raymoe status` as text: what is wrong is said without asking for JSON."""

from __future__ import annotations

from typing import Any

import pytest

import raymoe.http_get
from raymoe.cli import main


def group(name: str, last_error: str) -> dict[str, Any]:
    return {
        "id": name,
        "state": "ready",
        "pid": 7,
        "speed": 1.0,
        "replicas": 3,
        "resident_bytes": 1 << 20,
        "node": "abc",
        "last_error": last_error,
    }


def test_the_problem_and_each_groups_error_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "model": "demo",
        "family": "olmoe",
        "deployment": "d",
        "epoch": 4,
        "balancedness": None,
        "problem": "the drain of g1 waits: 30 bytes are missing",
        "groups": [group("g0", ""), group("g1", "the disk cannot be read")],
        "routers": [],
        "controller": {"state": "ready", "pid": 8},
    }
    monkeypatch.setattr(raymoe.http_get, "get_json", lambda url: told)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PROBLEM: the drain of g1 waits: 30 bytes are missing" in lines
    (at,) = (n for n, line in enumerate(lines) if line.startswith("g1"))
    assert lines[at + 1].strip() == "the disk cannot be read"
    assert sum("disk" in line for line in lines) == 1
