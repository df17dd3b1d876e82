"""The one place where classes become Ray actors, and where their names are made."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, NamedTuple

import psutil
import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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


PENDING, STARTING, RUNNING = "pending", "starting", "running"


class Place(NamedTuple):
    """How far an actor's start is, and where. PENDING: Ray has found no place for it yet (or is
    just starting its process, `pid` 0); STARTING: its constructor runs; RUNNING: that has ended."""

    stage: str
    node: str
    pid: int


def place_of(actor: ActorHandle) -> Place:
    """As Ray's head knows it, whether the actor answers or not."""
    from ray._private.state import actors  # as `ray list actors`, without needing the dashboard

    told = actors(actor._actor_id.hex())
    node, pid = str(told.get("Address", {}).get("NodeID", "")), int(told.get("Pid") or 0)
    if told.get("State") not in ("PENDING_CREATION", "DEPENDENCIES_UNREADY"):
        return Place(RUNNING, node, pid)
    return Place(STARTING, node, pid) if pid else Place(PENDING, "", 0)


def kill_process(pid: int, named: str) -> None:
    """Ends a process of this node that may be stopped, if it is (still) one so named. Ray asks
    an actor to end itself, which a stopped one does not hear."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if named in " ".join(psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)


def kill_anywhere(node: str, pid: int, named: str) -> None:
    """`kill_process`, on whatever node."""
    if node == str(ray.get_runtime_context().get_node_id()):
        kill_process(pid, named)
    else:
        kill_on(node, pid, named)


def kill_on(node: str, pid: int, named: str) -> None:
    """`kill_process` on another node, soon: not waited for."""
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(
        pid, named
    )


def draining_nodes() -> set[str]:
    """Ids of nodes that are about to go (a spot notice, `ray drain-node`, a pod's end)."""
    from ray._private.state import state

    return set(state.get_draining_nodes())
