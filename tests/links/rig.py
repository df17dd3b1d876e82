"""A group with identity experts and the client's side of a link, for the tests of the links."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymoe.errors import PeerLost
from raymoe.links.connect import connect
from raymoe.links.handshake import Identity, Initiator
from raymoe.links.link import Completion, Endpoint, Link, Request, SlotTerms
from raymoe.links.poller import LinkPoller
from raymoe.links.protocol import PARTIAL, Call
from raymoe.links.server import Server, ServerConfig

SECRET = b"a secret of thirty-two bytes ...."
HIDDEN = 16
EXPERTS = 8
LAYERS = 4
NODE = "here"
KINDS = ("inproc", "shm", "tcp")
TERMS = SlotTerms(slots=4, request_bytes=64 << 10, reply_bytes=64 << 10)


def identity(dtype: str = "float32", hidden: int = HIDDEN) -> Identity:
    return Identity(deployment="demo", fingerprint="f00d", wire_dtype=dtype, hidden=hidden)


def config(**changes: Any) -> ServerConfig:
    return ServerConfig(**({"inproc": True, "terms": TERMS} | changes))


def compute(request: Request) -> None:
    """Identity experts: a pair's row is its token's row, weighted and summed in PARTIAL mode."""
    rows = request.x[request.token_of_pair]
    if request.weights is None:
        request.out.copy_(rows)
    else:
        total = torch.zeros(request.call.tokens, request.x.shape[1])
        total.index_add_(0, request.token_of_pair, rows.float() * request.weights[:, None])
        request.out.copy_(total)


class Group:
    """A server and its compute thread. `gate` closed holds the compute thread at a request."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.gate = threading.Event()
        self.gate.set()
        self.holding = threading.Event()
        self.answered: list[bool] = []
        self.batches: list[int] = []
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            requests = self.server.poll(1.0)
            if requests:
                self.batches.append(len(requests))
            for request in requests:
                if not self.gate.is_set():
                    self.holding.set()
                    self.gate.wait()
                compute(request)
                self.answered.append(self.server.reply(request, busy_ns=7))

    def close(self) -> None:
        self._ended = True
        self.gate.set()
        self.server.stop()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def endpoint(self, kind: str) -> Endpoint:
        return next(e for e in self.server.endpoints() if e.kind == kind)


@contextmanager
def group(
    dtype: str = "float32", hidden: int = HIDDEN, incarnation: int = 7, **options: Any
) -> Iterator[Group]:
    bulk = options.pop("bulk", None)
    server = Server(
        identity(dtype, hidden),
        SECRET,
        layers=LAYERS,
        experts=EXPERTS,
        name="group-0",
        incarnation=incarnation,
        node=NODE,
        config=config(**options),
        bulk=bulk,
    )
    running = Group(server)
    try:
        yield running
    finally:
        running.close()


def link_to(running: Group, kind: str, dtype: str = "float32", hidden: int = HIDDEN) -> Link:
    return connect(
        running.endpoint(kind), identity(dtype, hidden), SECRET, name="router-0", node=NODE
    )


def initiator(**changes: Any) -> Initiator:
    return Initiator(identity(), "router", SECRET, name="raw", **changes)


@dataclass
class Message:
    """One request and what must come back."""

    call: Call
    x: NDArray[Any]
    expert_ids: NDArray[Any]
    counts: NDArray[Any]
    token_of_pair: NDArray[Any]
    weights: NDArray[Any]

    def write(self, link: Link) -> int:
        slot = link.acquire()
        assert slot is not None
        views = slot.views(self.call)
        views.x.copy_(torch.from_numpy(self.x))
        arrays = slot.arrays(self.call)
        arrays.expert_ids[:] = self.expert_ids
        arrays.counts[:] = self.counts
        arrays.token_of_pair[:] = self.token_of_pair
        if arrays.weights is not None:
            arrays.weights[:] = self.weights
        return link.submit(slot, self.call)

    def check(self, completion: Completion) -> None:
        """What came back is what identity experts make of this message, in its dtype."""
        assert completion.call == self.call
        wire_dtype = completion.slot.wire.torch_dtype
        rows = torch.from_numpy(self.x).to(wire_dtype)[self.token_of_pair.astype(np.int64)]
        if self.call.mode == PARTIAL:
            total = torch.zeros(self.call.tokens, rows.shape[1])
            index = torch.from_numpy(self.token_of_pair)
            total.index_add_(0, index, rows.float() * torch.from_numpy(self.weights)[:, None])
            rows = total.to(wire_dtype)
        assert torch.equal(completion.out(), rows)


def message(
    tokens: int, seed: int = 0, mode: int = PARTIAL, hidden: int = HIDDEN, layer: int = 1
) -> Message:
    """`tokens` tokens with 1 to 3 pairs each, to random experts."""
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(EXPERTS, rng.integers(1, 4), replace=False) for _ in range(tokens)]
    token = np.repeat(np.arange(tokens, dtype=np.int32), [len(c) for c in chosen])
    expert = np.concatenate(chosen)
    order = np.argsort(expert, kind="stable")
    ids, counts = np.unique(expert, return_counts=True)
    return Message(
        call=Call(layer, mode, tokens, len(ids), len(expert), 11),
        x=rng.standard_normal((tokens, hidden)).astype(np.float32),
        expert_ids=ids.astype(np.int32),
        counts=counts.astype(np.int32),
        token_of_pair=token[order],
        weights=rng.random(len(expert)).astype(np.float32),
    )


def completions(link: Link, count: int, timeout_s: float = 5.0) -> list[Completion]:
    """Wait for that many; PeerLost is raised."""
    poller = LinkPoller()
    poller.add(link)
    done: list[Completion] = []
    deadline = time.monotonic() + timeout_s
    try:
        while len(done) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(done)} of {count} completions after {timeout_s} s"
            got, lost = poller.poll(left)
            if lost:
                raise lost[0][1]
            done += [completion for _, completion in got]
    finally:
        poller.close()
    return done


def round_trip(link: Link, tokens: int = 3, seed: int = 0) -> None:
    """One request, answered right."""
    sent = message(tokens, seed)
    sent.write(link)
    (done,) = completions(link, 1)
    sent.check(done)
    link.release(done.slot)


def lost(link: Link, timeout_s: float = 5.0) -> PeerLost:
    """Wait until the link is lost."""
    poller = LinkPoller()
    poller.add(link)
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            left = deadline - time.monotonic()
            assert left > 0, "the link is still there"
            for _, error in poller.poll(left)[1]:
                return error
    finally:
        poller.close()


def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)
