"""The expert-group actor: a thin shell around `GroupRuntime`, one a device.

Imports torch and safetensors, never transformers: a group starts fast and stays small.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
import torch

from raymoe.checkpoint.record import check_files, close_files
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_secret
from raymoe.errors import ConfigError
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.identity import identity_of
from raymoe.links.link import SlotTerms
from raymoe.links.server import ServerConfig
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
        check_files(spec)  # this node's copy must be the checkpoint the others serve
        self._ended = threading.Event()
        self._node, address = _where()
        self._runtime = GroupRuntime(
            spec,
            group_id,
            incarnation,
            ExpertShard(spec, memory_bytes, device=device),
            identity_of(checked, spec),
            read_secret(checked),
            slowdown,
            node=self._node,
            config=server_config(checked, address),
        )
        # once, before there is traffic to be held up or to bend the figure
        self._speed = 64 / self._runtime.measure_speed().seconds(64, 8)

    def ping(self) -> None:
        """Answers: this process is not hung."""

    def describe(self) -> dict[str, Any]:
        """Who and where this group is, how fast, and what it holds already.

        `speed` is pairs/s of a message of 64 pairs over 8 experts: what decoding mostly sends.
        """
        report = self._runtime.report()
        return {
            "endpoint": self._runtime.endpoint().to_dict(),
            "pid": os.getpid(),
            "node": self._node,
            "speed": self._speed,
            "resident": report.resident,
            "resident_bytes": report.resident_bytes,
        }

    def load(self, pairs: list[tuple[int, int]]) -> int:
        """Loads replicas (layer, expert) from the checkpoint; the bytes then resident."""
        for layer, expert in pairs:
            self._runtime.add_from_checkpoint(layer, expert)
        close_files()  # their pages would count as this process's memory
        return self._runtime.shard.resident_bytes

    def copy(self, pairs: list[tuple[int, int]], source: dict[str, Any]) -> int:
        """Copies replicas from another group's memory; the bytes then resident."""
        endpoint = GroupEndpoint.from_dict(source)
        for layer, expert in pairs:
            self._runtime.add_from_peer(layer, expert, endpoint)
        return self._runtime.shard.resident_bytes

    def drop(self, pairs: list[tuple[int, int]]) -> int:
        """Frees replicas; the bytes then resident."""
        for layer, expert in pairs:
            self._runtime.drop(layer, expert)
        return self._runtime.shard.resident_bytes

    def report(self) -> dict[str, Any]:
        """Counts, timings and bytes since the start (`raymoe.group.GroupReport`)."""
        return self._runtime.report().to_dict()

    def hold(self) -> None:
        """Returns when the group is closed. A caller left waiting learns of a death at once."""
        self._ended.wait()

    def close(self) -> None:
        """Ends every link and the compute thread."""
        self._runtime.close()
        self._ended.set()


def server_config(config: DeploymentConfig, node_address: str) -> ServerConfig:
    """The group's end of its links as the deployment sets it."""
    plane = config.data_plane
    return ServerConfig(
        shm=plane.transport != "tcp",
        tcp_host=node_address if plane.host == "node" else plane.host,
        terms=SlotTerms(
            slots=plane.slots,
            request_bytes=plane.slot_bytes + (plane.slot_bytes >> 4),  # rows and their pairs
            reply_bytes=plane.slot_bytes,
        ),
    )


def _where() -> tuple[str, str]:
    """Ray's id of this node and the node's address; this process alone when there is no Ray."""
    if not ray.is_initialized():
        return "local", "127.0.0.1"
    context = ray.get_runtime_context()
    return str(context.get_node_id()), str(ray.util.get_node_ip_address())
