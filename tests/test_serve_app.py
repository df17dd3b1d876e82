"""The composition root as Ray Serve calls it for a Serve config. Does not start Ray."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as serve_builds

import serve_app
from placement.errors import PlacementError
from raymoe.config import DeploymentConfig

DEMO = str(Path(__file__).resolve().parents[1] / "models" / "demo")


def test_serve_can_call_the_builder() -> None:
    app = serve_builds(serve_app.build, {"model": DEMO, "routers": {"count": 2}})
    gateway = app._bound_deployment
    router = gateway.init_args[2]._bound_deployment
    assert (gateway.name, router.name, router.num_replicas) == ("Gateway", "Router", 2)


def test_routers_scale_by_serves_autoscaling_when_a_maximum_is_set() -> None:
    def router_of(routers: dict[str, Any]) -> Any:
        app = serve_builds(serve_app.build, {"model": DEMO, "routers": routers})
        return app._bound_deployment.init_args[2]._bound_deployment

    fixed = router_of({"count": 2, "drain_s": 7})
    assert fixed.num_replicas == 2 and fixed._deployment_config.autoscaling_config is None
    assert fixed._deployment_config.graceful_shutdown_timeout_s == 12
    scaled = router_of(
        {
            "count": 2,
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 5,
                "target_ongoing_requests": 8,
                "upscale_delay_s": 3,
                "downscale_delay_s": 40,
            },
        }
    )
    config = scaled._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (1, 2, 5)
    assert config.target_ongoing_requests == 8
    assert (config.upscale_delay_s, config.downscale_delay_s) == (3, 40)
    policy = pickle.loads(config.policy.get_serialized_policy_def())
    assert policy.__name__ == "routers_for_load"


def test_only_in_a_serve_config_the_door_is_waited_for() -> None:
    where = {"label_selector": {"pool": "serving"}, "resources": {"slot": 1}}
    app = serve_builds(serve_app.build, {"model": DEMO, "gateway": where})
    door = app._bound_deployment.init_args[3]._bound_deployment
    assert door.name == "Door"
    assert door.ray_actor_options["label_selector"] == {"pool": "serving"}
    assert 0 < door.ray_actor_options["num_cpus"] < 0.1 and not door.ray_actor_options["resources"]
    settings = DeploymentConfig(model=DEMO)
    assert len(serve_app.application(settings, "{}")._bound_deployment.init_args) == 3


def test_arguments_are_checked() -> None:
    with pytest.raises(ValidationError, match="routres"):
        serve_builds(serve_app.build, {"model": DEMO, "routres": {}})


def test_groups_that_are_too_small_are_refused_before_anything_starts() -> None:
    with pytest.raises(PlacementError, match="bytes"):
        serve_builds(serve_app.build, {"model": DEMO, "groups": [{"memory_bytes": 100_000}]})
