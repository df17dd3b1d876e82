"""Serve's autoscaling asks for routers by what routers report. Serve's own code, without Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from actors.router_scaling import REQUESTS, routers_for_load, serve_options
from raymoe.config import RoutersConfig

ROUTERS = RoutersConfig.model_validate(
    {
        "count": 2,
        "autoscaling": {
            "max_replicas": 4,
            "target_ongoing_requests": 10,
            "upscale_delay_s": 5,
            "downscale_delay_s": 60,
            "look_back_period_s": 30,
        },
    }
)
CONFIG = AutoscalingConfig(**serve_options(ROUTERS)["autoscaling_config"])


def context(
    reported: dict[str, float], running: int, *, target: int | None = None, state: Any = None
) -> AutoscalingContext:
    """What Serve's controller tells the policy; routers are called r0, r1 ..."""
    names: Any = [f"r{n}" for n in range(running)]
    return AutoscalingContext(
        deployment_id=None,  # type: ignore[arg-type]
        deployment_name="Router",
        app_name="raymoe",
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=names,
        total_num_requests=0.0,  # nothing goes through its handles
        total_queued_requests=0.0,
        aggregated_metrics={REQUESTS: reported} if reported else {},  # type: ignore[dict-item]
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=CONFIG,
    )


@pytest.mark.parametrize(
    ("reported", "running", "wanted"),
    [
        ({"r0": 10.0}, 1, 1.0),
        ({"r0": 11.0}, 1, 1.1),  # Serve rounds up
        ({"r0": 30.0, "r1": 4.0}, 2, 3.4),
        ({"r0": 0.0, "r1": 0.0}, 2, 0.0),  # Serve keeps its minimum
        ({"r0": 0.0}, 2, 2.0),  # the other has not reported: it may be busy
        ({"r0": 35.0}, 2, 3.5),
        ({}, 3, 3.0),
    ],
)
def test_routers_by_their_requests(reported: dict[str, float], running: int, wanted: float) -> None:
    assert routers_for_load(context(reported, running))[0] == pytest.approx(wanted)


def test_none_is_ended_while_others_start() -> None:
    assert routers_for_load(context({"r0": 25.0}, 1, target=3))[0] == 2.5
    assert routers_for_load(context({}, 0, target=2))[0] == 2


def test_serves_delays_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within Serve's own wrapper, as its controller calls it."""
    policy = _apply_autoscaling_config(CONFIG.policy.get_policy())
    clock = [1000.0]
    monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: clock[0])
    state: dict[str, Any] = {}

    def decide(reported: dict[str, float], running: int) -> int:
        nonlocal state
        wanted, state = policy(context(reported, running, state=state))
        return wanted

    assert decide({"r0": 21.0}, 1) == 1
    clock[0] += 4
    assert decide({"r0": 21.0}, 1) == 1
    clock[0] += 2
    assert decide({"r0": 21.0}, 1) == 3
    assert decide({"r0": 1.0, "r1": 0.0, "r2": 0.0}, 3) == 3
    clock[0] += 59
    assert decide({"r0": 1.0, "r1": 0.0, "r2": 0.0}, 3) == 3
    clock[0] += 2
    assert decide({"r0": 1.0, "r1": 0.0, "r2": 0.0}, 3) == 1


def test_the_policy_needs_no_package_of_ours_where_serves_controller_runs(tmp_path: Path) -> None:
    pickled = tmp_path / "policy"
    pickled.write_bytes(CONFIG.policy.get_serialized_policy_def() or b"")
    code = """
import pickle, sys
from types import SimpleNamespace as N
sys.modules.update(actors=None, raymoe=None, placement=None)  # importing them fails
policy = pickle.load(open(sys.argv[1], "rb"))
reported = {"raymoe_requests": {"r0": 30.0}}
asked = N(aggregated_metrics=reported, target_num_replicas=1, running_replicas=["r0"],
          config=N(target_ongoing_requests=10))
print(policy(asked))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(pickled)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "(3.0, {})", done.stderr


def test_without_a_maximum_the_count_is_fixed() -> None:
    assert serve_options(RoutersConfig(count=3)) == {"num_replicas": 3}
