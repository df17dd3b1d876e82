"""`raymoe record`: what it makes of what GET /placement says over time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raymoe.cli import main
from raymoe.cli_record import rates_of, record
from raymoe.errors import ConfigError


def placement(*rows: list[float]) -> dict[str, Any]:
    return {"layers": [{"experts": [{"load": load} for load in row]} for row in rows]}


def test_counts_are_the_windows_means() -> None:
    said = iter([placement([1, 2], [3]), placement([3, 2], [5]), placement([0, 0], [0])] * 2)
    slept: list[float] = []
    counts = record(lambda: next(said), 3, 2, 10.0, slept.append)
    assert counts.dtype == np.int64 and counts.shape == (3, 2, 2)
    assert counts[0].tolist() == [[20, 20], [40, 0]]
    assert counts[1].tolist() == [[5, 10], [15, 0]]
    assert slept == [5.0] * 6


def test_a_deployment_that_starts_or_is_replaced() -> None:
    with pytest.raises(ConfigError, match="still starting"):
        rates_of([])
    said = iter([placement([1.0]), placement([1.0], [2.0])])
    with pytest.raises(ConfigError, match="record again"):
        record(lambda: next(said), 1, 2, 1.0, lambda s: None)


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--out", "x.npz", "--seconds", "5", "--window-s", "10"]) == 2
    assert "at least one window" in capsys.readouterr().err
    arguments = ["record", "--out", "x.npz", "--seconds", "1", "--window-s", "1", "--port", "1"]
    assert main(arguments) == 2
    assert "no raymoe answers" in capsys.readouterr().err
