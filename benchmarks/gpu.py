"""Experts on a CUDA device: the kernels, a layer over a link, tokens a second.

    python -m benchmarks.gpu [--only kernels layer engine] [--tiles]

kernels  one message through the experts of a layer in bfloat16, top-8 of 64; weights of several
         layers take turns, so that they come from memory. Microseconds on the device (CUDA graphs,
         medians). "floor" is the weights' bytes at the measured speed of a large copy, or the
         products at that of a large matrix product. "stacked" ones are torch's own, on weights
         that lie in one tensor a layer, which replicas that come and go singly do not: yardsticks
layer    dispatch + combine of one layer from tensors on the device to sums on the device, wall
         microseconds, medians: experts in this process; experts in a group, another process on
         the same device, over shared memory; the same without the copies to and from the device
engine   a random checkpoint: transformers' `generate`, the engine with its experts in process,
         and with its experts in a group of another process; tokens/s, medians of three
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish, table
from placement.table import Table
from raymoe.checkpoint.record import ExpertRecord, load_expert
from raymoe.checkpoint.spec import LayerSpec, ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.engine.hosted import HostedExperts
from raymoe.engine.local import LocalExperts
from raymoe.experts.choose import choose_kernels, shape_only
from raymoe.experts.grouped import DeviceReplica, GroupedKernel, Tiles, tiles_for, words_of
from raymoe.experts.plain import PlainKernel
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.links.handshake import Identity
from raymoe.links.server import ServerConfig
from raymoe.table import GroupEndpoint, RoutingTable

EXPERTS, TOP_K, LAYERS = 64, 8, 3
DTYPE = torch.bfloat16
DEVICE = "cuda"
SHAPES = ((2048, 768), (2048, 1408))
TOKENS = (1, 32, 512)
SECRET = secrets.token_bytes(32)
Run = Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=["kernels", "layer", "engine"])
    parser.add_argument("--tiles", action="store_true", help="try tiles of every shape")
    args = parser.parse_args()
    torch.set_num_threads(4)
    ceilings = device_speed()
    print("card", torch.cuda.get_device_name(), "torch", torch.__version__, ceilings)
    todo = {"kernels": kernels, "layer": layer, "engine": engine}
    results: dict[str, Any] = {"card": torch.cuda.get_device_name(), **ceilings}
    for name, run in todo.items():
        if name in (args.only or todo):
            results[name] = run(args, ceilings)
    finish("gpu", vars(args), results)


def device_speed() -> dict[str, float]:
    """Bytes/s of a large copy, read and written, and flop/s of a large product."""
    data = torch.randn(1 << 29, device=DEVICE, dtype=DTYPE)
    other = torch.empty_like(data)
    square = torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    copied = timed(lambda _: other.copy_(data), 10)
    multiplied = timed(lambda _: square @ square, 10)
    return {"bytes_per_s": 2 * data.nbytes / copied, "flop_per_s": 2 * 8192**3 / multiplied}


def timed(run: Run, repeats: int) -> float:
    """Median seconds on the device, by events."""
    run(0)
    times = []
    for number in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(number)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def graphed(run: Run, repeats: int = 20) -> float:
    """Median seconds of one call, of all layers replayed as a graph: no launch gaps."""
    for number in range(LAYERS):
        run(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(LAYERS):
            run(number)
    return timed(lambda _: graph.replay(), repeats) / LAYERS


# --- kernels ----------------------------------------------------------------------------------


def routing_of(tokens: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Active experts, pairs of each, and the pairs' tokens: top-8 of 64 at random."""
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    chosen = scores.topk(TOP_K, dim=1).indices.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    active, counts = torch.unique_consecutive(chosen[order], return_counts=True)
    return active, counts.tolist(), (order // TOP_K).int()


def kernels(args: argparse.Namespace, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    results = []
    for hidden, inner in SHAPES:
        spec = replace(shape_only(hidden, inner), experts=EXPERTS)
        weights = [
            {
                s.tensor: torch.randn(EXPERTS, *s.shape, device=DEVICE, dtype=DTYPE) / 30
                for s in spec.sources
            }
            for _ in range(LAYERS)
        ]
        for tokens in TOKENS:
            results.append(one_message(spec, hidden, weights, tokens, ceilings, args.tiles))
    names = [name for name in results[0] if name != "tiles"]
    print(table(names, [[each[name] for name in names] for each in results]))
    for each in results:
        if each["tiles"]:
            best = sorted(each["tiles"].items(), key=lambda item: item[1])[:6]
            print(each["D x F"], each["tokens"], *(f"{name} {us:.1f}" for name, us in best))
    return results


def one_message(
    spec: LayerSpec,
    hidden: int,
    weights: list[dict[str, torch.Tensor]],
    tokens: int,
    ceilings: dict[str, float],
    sweep: bool,
) -> dict[str, Any]:
    active, counts, host_rows = routing_of(tokens)
    rows, pairs = host_rows.to(DEVICE), len(host_rows)
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=DTYPE)
    replicas = [
        [DeviceReplica({name: part[e] for name, part in layer.items()}) for e in active.tolist()]
        for layer in weights
    ]
    inner = torch.empty(pairs, spec.inner, device=DEVICE, dtype=DTYPE)
    out = torch.empty(pairs, hidden, device=DEVICE, dtype=DTYPE)
    grouped, plain = GroupedKernel(DEVICE, DTYPE), PlainKernel(DEVICE, DTYPE)

    def launches(tiles: Tiles) -> Run:
        made = [words_of(each, counts, tiles.rows) for each in replicas]
        there = [(torch.from_numpy(words).to(DEVICE), at, count) for words, at, count in made]

        def run(number: int) -> None:
            words, at, count = there[number % LAYERS]
            grouped.launch(spec, tiles, words, at, count, x, rows, inner, out)

        return run

    tiles = tiles_for(pairs, len(counts), spec.inner, DTYPE)
    numbers = spec.parameters * len(counts)
    floor = max(
        2 * numbers / ceilings["bytes_per_s"], 2 * spec.parameters * pairs / ceilings["flop_per_s"]
    )
    found: dict[str, Any] = {
        "D x F": f"{hidden} x {spec.inner}",
        "tokens": tokens,
        "active": len(counts),
        "floor": floor * 1e6,
        "grouped": graphed(launches(tiles)) * 1e6,
        "plain": graphed(lambda n: plain.run(spec, replicas[n % LAYERS], counts, x, rows)) * 1e6,
        "stacked grouped_mm": stacked_mm(spec, weights, active, counts, x, rows),
        "stacked bmm": stacked_bmm(spec, weights, active, counts, x, rows),
    }
    truth = plain.run(spec, replicas[0], counts, x, rows).double()
    launches(tiles)(0)
    found["error"] = float((out.double() - truth).norm() / truth.norm())
    found["with host"] = host_time(lambda n: grouped.run(spec, replicas[n % 3], counts, x, rows))
    found["tiles"] = {}
    for each in every_tiles(tokens) if sweep else ():
        with contextlib.suppress(Exception):  # more shared memory than there is
            found["tiles"][",".join(map(str, each))] = graphed(launches(each), 7) * 1e6
    return found


def every_tiles(tokens: int) -> list[Tiles]:
    """Each costs seconds of compiling."""
    if tokens < 256:
        return [
            Tiles(16, 32, 128, 4, 3), Tiles(16, 32, 128, 4, 5), Tiles(16, 32, 256, 4, 3),
            Tiles(16, 64, 64, 4, 4), Tiles(16, 64, 128, 4, 2), Tiles(16, 64, 128, 4, 3),
            Tiles(16, 64, 128, 8, 3), Tiles(16, 64, 128, 4, 4), Tiles(16, 128, 64, 4, 3),
            Tiles(16, 128, 64, 8, 4), Tiles(16, 128, 128, 8, 3),
        ]  # fmt: skip
    return [
        Tiles(32, 64, 64, 4, 4), Tiles(32, 128, 64, 4, 3), Tiles(64, 64, 64, 4, 3),
        Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 8, 3),
        Tiles(64, 128, 32, 4, 4), Tiles(128, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3),
        Tiles(128, 128, 64, 8, 3),
    ]  # fmt: skip


