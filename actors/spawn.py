"""The one place where classes become Ray actors, and where their names are made."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle

NAMESPACE = "raymoe"


def deployment_prefix(deployment: str) -> str:
    """What the names of all actors of a deployment begin with."""
    return f"raymoe:{deployment}:"


def controller_name(deployment: str) -> str:
    """The named actor that is a deployment's placement controller."""
    return f"{deployment_prefix(deployment)}controller"


def group_name(deployment: str, group_id: str, incarnation: int) -> str:
    """The named actor that is one life of an expert group."""
    return f"raymoe:{deployment}:group:{group_id}:{incarnation}"


def find(name: str) -> ActorHandle:
    """Handle of a named actor of ours; raises `ValueError` when there is none."""
    return ray.get_actor(name, namespace=NAMESPACE)


def names_alive() -> set[str]:
    """Names of all our actors that run on the cluster."""
    listed = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in listed if actor["namespace"] == NAMESPACE}


def spawn(plain: type, name: str, options: dict[str, Any], **arguments: Any) -> ActorHandle:
    """A detached, named actor of the plain class, or the one that has the name already.

    Detached, because the children of a Serve replica die when Serve redeploys it.
    """
    return (
        ray.remote(plain)
        .options(name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, **options)
        .remote(**arguments)
    )


def is_pending(actor: ActorHandle) -> bool:
    """Ray has not found a place for this actor yet (or is just starting its process)."""
    from ray._private.state import actors  # as `ray list actors`, without needing the dashboard

    return bool(
        actors(actor._actor_id.hex()).get("State") in ("PENDING_CREATION", "DEPENDENCIES_UNREADY")
    )


def draining_nodes() -> set[str]:
    """Ids of nodes that are about to go (a spot notice, `ray drain-node`, a pod's end)."""
    from ray._private.state import state

    return set(state.get_draining_nodes())
