"""GroupRuntime: one expert group without Ray. Replicas, a link server, a compute thread.

Stateless between messages: whatever a client sends is answered with sums, with a NACK that lists
the experts that are not here, or with an error; a group never keeps a client waiting for placement.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from raymoe.checkpoint.record import load_expert
from raymoe.checkpoint.spec import ModelSpec
from raymoe.copiers import Copiers
from raymoe.copying import Sender, Wait, fetch_record
from raymoe.dispatch import Ints
from raymoe.errors import ConfigError
from raymoe.experts.shard import Between, ExpertShard
from raymoe.joined import Joined
from raymoe.links.connect import connect_stream
from raymoe.links.handshake import Identity
from raymoe.links.link import Request
from raymoe.links.protocol import PARTIAL
from raymoe.links.server import Server, ServerConfig
from raymoe.native import native
from raymoe.pacing import Pacer
from raymoe.speed import GroupSpeed, measure_speed
from raymoe.table import GroupEndpoint

log = logging.getLogger(__name__)

SAMPLES = 512  # timings kept


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What a group has done since it started, and holds now."""

    id: str
    incarnation: int
    counts: Ints  # int64 [L, E] pairs computed
    busy_s: float
    pairs: int
    messages: int
    nacks: int
    errors: int
    queued_pairs: int
    resident: np.ndarray  # bool [L, E]
    resident_bytes: int
    budget_bytes: int
    samples: tuple[tuple[int, int, float], ...]  # latest (pairs, active experts, busy seconds)

    def to_dict(self) -> dict[str, Any]:
        """JSON- and msgpack-safe."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["counts"] = self.counts.tolist()
        plain["resident"] = self.resident.tolist()
        plain["samples"] = [list(sample) for sample in self.samples]
        return plain


@dataclass(slots=True)
class _Work:
    """The compute thread at a message: since when, and what of the time was not the message's."""

    began_ns: int
    cpu_ns: int  # of the thread by then; of slowed groups
    slowdown: float
    waited_ns: float = 0.0  # to be as slow as that
    away_ns: int = 0  # at other messages
    away_cpu_ns: int = 0