def wait() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def host_time(run: Run, repeats: int = 30) -> float:
    """Median microseconds of one call from the host, waited for."""
    times = []
    for number in range(repeats + 3):
        wait()
        began = time.perf_counter()
        run(number)
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e6


def stacked_mm(
    spec: LayerSpec,
    weights: list[dict[str, torch.Tensor]],
    active: torch.Tensor,
    counts: list[int],
    x: torch.Tensor,
    rows: torch.Tensor,
) -> float | None:
    """torch's grouped_mm over all experts of a layer; None where there is none."""
    function: Any = getattr(torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))
    ends = torch.zeros(EXPERTS, dtype=torch.int32)
    ends[active] = torch.tensor(counts, dtype=torch.int32)
    offs = ends.cumsum(0).int().to(DEVICE)

    def run(number: int) -> None:
        layer = weights[number % LAYERS]
        gate, up = function(x[rows.long()], layer["up"], offs=offs).chunk(2, -1)
        function(torch.nn.functional.silu(gate) * up, layer["down"], offs=offs)

    try:
        return graphed(run) * 1e6
    except Exception as why:
        print("grouped_mm:", repr(why)[:200])
        return None


def stacked_bmm(
    spec: LayerSpec,
    weights: list[dict[str, torch.Tensor]],
    active: torch.Tensor,
    counts: list[int],
    x: torch.Tensor,
    rows: torch.Tensor,
) -> float:
    """One padded bmm a product, over all experts of a layer."""
    padded = torch.zeros(EXPERTS, max(counts), dtype=torch.int64)
    at = 0
    for expert, count in zip(active.tolist(), counts, strict=True):
        padded[expert, :count] = rows[at : at + count].cpu()
        at += count
    index = padded.to(DEVICE)

    def run(number: int) -> None:
        layer = weights[number % LAYERS]
        gate, up = torch.bmm(x[index], layer["up"]).chunk(2, -1)
        torch.bmm(torch.nn.functional.silu(gate) * up, layer["down"])

    return graphed(run) * 1e6


