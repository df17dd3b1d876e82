"""Everything the controller asks of Ray about groups, in one object that tests can stand in for."""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.expert_group import ExpertGroup
from actors.fleet import Calls
from actors.gentle_group import GentleExpertGroup
from actors.head import Head
from actors.spawn import (
    Place,
    draining_nodes,
    find,
    kill_on,
    kill_process,
    names_alive,
    place_of,
    spawn,
)

_PROCESS = "ExpertGroup"  # part of what Ray calls the process of a group


class RayCluster:
    """Group actors by name: started, found, ended."""

    def __init__(self, head: Head) -> None:
        self.calls = Calls()
        self._head = head

    def names_alive(self) -> set[str]:
        """Names of all our actors that run."""
        return self._head.ask(names_alive)

    def find(self, name: str) -> ActorHandle:
        """A running actor; raises `ValueError` when there is none."""
        return self._head.ask(partial(find, name))

    def start_group(
        self, name: str, options: dict[str, Any], gentle: bool, **arguments: Any
    ) -> ActorHandle:
        """A new expert group, or the one that has the name already. `gentle`: others serve all
        experts, and are to keep their cores meanwhile."""
        plain = GentleExpertGroup if gentle else ExpertGroup
        # one that comes up after all has been given up: another life has its place
        return self._head.ask(partial(spawn, plain, name, options, **arguments), ray.kill)

    def place_of(self, actor: ActorHandle) -> Place:
        """How far its start is, and where."""
        return self._head.ask(partial(place_of, actor))

    def draining_nodes(self) -> set[str]:
        """Ids of nodes that are about to go."""
        return self._head.ask(draining_nodes)

    def kill(self, actor: ActorHandle) -> None:
        """Ends it; not restarted. Ray's head does it, soon: not waited for."""
        self._head.tell(partial(ray.kill, actor))

    def kill_frozen(self, actor: ActorHandle, node: str, pid: int) -> None:
        """Ends one that may not answer, on whatever node (`pid` 0: it has no process yet)."""
        self.kill(actor)
        if node == str(ray.get_runtime_context().get_node_id()):
            kill_process(pid, _PROCESS)  # also while the head is away
        elif pid:
            self._head.tell(partial(kill_on, node, pid, _PROCESS))

    def close_all(self, actors: list[ActorHandle], patience_s: float) -> None:
        """Asks all to close, waits for that, and ends them. Not for the control loop: it waits for
        Ray's head, as long as that takes."""
        refs = [actor.close.remote() for actor in actors]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=patience_s)
        for actor in actors:
            ray.kill(actor)

    def died(self, error: Exception | None) -> bool:
        """A call ended like this because its actor did."""
        return isinstance(error, ray.exceptions.RayActorError)
