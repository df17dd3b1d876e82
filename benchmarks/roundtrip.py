"""One dispatch + combine round trip, through the product's own code and through others' transports.

    python -m benchmarks.roundtrip [--tokens 1 32 512] [--groups 1 2 4] [--rounds 15]

Top-8 routing over 64 experts, T x 2048 float32. A token's row is sent once to each group that has
any of its experts; each group answers with the weighted sum of its pairs, and the router adds the
partial sums: [T, D] in, [T, D] out, which with identity experts and weights that sum to 1 must be
the input again (checked on every plane). Groups are processes of their own.

Timed, from the gate's choice to the sum: cutting into messages, gathering rows, sending, the
group's weighted sum, sending back, adding up. An identity expert costs the group one pass over its
rows (out = x * sum of the row's weights), so that what is measured is the data plane.

    shm, tcp   ExpertClient -> links -> GroupRuntime, as in the product: checks, deadlines, counts
    zmq ipc    the product's code cuts, gathers and adds here too, into one frame a message (copied
               below 64 KiB, else not); one PAIR socket a group; no checks
    ray        the same, one array a message; an actor call a group and ray.get
    memcpy     the rows of every group's request and reply copied once, in one process: the floor

All planes take turns within every round. Figures are medians over all round trips, in microseconds;
a ratio is the median over rounds of the ratio of the round's medians.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import operator
import os
import random
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish, table
from placement.table import Table
from raymoe.arena import Cutter
from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.expert_client import ExpertClient
from raymoe.dispatch import Message, cut_messages
from raymoe.group import GroupRuntime
from raymoe.links.handshake import Identity
from raymoe.links.link import Slot, SlotTerms
from raymoe.links.protocol import PARTIAL, Call, Wire, request_views, rows_at
from raymoe.links.server import ServerConfig
from raymoe.native import native
from raymoe.table import GroupEndpoint, RoutingTable

EXPERTS, TOP_K, HIDDEN = 64, 8, 2048
SECRET = secrets.token_bytes(32)
NODE = "bench"
IDENTITY = Identity(deployment="bench", fingerprint="identity", wire_dtype="float32", hidden=HIDDEN)
WIRE = Wire(hidden=HIDDEN, dtype="float32")

RoundTrip = Callable[["Gate"], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One batch: what the gate hands to the experts."""

    hidden: torch.Tensor  # [T, D]
    expert_ids: torch.Tensor  # int64 [T, K], distinct in a row
    weights: torch.Tensor  # [T, K], rows sum to 1
    rows: dict[int, list[int]]  # by number of groups: rows that travel to each


def gates(tokens: int, count: int = 4) -> list[Gate]:
    """Different batches, so that nothing is fast only because it is always the same."""
    rng = torch.Generator().manual_seed(tokens)
    made = []
    for _ in range(count):
        scores = torch.rand(tokens, EXPERTS, generator=rng)
        top, ids = scores.topk(TOP_K, dim=1)
        made.append(
            Gate(
                hidden=torch.randn(tokens, HIDDEN, generator=rng),
                expert_ids=ids,
                weights=torch.softmax(top, dim=1),
                rows={},
            )
        )
    return made


# ------------------------------------------------------------------------------ the groups' side


@dataclass(frozen=True)
class IdentitySpec:
    """As much of a ModelSpec as a group asks for."""

    layers: int = 1
    experts: int = EXPERTS
    hidden: int = HIDDEN


