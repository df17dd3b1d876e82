"""The expert-group actor: a thin shell around `GroupRuntime`, one a device.

Imports torch and safetensors, never transformers: a group starts fast and stays small.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import ray
import torch

from actors.gently import gently
from actors.lease import Lease
from raymoe.checkpoint.record import check_files, close_files
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_secret
from raymoe.errors import ConfigError, LinkError, PeerLost
from raymoe.experts.devices import check_device
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.heap import give_back
from raymoe.identity import identity_of
from raymoe.links.link import SlotTerms
from raymoe.links.server import ServerConfig
from raymoe.logs import configure
from raymoe.table import GroupEndpoint

log = logging.getLogger("raymoe.expert_group")
_STAGGER_S = 0.3
_TURN_S = 5.0  # a load waits no longer for an earlier one that does not end
_TRIM_BYTES = 128 << 20


class _MakesWay(Exception):
    """A load ends early, and nothing is wrong."""


class ExpertGroup:
    """Holds replicas within a byte budget and computes them for every router.

    Calls through Ray are control only; tokens come over links of the group's own.
    """

    _gentle = False  # kernels are chosen at low priority (actors/gentle_group.py)

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
        speed: float = 0.0,
        vllm_kernels: bool = False,
    ) -> None:
        """`speed`: pairs/s that an earlier life measured; 0: measured now."""
        torch.set_num_threads(1)
        checked = DeploymentConfig.model_validate(config)
        self._term = 0  # of the newest controller heard of
        self._incarnation = incarnation
        self._id = group_id
        configure(checked.logging, "group", checked.name, self._surroundings)
        spec = ModelSpec.from_json(spec_json)
        check_device(device, memory_bytes, f"group {group_id}")
        check_files(spec)  # this node's copy must be the checkpoint the others serve
        self._ended = threading.Event()
        self._obeying = threading.Lock()  # nothing of an older term is done after a newer was told
        self._released = threading.Event()  # the call of `hold` that waits may return
        self._bringing = threading.Lock()
        self._make_way = threading.Event()  # a load that nobody waits for is to end
        self._reading_since_s: float | None = None  # the checkpoint, one expert of it
        self._moved_bytes = 0  # since memory was given back
        self._node, address = _where()
        dtype = getattr(torch, spec.compute_dtype)
        make = partial(ExpertShard, spec, memory_bytes, device, dtype, vllm_on_cuda=vllm_kernels)
        # timed by the CPU clock there; another device's driver has threads of its own to start
        shard = gently(make) if self._gentle and device == "cpu" else make()
        self._runtime = GroupRuntime(
            spec,
            group_id,
            incarnation,
            shard,
            identity_of(checked, spec),
            read_secret(checked),
            slowdown,
            node=self._node,
            config=server_config(checked, address),
        )
        # Once, before there is traffic to be held up or to bend the figure; a later life starts
        # beside those that serve, and traffic tells how fast it is.
        self._speed = speed or 64 / self._runtime.measure_speed().seconds(64, 8)
        log.info("up, %.3g pairs/s, for %d bytes of experts", self._speed, memory_bytes)
        self._lease = Lease(
            checked.placement.orphan_ttl_s, _end_process, lambda: self._runtime.busy_s
        )

    def _surroundings(self) -> dict[str, Any]:
        """What is true of every line that this process logs."""
        return {"group": self._id, "incarnation": self._incarnation, "term": self._term}

    def ping(self, term: int) -> dict[str, Any]:
        """Answers: this process is not hung. What it has done since the last ping:
        {"samples": [(pairs, active experts, busy seconds)], "queued_pairs"}; and since it started
        "busy_s", the seconds it has computed, and "served_since", Unix time of the first message.
        What it holds now: "resident", bool [L, E] as `np.packbits` has it, and "resident_bytes".
        "reading_s": for how long it has been reading one expert of the checkpoint.
        """
        self._obey(term)
        shard, since_s = self._runtime.shard, self._reading_since_s
        return {
            "reading_s": 0.0 if since_s is None else time.monotonic() - since_s,
            "resident": np.packbits(shard.resident()),
            "resident_bytes": shard.resident_bytes,
            "samples": self._runtime.take_samples(),
            "queued_pairs": self._runtime.server.queued()[0],
            "busy_s": self._runtime.busy_s,
            "served_since": self._runtime.served_since,
        }

    def describe(self, term: int) -> dict[str, Any]:
        """Who and where this group is, how fast, and what it holds already. From now on nothing
        more is begun that a controller of a lower term asked for.

        `speed` is pairs/s of a message of 64 pairs over 8 experts: what decoding mostly sends.
        """
        with self._obeying:
            self._obey(term)
            report = self._runtime.report()
        return {
            "endpoint": self._runtime.endpoint().to_dict(),
            "pid": os.getpid(),
            "node": self._node,
            "speed": self._speed,
            "resident": report.resident,
            "resident_bytes": report.resident_bytes,
        }

    def bring(
        self,
        pairs: list[tuple[int, int]],
        source: dict[str, Any] | None,
        limit_bytes_per_s: float | None,
        term: int,
    ) -> dict[str, Any]:
        """Replicas (layer, expert) from another group's memory, or from the checkpoint when
        `source` is None. What fails leaves nothing behind and does not stop the rest, unless the
        source is gone. Ends when a newer controller has come, before the next replica. With a
        limit nobody waits for it: `make_way` ends it, also in the middle of a copy that rests.

        {"resident_bytes": then resident, "failed": [(layer, expert, why)], "left": [(layer,
        expert)] that were not tried}
        """
        self._obey(term)
        if not self._bringing.acquire(timeout=_TURN_S):
            raise ConfigError("an earlier load has not ended: what it reads from does not answer")
        try:
            if not self._ended.is_set():
                self._make_way.clear()
            return self._bring(pairs, source, limit_bytes_per_s, term)
        finally:
            self._bringing.release()

    def _bring(
        self,
        pairs: list[tuple[int, int]],
        source: dict[str, Any] | None,
        limit_bytes_per_s: float | None,
        term: int,
    ) -> dict[str, Any]:
        endpoint = None if source is None else GroupEndpoint.from_dict(source)
        if limit_bytes_per_s is not None:
            # groups that are asked at once would all lay experts out at the same moments
            first = self._runtime.spec.expert_bytes[pairs[0][0]] if pairs else 0
            self._make_way.wait(random.random() * min(first / limit_bytes_per_s, _STAGGER_S))
        failed: list[tuple[int, int, str]] = []
        left: list[tuple[int, int]] = []
        lost, before = "", self._runtime.shard.resident_bytes
        for at, (layer, expert) in enumerate(pairs):
            try:
                self._obey(term)
                if limit_bytes_per_s is not None:
                    self._rest(0.0)
                if lost:
                    raise PeerLost("the group it is copied from", lost)
                self._bring_one(layer, expert, endpoint, limit_bytes_per_s)
            except _MakesWay:
                left = pairs[at:]
                break
            except Exception as e:  # the controller decides what becomes of it
                failed.append((layer, expert, str(e)))
                lost = str(e) if isinstance(e, LinkError) else ""
        close_files()  # their pages would count as this process's memory
        self._let_go(before)
        origin = "the checkpoint" if endpoint is None else endpoint.id
        brought = len(pairs) - len(failed) - len(left)
        log.info("%d of %d replicas brought from %s", brought, len(pairs), origin)
        resident_bytes = self._runtime.shard.resident_bytes
        return {"resident_bytes": resident_bytes, "failed": failed, "left": left}

    def make_way(self, term: int) -> None:
        """Something that requests wait for is to be loaded: a load with a limit ends."""
        self._obey(term)
        self._make_way.set()

    def _rest(self, seconds: float) -> None:
        """Between the parts of a load that nobody waits for."""
        if self._make_way.wait(seconds):
            raise _MakesWay

    def _bring_one(
        self, layer: int, expert: int, source: GroupEndpoint | None, limit: float | None
    ) -> None:
        if limit is None:  # requests wait for it
            self._add(layer, expert, source, None)
            return
        shard, pacer = self._runtime.shard, self._runtime.pacer
        before, started_s = shard.resident_bytes, time.monotonic()
        # Of a group on the CPU the same cores compute for requests.
        with pacer.measured() if pacer is not None else contextlib.nullcontext() as spent:
            self._add(layer, expert, source, limit)
        rest_s = 0.0 if spent is None else spent.rest_s
        if source is None:  # a peer's bytes were counted as they came
            loaded = shard.resident_bytes - before
            rest_s = max(rest_s, loaded / limit - (time.monotonic() - started_s))
        self._make_way.wait(max(rest_s, 0.0))

    def _add(
        self, layer: int, expert: int, source: GroupEndpoint | None, limit: float | None
    ) -> None:
        if source is not None:
            self._runtime.add_from_peer(
                layer, expert, source, limit_bytes_per_s=limit, wait=self._rest
            )
            return
        self._reading_since_s = time.monotonic()
        try:
            self._runtime.add_from_checkpoint(layer, expert)
        finally:
            self._reading_since_s = None

    def drop(self, pairs: list[tuple[int, int]], term: int) -> dict[str, Any]:
        """Frees replicas: {"resident_bytes": then resident, "failed": []}."""
        self._obey(term)
        before = self._runtime.shard.resident_bytes
        for layer, expert in pairs:
            with self._obeying:
                self._obey(term)
                self._runtime.drop(layer, expert)
        self._let_go(before)
        return {"resident_bytes": self._runtime.shard.resident_bytes, "failed": []}

    def _let_go(self, before: int) -> None:
        """Freed memory goes back to the system; not after every expert, as it takes 20 ms."""
        self._moved_bytes += abs(self._runtime.shard.resident_bytes - before)
        if self._moved_bytes >= _TRIM_BYTES:
            self._moved_bytes = 0
            give_back()

    def set_slowdown(self, factor: float) -> None:
        """For tests: from now on every message takes `factor` times as long."""
        if not factor >= 1.0:
            raise ConfigError(f"slowdown is {factor}; it must be 1 or more")
        self._runtime.slowdown = factor

    def report(self) -> dict[str, Any]:
        """Counts, timings and bytes since the start (`raymoe.group.GroupReport`)."""
        return self._runtime.report().to_dict()

    def hold(self, term: int) -> bool:
        """Waits: a caller left waiting learns of a death at once. True: the group is closed. False:
        somebody else waits now; each call takes one of the few threads that answer calls."""
        with self._obeying:
            self._obey(term)
            self._released.set()
            released = self._released = threading.Event()
        if not self._ended.is_set():
            released.wait()
        return self._ended.is_set()

    def _obey(self, term: int) -> None:
        """A controller of this term asks: refused when there is a newer one. Renews the lease."""
        if term < self._term:
            raise ConfigError(f"a controller of term {self._term} is in charge, not {term}")
        if term > self._term:
            self._term = term
            self._make_way.set()
        self._lease.renew()

    def close(self) -> None:
        """Ends every link and the compute thread."""
        self._lease.close()
        self._runtime.close()
        self._ended.set()
        self._released.set()
        self._make_way.set()


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


def _end_process() -> None:
    """Nobody has asked after this group for long, or used it: its deployment is gone."""
    log.warning("no controller has asked after this expert group, no router used it: it ends")
    os._exit(1)


def _where() -> tuple[str, str]:
    """Ray's id of this node and the node's address; this process alone when there is no Ray."""
    if not ray.is_initialized():
        return "local", "127.0.0.1"
    context = ray.get_runtime_context()
    return str(context.get_node_id()), str(ray.util.get_node_ip_address())