class GroupRuntime:
    """Serves from construction until close(). `add_*`, `drop` and `report` from any thread."""

    def __init__(
        self,
        spec: ModelSpec,
        group_id: str,
        incarnation: int,
        shard: ExpertShard,
        identity: Identity,
        secret: bytes,
        slowdown: float = 1.0,
        *,
        node: str = "",
        config: ServerConfig | None = None,
    ) -> None:
        """`slowdown` >= 1 makes every message take so many times as long (for tests): it waits
        for the rest of that time. Of CPU time, not of time that other processes had."""
        if slowdown < 1.0:
            raise ConfigError(f"group {group_id}: slowdown is {slowdown}; it must be 1 or more")
        self.spec, self.id, self.incarnation, self.shard = spec, group_id, incarnation, shard
        self.node = node
        self.slowdown = slowdown
        self._identity, self._secret = identity, secret
        self._counts = np.zeros((spec.layers, spec.experts), np.int64)
        self._counts_address: int = self._counts.ctypes.data
        self._native = native()
        # without making tensors, which cost 10 us a message; other shards (tests) may lack it
        self._compute_at = getattr(shard, "compute_at", None)
        if self._compute_at is not None and identity.hidden != spec.hidden:
            raise ConfigError(f"the wire carries {identity.hidden} numbers, experts {spec.hidden}")
        self._busy_s = 0.0
        self._served_since: float | None = None
        self._pairs = self._messages = self._nacks = self._errors = 0
        self._samples: deque[tuple[int, int, float]] = deque(maxlen=SAMPLES)
        self._fresh: deque[tuple[int, int, float]] = deque(maxlen=SAMPLES)  # not taken yet
        self._count_lock = threading.Lock()
        self.pacer = Pacer() if torch.device(shard.device).type == "cpu" else None
        self._copiers = Copiers(Sender(shard, pacer=self.pacer), group_id)
        self._closed = threading.Event()
        self.server = Server(
            identity,
            secret,
            layers=spec.layers,
            experts=spec.experts,
            name=group_id,
            incarnation=incarnation,
            node=node,
            config=config,
            bulk=self._copiers.begin,
        )
        self._thread = threading.Thread(
            target=self._serve, name=f"raymoe-group-{group_id}", daemon=True
        )
        self._thread.start()

    def endpoint(self) -> GroupEndpoint:
        """How clients and other groups reach this one."""
        return GroupEndpoint(
            id=self.id,
            node=self.node,
            incarnation=self.incarnation,
            endpoints=tuple(self.server.endpoints()),
        )

    # --- replicas --------------------------------------------------------------------------

    def add_from_checkpoint(self, layer: int, expert: int) -> None:
        """Load a replica from the checkpoint; nothing happens when it is here already.

        Raises CheckpointError, or ConfigError when the budget is too small.
        """
        if not self.shard.has(layer, expert):
            self.shard.add(layer, expert, load_expert(self.spec, layer, expert))

    def add_from_peer(
        self,
        layer: int,
        expert: int,
        source: GroupEndpoint,
        *,
        limit_bytes_per_s: float | None = None,
        wait: Wait = time.sleep,
    ) -> None:
        """Copy a replica from a group that holds it; nothing happens when it is here already.

        Serving goes on meanwhile. Without a limit it is urgent; else it rests with `wait`, and
        what that raises ends the copy. Raises PeerLost, HandshakeRefused, CheckpointError (refused
        or damaged), ConfigError (budget); then nothing has changed.
        """
        if self.shard.has(layer, expert):
            return

        def open_stream() -> socket.socket:
            sock, _ = connect_stream(
                source.endpoints,
                self._identity,
                self._secret,
                role="group",
                name=self.id,
                incarnation=source.incarnation,
            )
            return sock

        record = fetch_record(
            open_stream,
            layer,
            expert,
            limit_bytes_per_s=limit_bytes_per_s,
            max_bytes=2 * self.spec.resident_bytes("float32")[layer],
            wait=wait,
        )
        self.shard.add(layer, expert, record)

    def drop(self, layer: int, expert: int) -> None:
        """Let a replica go; nothing happens when it is not here."""
        self.shard.drop(layer, expert)

    def measure_speed(self, seconds: float = 0.3) -> GroupSpeed:
        """Time made-up experts on this device, slowdown included; needs no replica here."""
        return measure_speed(
            self.spec,
            device=self.shard.device,
            dtype=self.shard.dtype,
            slowdown=self.slowdown,
            seconds=seconds,
            vllm_on_cuda=self.shard.vllm_on_cuda,
        )

    def report(self) -> GroupReport:
        """Totals since the start; cheap enough for every second. A message is counted just after
        its answer has left."""
        with self._count_lock:
            return GroupReport(
                id=self.id,
                incarnation=self.incarnation,
                counts=self._counts.copy(),
                busy_s=self._busy_s,
                pairs=self._pairs,
                messages=self._messages,
                nacks=self._nacks,
                errors=self._errors,
                queued_pairs=self.server.queued()[0],
                resident=self.shard.resident(),
                resident_bytes=self.shard.resident_bytes,
                budget_bytes=self.shard.budget_bytes,
                samples=tuple(self._samples),
            )

    @property
    def busy_s(self) -> float:
        """Seconds spent on messages since the start."""
        return self._busy_s

    @property
    def served_since(self) -> float | None:
        """Unix seconds of the first message computed; None before it."""
        return self._served_since

    def take_samples(self) -> list[tuple[int, int, float]]:
        """Timings since the last call (the latest few hundred): (pairs, active experts, busy s)."""
        with self._count_lock:
            fresh, self._fresh = self._fresh, deque(maxlen=SAMPLES)
        return list(fresh)

    def close(self) -> None:
        """End every thread and connection, within 2 s. A message in the works is not answered."""
        self._closed.set()
        self.server.stop()
        self._copiers.close()
        self._thread.join(2.0)

    # --- the compute thread ----------------------------------------------------------------

    def _serve(self) -> None:
        poll = self.server.poll
        while not self._closed.is_set():
            try:
                self._serve_all(poll(1.0))
            except Exception:  # a mistake of ours; without this thread the group only seems to live
                log.exception("group %s did not answer a message", self.id)
                self._closed.wait(0.01)

    def _serve_all(self, requests: list[Request]) -> None:
        if len(requests) > 1:
            self._serve_together(requests)
        elif requests:
            self._serve_one(requests[0])

    def _serve_small(self, work: _Work) -> None:
        """In the midst of a large message: small ones that have come pass it by.

        So a router's decode waits for a few milliseconds of another's prompt, not for all of it.
        """
        self._slow_down(work)
        before = time.perf_counter_ns(), time.thread_time_ns()
        self._serve_all(self.server.poll_decode())
        work.away_ns += time.perf_counter_ns() - before[0]
        work.away_cpu_ns += time.thread_time_ns() - before[1]

    def _between(self, requests: list[Request], work: _Work) -> Between | None:
        large = any(self.server.is_large(request.call) for request in requests)
        return partial(self._serve_small, work) if large else None

    def _serve_one(self, request: Request) -> None:
        call = request.call
        work = self._begin()
        missing: list[int] = []
        error: str | None = None
        try:
            missing = self._compute(request, self._between([request], work))
        except Exception as failure:
            log.exception("group %s failed in MoE layer %d", self.id, call.layer)
            error = f"{type(failure).__name__}: {failure}"
        busy_ns = self._end(work)
        self.server.reply(request, missing=missing or None, error=error, busy_ns=busy_ns)
        with self._count_lock:
            self._messages += 1
            if error is not None:
                self._errors += 1
            elif missing:
                self._nacks += 1
            else:
                self._tally(request)
                self._has_served(call.pairs, busy_ns)
                self._timed(call.pairs, call.experts, busy_ns)

    def _compute(self, request: Request, between: Between | None) -> list[int]:
        if self._compute_at is not None and request.wire.torch_dtype is torch.float32:
            words, (_, mode, _, experts, pairs, _) = request.words_address, request.call
            weights = words + 8 * experts + 4 * pairs if mode == PARTIAL else None
            if self._compute_at(
                request.call, words, weights, request.x_address, request.out_address, between
            ):
                return []
        return self.shard.compute(
            request.call.layer,
            request.x,
            torch.from_numpy(request.expert_ids),
            torch.from_numpy(request.counts),
            request.token_of_pair,
            request.weights,
            request.out,
            between,
        )

    def _tally(self, request: Request) -> None:
        layer, _, _, experts, _, _ = request.call
        if self._native is not None:  # 1 us where numpy's fancy += takes 4
            row = self._counts_address + 8 * self.spec.experts * layer
            self._native.tally(row, request.words_address, experts)
        else:
            self._counts[layer, request.expert_ids] += request.counts

    def _has_served(self, pairs: int, busy_ns: int) -> None:
        if self._served_since is None:
            self._served_since = time.time()
        self._pairs += pairs
        self._busy_s += busy_ns * 1e-9

    def _timed(self, pairs: int, experts: int, busy_ns: int) -> None:
        sample = pairs, experts, busy_ns * 1e-9
        self._samples.append(sample)
        self._fresh.append(sample)

    def _begin(self) -> _Work:
        slowdown = self.slowdown
        cpu_ns = time.thread_time_ns() if slowdown > 1.0 else 0
        return _Work(time.perf_counter_ns(), cpu_ns, slowdown)

    def _end(self, work: _Work) -> int:
        """Nanoseconds that the message has taken."""
        self._slow_down(work)
        return time.perf_counter_ns() - work.began_ns - work.away_ns

    def _slow_down(self, work: _Work) -> None:
        """Waits for the rest of what its work so far takes a slower device."""
        if work.slowdown > 1.0:
            used_ns = time.thread_time_ns() - work.cpu_ns - work.away_cpu_ns
            owed_ns = used_ns * (work.slowdown - 1.0) - work.waited_ns
            self._closed.wait(owed_ns * 1e-9)
            work.waited_ns += owed_ns

    def _serve_together(self, requests: list[Request]) -> None:
        """Messages of one layer and mode as one: each expert's weights are read once for all.

        Whatever goes wrong, they are served one by one, so that only the guilty one fails.
        """
        work = self._begin()
        layer, mode = requests[0].call.layer, requests[0].call.mode
        try:
            joined = Joined(requests)
            missing = self.shard.compute(
                layer,
                joined.x,
                torch.from_numpy(joined.expert_ids),
                torch.from_numpy(joined.counts),
                torch.from_numpy(joined.token_of_pair),
                joined.weights,
                joined.out,
                self._between(requests, work),
            )
            if not missing:
                joined.hand_out(requests, mode)
        except Exception:
            missing = [-1]
        if missing:
            for request in requests:
                self._serve_one(request)
            return
        busy_ns = self._end(work)
        for request in requests:
            share = request.call.pairs / len(joined.token_of_pair)
            self.server.reply(request, busy_ns=int(busy_ns * share))
        with self._count_lock:
            self._messages += len(requests)
            self._counts[layer, joined.expert_ids] += joined.counts
            self._has_served(len(joined.token_of_pair), busy_ns)
            self._timed(len(joined.token_of_pair), len(joined.expert_ids), busy_ns)
