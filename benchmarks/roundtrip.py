"""One dispatch + combine round trip, through the product's own code and through others' transports.

    python -m benchmarks.roundtrip [--tokens 1 32 512] [--groups 1 2 4] [--rounds 15]

Top-8 routing over 64 experts, T x 2048 float32. A token's row is sent once to each group that has
any of its experts; each group answers with the weighted sum of its pairs, and the router adds the
partial sums: [T, D] in, [T, D] out, which with identity experts and weights that sum to 1 must be
the input again (checked on every plane). Groups are processes of their own.

Timed, from the gate's choice to the sum: cutting into messages, gathering rows, sending, the
group's weighted sum, sending back, adding up. An identity expert costs the group one pass over its
rows (out = x * sum of the row's weights), so that what is measured is the data plane.

    shm, tcp   ExpertClient -> links -> GroupRuntime, as in the product
    zmq ipc    the same cutting, gathering and adding; one PAIR socket a group
    ray        the same; one actor call a group and ray.get
    memcpy     the rows of every group's request and reply copied once, in one process: the floor

All planes take turns within every round; figures are medians over all rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
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
from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.expert_client import ExpertClient
from raymoe.dispatch import Message, cut_messages
from raymoe.group import GroupRuntime
from raymoe.links.handshake import Identity
from raymoe.links.protocol import PARTIAL, Wire
from raymoe.links.server import ServerConfig
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


class IdentityShard:
    """Identity experts, all resident: out[t] = x[t] * (sum of the weights of its pairs)."""

    budget_bytes = resident_bytes = 0

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
        """One pass over the rows."""
        total = np.bincount(token_of_pair.numpy(), weights.numpy(), len(x)).astype(np.float32)
        np.multiply(x.numpy(), total[:, None], out=out.numpy())
        return []


def serve_group(index: int, secret: bytes, pipe: Connection) -> None:
    """A group as in the product."""
    torch.set_num_threads(1)
    spec: Any = IdentitySpec()
    shard: Any = IdentityShard()
    group = GroupRuntime(
        spec, f"g{index}", 1, shard, IDENTITY, secret, node=NODE, config=ServerConfig()
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
    pipe.send(True)
    # ZeroMQ does not tell of a peer's death: the pipe does
    threading.Thread(target=lambda: (await_end(pipe), os._exit(0)), daemon=True).start()
    while True:
        frames = sock.recv_multipart(copy=False)
        out = answer(shard, *(frame.buffer for frame in frames))
        sock.send(out, copy=out.nbytes < 65536)


def answer(shard: IdentityShard, x: Any, experts: Any, counts: Any, tokens: Any, w: Any) -> Any:
    """Compute a message that came as buffers; a numpy array [N, D]."""
    rows = torch.from_numpy(np.frombuffer(x, np.float32).reshape(-1, HIDDEN))
    out = torch.empty_like(rows)
    shard.compute(
        0,
        rows,
        torch.from_numpy(np.frombuffer(experts, np.int32)),
        torch.from_numpy(np.frombuffer(counts, np.int32)),
        torch.from_numpy(np.frombuffer(tokens, np.int32)),
        torch.from_numpy(np.frombuffer(w, np.float32)),
        out,
    )
    return out.numpy()


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


def cut(gate: Gate, groups: int) -> tuple[Batch, list[Message]]:
    """What every plane does first: the product's own code."""
    batch = Batch(0, gate.hidden, gate.expert_ids, gate.weights, WIRE, PARTIAL)
    return batch, cut_messages(
        batch.expert_of_pair,
        placed(groups)[batch.expert_of_pair],
        top_k=TOP_K,
        tokens=batch.tokens,
        experts=EXPERTS,
        message_tokens=1 << 20,
    )


def arrays(batch: Batch, message: Message) -> list[np.ndarray]:
    """A message as five arrays."""
    return [
        batch.x.take(message.tokens, 0),
        message.experts.astype(np.int32),
        message.counts.astype(np.int32),
        message.token_of_pair.astype(np.int32),
        batch.weights.take(message.pairs),
    ]


def by_client(client: ExpertClient) -> RoundTrip:
    """The product."""
    return lambda gate: client.combine(
        client.dispatch(0, gate.hidden, gate.expert_ids, gate.weights)
    )


def by_zmq(sockets: list[Any]) -> RoundTrip:
    """ZeroMQ."""

    def round_trip(gate: Gate) -> torch.Tensor:
        batch, messages = cut(gate, len(sockets))
        for message in messages:
            parts = arrays(batch, message)
            small = parts[0].nbytes < 65536
            sockets[message.group].send_multipart([parts[0], *parts[1:]], copy=small)
        for message in messages:
            frame = sockets[message.group].recv(copy=False)
            batch.add(message, np.frombuffer(frame.buffer, np.float32).reshape(-1, HIDDEN))
        return batch.result()

    return round_trip


def by_ray(ray: Any, actors: list[Any]) -> RoundTrip:
    """Ray actor calls."""

    def round_trip(gate: Gate) -> torch.Tensor:
        batch, messages = cut(gate, len(actors))
        calls = [actors[m.group].call.remote(*arrays(batch, m)) for m in messages]
        for message, rows in zip(messages, ray.get(calls), strict=True):
            batch.add(message, rows)
        return batch.result()

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
) -> dict[str, list[float]]:
    """Microseconds of each round trip; planes in a new order each round."""
    batches = gates(tokens)
    for gate in batches:
        for name, plane in planes.items():
            gate.rows[groups] = [len(message.tokens) for message in cut(gate, groups)[1]]
            torch.testing.assert_close(
                plane(gate), gate.hidden, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    spent: dict[str, list[float]] = {name: [] for name in planes}
    shuffler = random.Random(tokens * 10 + groups)
    order = list(planes)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            plane, times = planes[name], spent[name]
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

        def call(self, *parts: np.ndarray) -> Any:
            return answer(self.shard, *parts)

    return ray, [Group.remote() for _ in range(groups)]


def run(args: argparse.Namespace, stack: Processes) -> list[dict[str, Any]]:
    """Start what is asked for and measure cell by cell."""
    folder = tempfile.mkdtemp(prefix="rt")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    most = max(args.groups)
    endpoints = [spawn(stack, serve_group, index, SECRET) for index in range(most)]
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
            results.append(
                {"tokens": tokens, "groups": groups}
                | {name: round(statistics.median(times), 1) for name, times in spent.items()}
                | {"p10": {n: round(sorted(t)[len(t) // 10], 1) for n, t in spent.items()}}
            )
        for client in clients:
            client.close()
    return results


def show(results: list[dict[str, Any]]) -> None:
    """The table: medians in microseconds, and the three ratios that have targets."""
    names = [n for n in ("memcpy", "shm", "tcp", "zmq", "ray") if n in results[0]]
    ratios = {"ray/shm": ("ray", "shm"), "zmq/shm": ("zmq", "shm"), "shm/memcpy": ("shm", "memcpy")}
    wanted = {n: pair for n, pair in ratios.items() if set(pair) <= set(names)}
    rows = [
        [r["tokens"], r["groups"], *(round(r[n]) for n in names)]
        + [f"{r[a] / r[b]:.2f}" for a, b in wanted.values()]
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
