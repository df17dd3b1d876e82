"""What the settings make of the reconciler's."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.settings import reconcile_config
from raymoe.config import load_config
from tests.group.small_model import write_checkpoint


@pytest.mark.parametrize(
    ("experts_a_s", "at_once"), [(0.1, 1), (1.75, 3), (1000.0, 32), (None, 32)]
)
def test_a_call_takes_two_seconds_of_copying_at_most(
    tmp_path: Path, experts_a_s: float | None, at_once: int
) -> None:
    spec = write_checkpoint(tmp_path)
    limit = None if experts_a_s is None else experts_a_s * max(spec.expert_bytes)
    settings = {"model": spec.path, "placement": {"copy_bytes_per_s": limit}}
    assert reconcile_config(load_config(None, settings), spec).loads_per_group == at_once
