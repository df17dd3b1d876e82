"""The expert-group actor: a thin shell around `GroupRuntime`, one a device.

Imports torch and safetensors, never transformers: a group starts fast and stays small.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
import torch

from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_secret
from raymoe.errors import ConfigError
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.identity import identity_of
from raymoe.links.link import SlotTerms
from raymoe.table import GroupEndpoint


class ExpertGroup:
    """Holds replicas within a byte budget and computes them for every router.

    Calls through Ray are control only; tokens come over links of the group's own.
    """

    def __init__(
        self,
        *,
        group_id: str,
        incarnation: int,
        config: dict[str, Any],
        spec_json: str,
        memory_bytes: int,
        device: str,
        slowdown: float,
    ) -> None:
        torch.set_num_threads(1)
        checked = DeploymentConfig.model_validate(config)
        spec = ModelSpec.from_json(spec_json)
        if device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"group {group_id}: device {device!r} is not to be had here")
        self._ended = threading.Event()
        self._node = _node_id()
        plane = checked.data_plane
        self._runtime = GroupRuntime(
            spec=spec,
            group_id=group_id,
            incarnation=incarnation,
            shard=ExpertShard(spec, memory_bytes, device=device),
            identity=identity_of(checked, spec),
            secret=read_secret(checked),
            node=self._node,
            host=ray.util.get_node_ip_address() if plane.host == "node" else plane.host,
            terms=slot_terms(checked),
            slowdown=slowdown,
        )
        self._runtime.start()

    def describe(self) -> dict[str, Any]:
        """Who and where this group is, how fast, and what it holds already."""
        return {
            "endpoint": self._runtime.endpoint().to_dict(),
            "pid": os.getpid(),
            "node": self._node,
            "speed": self._runtime.measure_speed(),
            "resident": self._runtime.resident(),
            "resident_bytes": self._runtime.resident_bytes,
        }

    def load(self, pairs: list[tuple[int, int]]) -> int:
        """Loads replicas (layer, expert) from the checkpoint; the bytes then resident."""
        for layer, expert in pairs:
            self._runtime.add_from_checkpoint(layer, expert)
        return self._runtime.resident_bytes

    def copy(self, pairs: list[tuple[int, int]], source: dict[str, Any]) -> int:
        """Copies replicas from another group's memory; the bytes then resident."""
        endpoint = GroupEndpoint.from_dict(source)
        for layer, expert in pairs:
            self._runtime.add_from_peer(layer, expert, endpoint)
        return self._runtime.resident_bytes

    def drop(self, pairs: list[tuple[int, int]]) -> int:
        """Frees replicas; the bytes then resident."""
        for layer, expert in pairs:
            self._runtime.drop(layer, expert)
        return self._runtime.resident_bytes

    def report(self) -> dict[str, Any]:
        """Counts, timings and bytes since the last report."""
        return self._runtime.report()

    def hold(self) -> None:
        """Returns when the group is closed. A caller left waiting learns of a death at once."""
        self._ended.wait()

    def close(self) -> None:
        """Ends every link and the compute thread."""
        self._runtime.close()
        self._ended.set()


def slot_terms(config: DeploymentConfig) -> SlotTerms:
    """What a link of this deployment may carry at once."""
    plane = config.data_plane
    return SlotTerms(
        slots=plane.slots,
        request_bytes=plane.slot_bytes + (plane.slot_bytes >> 4),
        reply_bytes=plane.slot_bytes,
    )


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
