"""Log lines: what is in them, in both formats, and that nothing of a client can forge one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raymoe import logs
from raymoe.config import LoggingConfig
from raymoe.logs import configure, fields

log = logging.getLogger("raymoe.tests")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger("raymoe")
    level = root.level
    yield
    if logs._handler is not None:
        root.removeHandler(logs._handler)
        logs._handler.close()
        logs._handler = None
    root.setLevel(level)


def lines(folder: Path, **settings: Any) -> list[str]:
    """What is in the file of a process after a few calls."""
    epoch = iter(range(7, 99))
    config = LoggingConfig(folder=str(folder), **settings)
    configure(config, "router", "d", lambda: {"router": "r1", "epoch": next(epoch)})
    log.debug("too little")
    log.info("a request %s", "began", extra=fields(request_id="a\nb", trace_id="", tokens=0))
    log.warning("lost", extra=fields(group="g1", epoch=3, message="not this one"))
    try:
        raise ValueError("oh")
    except ValueError:
        log.exception("it failed")
    (file,) = folder.glob("router-*.log")
    return file.read_text().splitlines()


def test_json_lines(tmp_path: Path) -> None:
    began, lost, failed = (json.loads(line) for line in lines(tmp_path, format="json"))
    assert began["time"].endswith("Z") and began["level"] == "info"
    assert began["process"] == "router" and began["deployment"] == "d" and began["pid"] > 0
    assert began["message"] == "a request began" and began["logger"] == "raymoe.tests"
    assert began["request_id"] == "a\nb" and began["router"] == "r1" and began["epoch"] == 7
    assert began["tokens"] == 0 and "trace_id" not in began
    assert (lost["group"], lost["epoch"], lost["message"]) == ("g1", 3, "lost")
    assert failed["level"] == "error" and "ValueError: oh" in failed["exception"]


def test_text_lines(tmp_path: Path) -> None:
    found = lines(tmp_path)
    assert "a request began" in found[0] and 'request_id="a\\nb"' in found[0]
    assert "epoch=7" in found[0] and "WARNING" in found[1] and "group=g1" in found[1]
    assert found[-1] == "ValueError: oh"


def test_the_level_is_heeded_and_configuring_again_replaces(tmp_path: Path) -> None:
    lines(tmp_path / "first")
    found = lines(tmp_path / "second", level="warning", format="json")
    assert [json.loads(line)["level"] for line in found] == ["warning", "error"]
    (first,) = (tmp_path / "first").glob("*.log")
    assert "ValueError" in first.read_text() and len(first.read_text().splitlines()) < 12


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    configure(LoggingConfig(folder=str(tmp_path / "file" / "logs")), "group", "d")
    log.info("goes on")
    said = capsys.readouterr().err
    assert "logging.folder" in said and "goes on" in said


def test_surroundings_that_fail_cost_no_line(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise AttributeError("not there yet")

    configure(LoggingConfig(folder=str(tmp_path), format="json"), "group", "d", broken)
    log.info("still")
    (file,) = tmp_path.glob("*.log")
    assert json.loads(file.read_text())["message"] == "still"