class IdentityShard:
    """Identity experts, all resident: out[t] = x[t] * (sum of the weights of its pairs)."""

    budget_bytes = resident_bytes = 0

    def __init__(self) -> None:
        self.total = np.zeros(4096, np.float32)
        self.total_address = self.total.ctypes.data

    def compute_at(self, call: Call, words: int, weights: int | None, x: int, out: int) -> bool:
        """One pass over the rows; see ExpertShard.compute_at."""
        functions = native()
        if functions is None or call.tokens > len(self.total):
            return False
        rows = words + 8 * call.experts
        functions.identity(
            x, rows, weights, out, self.total_address, call.tokens, call.pairs, HIDDEN
        )
        return True

    def compute(
        self,
        layer: int,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        counts: torch.Tensor,
        token_of_pair: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> list[int]:
        """The same where there is no compiler."""
        total = np.bincount(token_of_pair.numpy(), weights.numpy(), len(x)).astype(np.float32)
        np.multiply(x.numpy(), total[:, None], out=out.numpy())
        return []


def serve_group(index: int, secret: bytes, spin_s: float, pipe: Connection) -> None:
    """A group as in the product."""
    torch.set_num_threads(1)
    spec: Any = IdentitySpec()
    shard: Any = IdentityShard()
    group = GroupRuntime(
        spec, f"g{index}", 1, shard, IDENTITY, secret, node=NODE, config=ServerConfig(spin_s=spin_s)
    )
    pipe.send(group.endpoint())
    await_end(pipe)
    group.close()


def await_end(pipe: Connection) -> None:
    """Until the parent says so, or is gone."""
    with contextlib.suppress(EOFError):
        pipe.recv()


def serve_zmq(address: str, pipe: Connection) -> None:
    """The same shard behind ZeroMQ."""
    import zmq

    torch.set_num_threads(1)
    context = zmq.Context()
    sock = context.socket(zmq.PAIR)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.connect(address)
    shard = IdentityShard()
    out = np.zeros((1024, HIDDEN), np.float32)  # the peer has read it before it asks again
    pipe.send(True)
    # ZeroMQ does not tell of a peer's death: the pipe does
    threading.Thread(target=lambda: (await_end(pipe), os._exit(0)), daemon=True).start()
    while True:
        frame = sock.recv(copy=False)
        rows = answer(shard, np.frombuffer(frame.buffer, np.uint8), out)
        sock.send(rows, copy=rows.nbytes < COPY_BYTES)


HEAD_BYTES = 64  # tokens, experts, pairs as int64; then a request region as in the product
COPY_BYTES = 65536  # below, pyzmq copies a frame: it is faster


def answer(shard: IdentityShard, frame: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Compute a message [HEAD_BYTES + request]; the rows [N, D], in `room`."""
    tokens, experts, pairs = frame[:24].view(np.int64).tolist()
    call = Call(0, PARTIAL, tokens, experts, pairs)
    words = frame.ctypes.data + HEAD_BYTES
    x = words + rows_at(call)
    if not shard.compute_at(call, words, words + 8 * experts + 4 * pairs, x, room.ctypes.data):
        views = request_views(torch.from_numpy(frame[HEAD_BYTES:]), call, WIRE)
        out = torch.from_numpy(room[:tokens])
        assert views.weights is not None
        shard.compute(
            0, views.x, views.expert_ids, views.counts, views.token_of_pair, views.weights, out
        )
    return room[:tokens]


# ------------------------------------------------------------------------------ the router's side


def placed(groups: int) -> np.ndarray:
    """Group of each expert: int64 [E], E / G neighbours a group."""
    return np.arange(EXPERTS) * groups // EXPERTS


def routing(endpoints: list[GroupEndpoint], kind: str) -> RoutingTable:
    """Each expert on one group, reached by one kind of link."""
    count = len(endpoints)
    resident = np.zeros((1, EXPERTS, count), np.bool_)
    resident[0, np.arange(EXPERTS), placed(count)] = True
    chosen = [
        GroupEndpoint(
            id=e.id,
            node=e.node,
            incarnation=e.incarnation,
            endpoints=tuple(one for one in e.endpoints if one.kind == kind),
        )
        for e in endpoints
    ]
    return RoutingTable(
        table=Table(
            term=1,
            epoch=1,
            group_ids=tuple(e.id for e in chosen),
            resident=resident,
            share=resident.astype(np.float64),
            speed=np.ones(count),
            alpha_s=np.zeros(count),
            gamma_s=np.zeros(count),
        ),
        endpoints={e.id: e for e in chosen},
    )


def product(endpoints: list[GroupEndpoint], kind: str, spin_s: float) -> ExpertClient:
    """A connected client."""
    client = ExpertClient(IDENTITY, SECRET, NODE, ClientConfig(spin_s=spin_s), name="bench")
    client.set_table(routing(endpoints, kind))
    deadline = time.monotonic() + 10
    while len(client.connected()) < len(endpoints):
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {client.connected()} of {len(endpoints)} groups connected")
        time.sleep(0.01)
    return client


class Cut:
    """What ZeroMQ's and Ray's routers do beside sending: with the product's own code."""

    def __init__(self, groups: int) -> None:
        functions = native()
        self.groups = groups
        self.cutter = None if functions is None else Cutter(functions)
        self.home = placed(groups)
        terms = SlotTerms()
        self.frames = [np.zeros(HEAD_BYTES + terms.request_bytes, np.uint8) for _ in range(groups)]
        reply = np.zeros(terms.reply_bytes, np.uint8)
        self.slots = [Slot(0, WIRE, frame[HEAD_BYTES:], reply) for frame in self.frames]

    def begin(self, gate: Gate) -> tuple[Batch, list[Message]]:
        batch = Batch(0, gate.hidden, gate.expert_ids, gate.weights, WIRE, PARTIAL)
        sizes = {
            "top_k": batch.top_k,
            "tokens": batch.tokens,
            "experts": EXPERTS,
            "message_tokens": 1024,
        }
        if self.cutter is not None:
            found = self.cutter.cut(
                batch.expert_ids.data_ptr(),
                self.home.ctypes.data,
                by_pair=False,
                pairs=batch.open_pairs,
                groups=self.groups,
                **sizes,
            )
            assert found is not None
            return batch, found
        of_pair = batch.expert_of_pair
        return batch, cut_messages(of_pair, self.home[of_pair], **sizes)

    def frame(self, batch: Batch, message: Message) -> np.ndarray:
        """Head and request of a message, as `answer` reads it."""
        tokens, experts, pairs = message.token_count, message.expert_count, message.pair_count
        call = Call(0, PARTIAL, tokens, experts, pairs)
        frame = self.frames[message.group]
        frame[:24].view(np.int64)[:] = tokens, experts, pairs
        batch.write(message, self.slots[message.group], call)
        return frame[: HEAD_BYTES + WIRE.request_bytes(call)]

    def end(self, batch: Batch, messages: list[Message]) -> torch.Tensor:
        out = batch.result()
        arena = messages[0].arena
        if self.cutter is not None and arena is not None:
            self.cutter.give(arena)
        return out


def add(batch: Batch, message: Message, rows: np.ndarray) -> None:
    """rows [N, D] to the sum, as the product adds them."""
    if not batch.add_at(message, rows.ctypes.data):
        batch.add(message, rows)


def by_client(client: ExpertClient) -> RoundTrip:
    """The product."""
    return lambda gate: client.combine(
        client.dispatch(0, gate.hidden, gate.expert_ids, gate.weights)
    )


def by_zmq(sockets: list[Any]) -> RoundTrip:
    """ZeroMQ."""
    cut = Cut(len(sockets))

    def round_trip(gate: Gate) -> torch.Tensor:
        batch, messages = cut.begin(gate)
        for message in messages:
            frame = cut.frame(batch, message)
            sockets[message.group].send(frame, copy=frame.nbytes < COPY_BYTES)
        for message in messages:
            reply = sockets[message.group].recv(copy=False)
            add(batch, message, np.frombuffer(reply.buffer, np.float32).reshape(-1, HIDDEN))
        return cut.end(batch, messages)

    return round_trip


def by_ray(ray: Any, actors: list[Any]) -> RoundTrip:
    """Ray actor calls."""
    cut = Cut(len(actors))

    def round_trip(gate: Gate) -> torch.Tensor:
        batch, messages = cut.begin(gate)
        calls = [actors[m.group].call.remote(cut.frame(batch, m)) for m in messages]
        for message, rows in zip(messages, ray.get(calls), strict=True):
            add(batch, message, rows)
        return cut.end(batch, messages)

    return round_trip


def by_memcpy(groups: int) -> RoundTrip:
    """The floor: every row that travels is copied once there and once back."""
    there = [np.zeros((1024, HIDDEN), np.float32) for _ in range(groups)]
    back = [np.zeros((1024, HIDDEN), np.float32) for _ in range(groups)]

    def round_trip(gate: Gate) -> torch.Tensor:
        rows = gate.rows[groups]
        x = gate.hidden.numpy()
        for group, count in enumerate(rows):
            np.copyto(there[group][:count], x[:count])
            np.copyto(back[group][:count], there[group][:count])
        return gate.hidden

    return round_trip


# ------------------------------------------------------------------------------ the measurement


def measure(
    planes: dict[str, RoundTrip], tokens: int, groups: int, rounds: int, repeat: int
) -> dict[str, list[list[float]]]:
    """Microseconds of each round trip, by round; planes in a new order each round."""
    batches = gates(tokens)
    for gate in batches:
        for name, plane in planes.items():
            gate.rows[groups] = [message.token_count for message in Cut(groups).begin(gate)[1]]
            torch.testing.assert_close(
                plane(gate), gate.hidden, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    spent: dict[str, list[list[float]]] = {name: [] for name in planes}  # by round
    shuffler = random.Random(tokens * 10 + groups)
    order = list(planes)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            plane, times = planes[name], []
            spent[name].append(times)
            plane(batches[0])  # the caches are the others' by now
            for turn in range(max(1, repeat // (8 if name == "ray" else 1))):
                gate = batches[turn % len(batches)]
                began = time.perf_counter()
                plane(gate)
                times.append((time.perf_counter() - began) * 1e6)
    return spent


# ------------------------------------------------------------------------------ what runs

Processes = contextlib.ExitStack


def spawn(stack: Processes, target: Any, *args: Any) -> Any:
    """A process that says what it has to say once it is ready, and ends with `stack`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raymoe.group", "raymoe.client.expert_client"])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()

    def end() -> None:
        with contextlib.suppress(OSError):  # it has ended already
            ours.send("end")
        process.join(5)
        if process.is_alive():
            process.terminate()

    stack.callback(end)
    if not ours.poll(60):
        raise RuntimeError(f"{target.__name__} did not start within 60 s")
    return ours.recv()


def start_zmq(stack: Processes, folder: str, groups: int) -> list[Any]:
    """A PAIR socket to each of as many processes."""
    import zmq

    context = zmq.Context()
    stack.callback(context.term)
    sockets = []
    for index in range(groups):
        sock = context.socket(zmq.PAIR)
        sock.setsockopt(zmq.SNDHWM, 0)
        address = f"ipc://{folder}/z{index}"
        sock.bind(address)
        spawn(stack, serve_zmq, address)
        stack.callback(sock.close, 0)
        sockets.append(sock)
    return sockets


def start_ray(stack: Processes, folder: str, groups: int) -> tuple[Any, list[Any]]:
    """Ray with workers at the priority of everybody else, and an actor a group."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=groups,
        include_dashboard=False,
        object_store_memory=512 << 20,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level="ERROR",
    )
    stack.callback(ray.shutdown)

    @ray.remote(num_cpus=0)  # type: ignore[misc]
    class Group:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.shard = IdentityShard()
            self.out = np.zeros((1024, HIDDEN), np.float32)

        def call(self, frame: np.ndarray) -> Any:
            return answer(self.shard, frame, self.out)

    return ray, [Group.remote() for _ in range(groups)]


def run(args: argparse.Namespace, stack: Processes) -> list[dict[str, Any]]:
    """Start what is asked for and measure cell by cell."""
    folder = tempfile.mkdtemp(prefix="rt")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    most = max(args.groups)
    spin_s = args.group_spin_us * 1e-6
    endpoints = [spawn(stack, serve_group, index, SECRET, spin_s) for index in range(most)]
    sockets = [] if "zmq" in args.without else start_zmq(stack, folder, most)
    ray, actors = (None, []) if "ray" in args.without else start_ray(stack, folder, most)
    results = []
    for groups in args.groups:
        planes: dict[str, RoundTrip] = {"memcpy": by_memcpy(groups)}
        clients = []
        for kind in ("shm", "tcp"):
            if kind not in args.without:
                clients.append(product(endpoints[:groups], kind, args.spin_us * 1e-6))
                planes[kind] = by_client(clients[-1])
        if sockets:
            planes["zmq"] = by_zmq(sockets[:groups])
        if actors:
            planes["ray"] = by_ray(ray, actors[:groups])
        for tokens in args.tokens:
            repeat = args.repeat if tokens < 256 else max(4, args.repeat // 4)
            spent = measure(planes, tokens, groups, args.rounds, repeat)
            results.append({"tokens": tokens, "groups": groups} | summary(spent))
        for client in clients:
            client.close()
    return results


RATIOS = {"ray/shm": ("ray", "shm"), "zmq/shm": ("zmq", "shm"), "shm/memcpy": ("shm", "memcpy")}


def summary(spent: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians, the lowest tenth, and the three ratios that have targets, paired by round."""
    every = {name: sorted(t for times in rounds for t in times) for name, rounds in spent.items()}
    middle = {name: [statistics.median(times) for times in r] for name, r in spent.items()}
    ratios = {
        name: round(statistics.median(map(operator.truediv, middle[a], middle[b])), 2)
        for name, (a, b) in RATIOS.items()
        if a in middle and b in middle
    }
    return (
        {name: round(statistics.median(times), 1) for name, times in every.items()}
        | {"p10": {name: round(times[len(times) // 10], 1) for name, times in every.items()}}
        | {"ratios": ratios}
    )


def show(results: list[dict[str, Any]]) -> None:
    """The table: medians in microseconds, and the three ratios that have targets."""
    names = [n for n in ("memcpy", "shm", "tcp", "zmq", "ray") if n in results[0]]
    wanted = list(results[0]["ratios"])
    rows = [
        [r["tokens"], r["groups"], *(round(r[n]) for n in names)]
        + [f"{r['ratios'][name]:.2f}" for name in wanted]
        for r in results
    ]
    print(table(["tokens", "groups", *names, *wanted], rows))


def main() -> None:
    """Measure, print, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=24, help="round trips a plane and round")
    parser.add_argument("--spin-us", type=float, default=ClientConfig().spin_s * 1e6)
    parser.add_argument("--group-spin-us", type=float, default=ServerConfig().spin_s * 1e6)
    parser.add_argument("--without", nargs="*", default=[], help="planes to leave out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Ray's results
    with contextlib.ExitStack() as stack:
        results = run(args, stack)
        load = os.getloadavg()[0]
    show(results)
    finish("roundtrip", vars(args) | {"load_1min": round(load, 1)}, results)


if __name__ == "__main__":
    main()
