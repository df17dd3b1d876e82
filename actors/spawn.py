"""The one place where classes become Ray actors, and where their names are made."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle

from actors.controller import PlacementController
from actors.expert_group import ExpertGroup
from raymoe.config import DeploymentConfig, GroupsConfig

NAMESPACE = "raymoe"


def controller_name(deployment: str) -> str:
    """The named actor that is a deployment's placement controller."""
    return f"raymoe:{deployment}:controller"


def group_name(deployment: str, group_id: str, incarnation: int) -> str:
    """The named actor that is one life of an expert group."""
    return f"raymoe:{deployment}:group:{group_id}:{incarnation}"


def find_controller(deployment: str) -> ActorHandle:
    """Handle of the running controller; raises `ValueError` when there is none."""
    return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)


def spawn_controller(config: DeploymentConfig, spec_json: str) -> ActorHandle:
    """The deployment's controller, started if it is not there yet.

    Detached, because children of a Serve replica die when Serve redeploys it; restarted by Ray
    when its process dies, and then it finds its groups again by name.
    """
    return (
        ray.remote(PlacementController)
        .options(
            name=controller_name(config.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            num_cpus=0,
            max_concurrency=1000,
        )
        .remote(config.model_dump(mode="json"), spec_json)
    )


def spawn_group(
    config: DeploymentConfig, kind: GroupsConfig, group_id: str, incarnation: int, **kwargs: Any
) -> ActorHandle:
    """A new expert-group actor on a node that has what its kind asks for.

    `max_restarts=0`: the controller sees the death of a group that Ray does not restart within
    milliseconds, and decides itself where its experts come back.
    """
    return (
        ray.remote(ExpertGroup)
        .options(
            name=group_name(config.name, group_id, incarnation),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            num_cpus=kind.num_cpus,
            num_gpus=kind.num_gpus,
            resources=kind.resources or None,
            label_selector=kind.label_selector or None,
            max_concurrency=8,
        )
        .remote(group_id=group_id, incarnation=incarnation, **kwargs)
    )