# --- a layer, over a link ---------------------------------------------------------------------


def made_up_spec(hidden: int, inner: int) -> ModelSpec:
    layer = replace(shape_only(hidden, inner), experts=EXPERTS)
    return ModelSpec(
        path="nowhere", family="none", fingerprint="0", hidden=hidden, top_k=TOP_K,
        attention="softmax", stored_dtype="bfloat16", compute_dtype="bfloat16",
        layer_specs=(layer,) * LAYERS,
    )  # fmt: skip


def full_shard(spec: ModelSpec) -> ExpertShard:
    """Every expert of a checkpoint, or made up where there is none."""
    shard = ExpertShard(spec, 1 << 40, DEVICE, DTYPE)
    draw = torch.Generator().manual_seed(0)
    for number, layer in enumerate(spec.layer_specs):
        made_up = ExpertRecord(
            tensors={
                s.tensor: (torch.randn(s.shape, generator=draw) / 30).to(DTYPE)
                for s in layer.sources
            }
        )
        for expert in range(layer.experts):
            missing = spec.path == "nowhere"
            shard.add(number, expert, made_up if missing else load_expert(spec, number, expert))
    return shard


def identity(spec: ModelSpec) -> Identity:
    return Identity(
        deployment="bench", fingerprint=spec.fingerprint, wire_dtype="bfloat16", hidden=spec.hidden
    )


def serve_group(spec_json: str, secret: bytes, pipe: Connection) -> None:
    """A process with one group that holds everything."""
    torch.set_num_threads(1)
    spec = ModelSpec.from_json(spec_json)
    group = GroupRuntime(
        spec, "g", 1, full_shard(spec), identity(spec), secret, node="n", config=ServerConfig()
    )
    pipe.send(group.endpoint())
    with contextlib.suppress(EOFError):
        pipe.recv()
    group.close()


@contextlib.contextmanager
def client_of_a_group(spec: ModelSpec) -> Iterator[ExpertClient]:
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=serve_group, args=(spec.to_json(), SECRET, far), daemon=True)
    process.start()
    far.close()
    client = ExpertClient(
        identity(spec), SECRET, "n", ClientConfig(first_deadline_s=60.0, deadline_floor_s=10.0)
    )
    try:
        if not pipe.poll(120):
            raise RuntimeError("the group did not start within 120 s")
        client.set_table(one_group(spec, pipe.recv()))
        while not client.connected():
            time.sleep(0.01)
        yield client
    finally:
        client.close()
        pipe.close()
        process.join(10)
        process.kill()


def one_group(spec: ModelSpec, endpoint: GroupEndpoint) -> RoutingTable:
    resident = np.zeros((spec.layers, spec.experts, 1), np.bool_)
    for number, experts in enumerate(spec.experts_of_layer):
        resident[number, :experts] = True
    one = np.ones(1)
    table = Table(
        term=1, epoch=1, group_ids=("g",), resident=resident, share=resident / one, speed=1e6 * one,
        alpha_s=0 * one, gamma_s=0 * one,
    )  # fmt: skip
    return RoutingTable(table=table, endpoints={"g": endpoint})


