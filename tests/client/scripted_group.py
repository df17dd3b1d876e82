"""Groups that do what a test tells them to, over links without a thread, a socket or a clock.

Expert e of layer l multiplies its input by `scale(l, e)`, so that a pair that went to the wrong
expert, was lost, came twice or carries another token's row changes the sum.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from placement.table import Table
from raymoe.errors import PeerLost
from raymoe.links.handshake import Identity, Peer
from raymoe.links.link import Completion, Endpoint, Slot
from raymoe.links.protocol import (
    ERROR,
    NACK,
    REPLY,
    ROWS,
    Call,
    Wire,
    make_header,
    reply_array,
    request_arrays,
)
from raymoe.links.slots import SlotBook
from raymoe.table import GroupEndpoint, RoutingTable

SECRET = b"a secret of the tests only"
HIDDEN = 16


def identity(dtype: str = "float32") -> Identity:
    return Identity(deployment="test", fingerprint="f", wire_dtype=dtype, hidden=HIDDEN)


def scale(layer: int, expert: np.ndarray | int) -> np.ndarray:
    """The number by which an expert multiplies its input."""
    return np.asarray(1.0 + layer * 0.5 + np.asarray(expert) * 0.25, dtype=np.float32)


def reference(
    layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What combine must return, pair by pair in float64."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, k in itertools.product(*map(range, expert_ids.shape)):
        factor = float(weights[t, k]) * float(scale(layer, int(expert_ids[t, k])))
        out[t] += factor * hidden[t].double()
    return out


class ScriptedLink(SlotBook):
    """A link whose group answers while the client submits, or never."""

    def __init__(self, group: ScriptedGroup, wire: Wire, slots: int, slot_bytes: int) -> None:
        self.group = group
        peer = Peer(
            role="group",
            name=group.id,
            incarnation=group.incarnation,
            identity=identity(wire.dtype),
            offer={},
            terms={},
        )
        regions = [
            (np.zeros(slot_bytes, np.uint8), np.zeros(slot_bytes, np.uint8)) for _ in range(slots)
        ]
        super().__init__(peer, wire, regions)
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._done: list[Completion] = []
        self._fails = ""
        self._pinged = False
        self.pings = 0
        self.closed = False
        self.held: list[tuple[Slot, Call]] = []  # asked for and not answered

    def submit(self, slot: Slot, call: Call) -> int:
        if self._fails:
            raise self._retire(self._fails)
        self._begin(slot, call)
        self.group.receive(self, slot, call)
        return slot.seq

    def poll(self) -> list[Completion]:
        self._hear()
        if not self._fails:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        if self._done:
            done, self._done = self._done, []
            return done
        if self._fails:
            raise self._retire(self._fails)
        return []

    def ping(self) -> None:
        """The answer is heard at the next poll()."""
        if not self.closed and self.group.alive:
            self._pinged = True
            self.pings += 1
            os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        self._retire("closed by us")
        os.close(self._fd)

    def _hear(self) -> None:
        if self._pinged:
            self._pinged = False
            self.last_heard_s = time.monotonic()
            self.progress = self.group.progress

    # the group's side

    def answer(self, slot: Slot, call: Call) -> None:
        """Compute and answer a request that is held."""
        self.group.compute(slot, call, self.wire)
        self.push(slot, call, REPLY, busy_ns=1000)

    def push(self, slot: Slot, call: Call, kind: int, **fields: int) -> None:
        header = make_header(kind, slot=slot.index, seq=slot.seq, layer=call.layer, **fields)
        if self.closed:
            return  # a late answer: nobody listens
        self._done.append(self._complete(header, slot))
        os.eventfd_write(self._fd, 1)

    def fail(self, why: str) -> None:
        """The connection ends, after what has been answered."""
        self._fails = why
        if not self.closed:
            os.eventfd_write(self._fd, 1)


Policy = Callable[["ScriptedGroup", ScriptedLink, Slot, Call], None]


class ScriptedGroup:
    """A group that holds `resident` (layer, expert) pairs and follows `policy`."""

    def __init__(
        self,
        group_id: str,
        resident: Iterable[tuple[int, int]],
        policy: Policy | None = None,
        *,
        incarnation: int = 1,
        slots: int = 4,
        slot_bytes: int = 8192,
    ) -> None:
        self.id = group_id
        self.incarnation = incarnation
        self.resident = set(resident)
        self.policy: Policy = policy or answer
        self.slots, self.slot_bytes = slots, slot_bytes
        self.reachable = True
        self.links: list[ScriptedLink] = []
        self.requests = 0
        self.alive = True  # answers heartbeats
        self.progress = 0

    def dial(self, wire: Wire) -> ScriptedLink:
        if not self.reachable:
            raise ConnectionRefusedError(self.id)
        link = ScriptedLink(self, wire, self.slots, self.slot_bytes)
        self.links.append(link)
        return link

    def receive(self, link: ScriptedLink, slot: Slot, call: Call) -> None:
        self.requests += 1
        self.policy(self, link, slot, call)

    def compute(self, slot: Slot, call: Call, wire: Wire) -> None:
        """A pair at a time, slowly and plainly."""
        views = slot.views(call)
        experts = np.repeat(views.expert_ids.numpy(), views.counts.numpy())
        out = torch.zeros(call.out_rows, wire.hidden)
        for p, (expert, token) in enumerate(
            zip(experts.tolist(), views.token_of_pair.tolist(), strict=True)
        ):
            row = views.x[token].float() * float(scale(call.layer, expert))
            if call.mode == ROWS:
                out[p] = row
            else:
                assert views.weights is not None
                out[token] += row * float(views.weights[p])
        target = Completion(slot, call, make_header(REPLY)).out()
        target.copy_(out)

    def missing(self, slot: Slot, call: Call) -> list[int]:
        experts = request_arrays(slot.request_memory, call, slot.wire).expert_ids.tolist()
        return [e for e in experts if (call.layer, e) not in self.resident]

    def endpoint(self) -> GroupEndpoint:
        endpoint = Endpoint(kind="inproc", address=self.id, node="n")
        return GroupEndpoint(
            id=self.id, node="n", incarnation=self.incarnation, endpoints=(endpoint,)
        )


def answer(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
    """The honest policy: compute, or say which experts are missing."""
    if lacking := group.missing(slot, call):
        words = slot.reply_memory[: 4 * len(lacking)].view("<i4")
        words[:] = lacking
        link.push(slot, call, NACK, experts=len(lacking), payload_bytes=4 * len(lacking))
    else:
        link.answer(slot, call)


def complain(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
    """An error inside the group."""
    text = b"out of luck"
    slot.reply_memory[: len(text)] = np.frombuffer(text, np.uint8)
    link.push(slot, call, ERROR, payload_bytes=len(text))


def refuse_to_send(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
    """Lost before the request is out."""
    link.fail("killed before send")
    raise link._retire("killed before send")


def die_silently(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
    """Lost after the request is out."""
    link.fail("killed after send")


def die_in_reply(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
    """Lost with half of the reply written."""
    rows = reply_array(slot.reply_memory, call.out_rows, slot.wire)
    rows[: max(1, len(rows) // 2)] = 77
    link.fail("killed in mid reply")


def hang(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
    """Never answers; the request stays in `link.held`."""
    link.held.append((slot, call))


POLICIES: tuple[Policy, ...] = (
    answer,
    complain,
    refuse_to_send,
    die_silently,
    die_in_reply,
    hang,
)


def once(bad: Policy, after: int = 0) -> Policy:
    """`bad` for one request after `after` honest ones, honest from then on."""
    seen = itertools.count()

    def policy(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
        (bad if next(seen) == after else answer)(group, link, slot, call)

    return policy


class Fleet:
    """Scripted groups, the table that lists them, and the dialing."""

    def __init__(self, groups: list[ScriptedGroup], layers: int, experts: int) -> None:
        self.groups = {group.id: group for group in groups}
        self.layers, self.experts = layers, experts
        self.wire = Wire(hidden=HIDDEN, dtype="float32")

    def dial(self, target: GroupEndpoint) -> ScriptedLink:
        group = self.groups[target.id]
        if group.incarnation != target.incarnation:
            raise PeerLost(target.id, "another incarnation")
        return group.dial(self.wire)

    def table(
        self, epoch: int, *, term: int = 1, resident: np.ndarray | None = None
    ) -> RoutingTable:
        """What the groups really hold, unless `resident` [L, E, G] claims something else."""
        ids = tuple(sorted(self.groups))
        if resident is None:
            resident = np.zeros((self.layers, self.experts, len(ids)), np.bool_)
            for g, group_id in enumerate(ids):
                for layer, expert in self.groups[group_id].resident:
                    resident[layer, expert, g] = True
        copies = np.maximum(resident.sum(2, keepdims=True), 1)
        table = Table(
            term=term,
            epoch=epoch,
            group_ids=ids,
            resident=resident,
            share=resident / copies,
            speed=np.full(len(ids), 1e6),
            alpha_s=np.zeros(len(ids)),
            gamma_s=np.full(len(ids), 1e-6),
        )
        endpoints = {i: self.groups[i].endpoint() for i in ids if self.groups[i].reachable}
        return RoutingTable(table=table, endpoints=endpoints)
