"""docs/capacity.md: its inputs are taken as they stand there, and the sentences come true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raymoe.cli import main

DOC = (Path(__file__).resolve().parents[2] / "docs" / "capacity.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOC, re.S)
    assert found is not None
    return found[1]


def test_three_groups_cannot_lose_one_and_four_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})  # writes counts.npz
    four = block("yaml")
    Path("four.yaml").write_text(four)
    Path("three.yaml").write_text(re.sub(r".*id: d0.*\n", "", four))
    said = {}
    for fleet in ("three", "four"):
        arguments = ["--load", "counts.npz", "--fleet", f"{fleet}.yaml"]
        assert main(["plan", *arguments, "--window-s", "30"]) in (0, 2)
        done = capsys.readouterr()
        said[fleet] = done.out + done.err
    assert "1730000000 bytes are missing" in said["three"] and "1730000000" in DOC
    assert "bytes are missing" not in said["four"]