def layer(args: argparse.Namespace, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    results = []
    for hidden, inner in SHAPES:
        spec = made_up_spec(hidden, inner)
        chosen = type(choose_kernels(spec, DEVICE, DTYPE)[0]).__name__
        with client_of_a_group(spec) as client:
            planes: dict[str, Any] = {
                "in process": LocalExperts(full_shard(spec)),
                "group": HostedExperts(client, DEVICE),
                "group, from host": client,
            }
            for tokens in TOKENS:
                found: dict[str, Any] = {"D x F": f"{hidden} x {inner}", "tokens": tokens}
                for name, experts in planes.items():
                    where = "cpu" if experts is client else DEVICE
                    found[name] = host_time(layer_run(experts, hidden, tokens, where), 60)
                busy = [s for of in client.take_timings().values() for _, _, s in of][-60:]
                found["of it group busy"] = statistics.median(busy) * 1e6
                results.append(found | {"kernel": chosen})
        del planes
        torch.cuda.empty_cache()
    print(table(list(results[0]), [list(each.values()) for each in results]))
    return results


def layer_run(experts: Any, hidden: int, tokens: int, where: str) -> Run:
    draw = torch.Generator().manual_seed(tokens)
    top = torch.rand(tokens, EXPERTS, generator=draw).topk(TOP_K, dim=1)
    x = torch.randn(tokens, hidden, generator=draw).to(where, DTYPE)
    ids, weights = top.indices.to(where), torch.softmax(top.values, 1).to(where)

    def run(number: int) -> Any:
        with torch.inference_mode():
            return experts.combine(experts.dispatch(number % LAYERS, x, ids, weights))

    return run


# --- the engine -------------------------------------------------------------------------------


def engine(args: argparse.Namespace, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    from benchmarks.engine import run_engine
    from raymoe.checkpoint.dense import load_dense
    from raymoe.checkpoint.reader import read_spec
    from raymoe.engine.config import EngineConfig
    from raymoe.engine.engine import Engine

    config = EngineConfig(prefix_cache=False, kv_bytes=2 << 30)
    results = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        began = time.perf_counter()
        stock = random_checkpoint(Path(folder))
        spec = read_spec(folder, compute_dtype="bfloat16")
        print(f"checkpoint made in {time.perf_counter() - began:.1f} s")
        local = LocalExperts(full_shard(spec))
        client = stack.enter_context(client_of_a_group(spec))
        hosted = HostedExperts(client, DEVICE)
        dense = {"dtype": "bfloat16", "device": DEVICE}
        engines = {
            "engine": Engine(load_dense(spec, local, **dense), local, config),
            "engine, group": Engine(load_dense(spec, hosted, **dense), client, config),
        }
        print("packed:", [each.packed for each in engines.values()])
        draw = torch.Generator().manual_seed(0)
        for streams in (1, 32):
            prompts = torch.randint(5, 8000, (streams, 64), generator=draw)
            new = 48
            runs: dict[str, Callable[[], Any]] = {
                f"generate, {name}": partial(generate, stock, prompts, new, name)
                for name in ("grouped_mm", "eager")
            }
            for name, one in engines.items():
                runs[name] = partial(run_engine, one, prompts.tolist(), new)
            found: dict[str, Any] = {"streams": streams}
            for name, run in runs.items():
                run()
                times = []
                for _ in range(3):
                    wait()
                    start = time.perf_counter()
                    run()
                    wait()
                    times.append(time.perf_counter() - start)
                found[name] = streams * new / statistics.median(times)
            results.append(found)
    print(table(list(results[0]), [list(each.values()) for each in results]))
    return results


def generate(stock: Any, prompts: torch.Tensor, new: int, experts: str) -> Any:
    stock.set_experts_implementation(experts)
    ids = prompts.to(DEVICE)
    return stock.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


def random_checkpoint(folder: Path) -> Any:
    """A Qwen3-MoE of 4 layers, 64 experts, top-8, in bfloat16; the stock model."""
    import transformers

    hidden, inner = SHAPES[0]
    shape: Any = transformers.Qwen3MoeConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=6144, moe_intermediate_size=inner,
        num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, max_position_embeddings=4096,
        decoder_sparse_step=1, norm_topk_prob=True, tie_word_embeddings=False,
    )  # fmt: skip
    kind: Any = transformers.Qwen3MoeForCausalLM
    torch.manual_seed(0)
    with torch.device(DEVICE):
        stock = kind._from_config(shape, dtype=DTYPE).eval()
    stock.save_pretrained(folder)
    return stock


if __name__ == "__main__":
    main()
