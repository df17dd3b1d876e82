"""Tokens/s of vLLM with raymoe's experts against vLLM with its own, on the same cores.

    .venv-vllm/bin/python -m benchmarks.vllm [--model models/demo | --wide] [--streams 1 8 32]

One run, paired: the engines take turns at the same prompts, every figure is a median over turns.
Offline, greedy, float32, eager, 32 new tokens of ragged prompts of 16 to 112 random ids, no prefix
cache. vLLM alone gets the better of the given numbers of OpenMP threads; the engine over raymoe and
each of its groups have one. CPU time counts every process of a side, so it can be compared on a
machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.report import finish, table

NEW_TOKENS = 32
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def ragged_prompts(count: int, vocab: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(16, vocab, n).tolist() for n in rng.integers(16, 113, count)]


def write_wide_checkpoint(folder: Path) -> Path:
    """A random Qwen3-MoE: hidden 1024, 32 experts of 512, top 4, three layers."""
    from tests.zoo import tiny_checkpoint

    return tiny_checkpoint(
        "qwen3_moe", folder, dtype="bfloat16", hidden_size=1024, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, intermediate_size=1024, moe_intermediate_size=512,
        num_experts=32, num_experts_per_tok=4, vocab_size=4096,
    )  # fmt: skip


def serve_engine(model: str, threads: int, settings: dict[str, Any] | None, pipe: Any) -> None:
    """A process with one engine: answers prompts with (seconds, totals of its client)."""
    os.environ.update({**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)})
    from vllm import LLM, SamplingParams

    remote = {"load_format": "raymoe", "additional_config": {"raymoe": settings}}
    engine = LLM(
        model=model, dtype="float32", max_model_len=256, max_num_seqs=32, block_size=32,
        max_num_batched_tokens=512, enforce_eager=True, enable_prefix_caching=False, seed=0,
        skip_tokenizer_init=True, **(remote if settings else {}),
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    pipe.send(None)
    while (prompts := pipe.recv()) is not None:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        engine.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        pipe.send((seconds, engine.apply_model(client_totals)[0] if settings else None))


def client_totals(model: Any) -> dict[str, float]:
    """Seconds in each part of the exchange, and how many layers' batches there were."""
    stats = next(m.remote for m in model.modules() if getattr(m, "remote", None)).client.stats
    names = ("batches", "dispatch_s", "wait_s", "combine_s")
    return {name: getattr(stats, name) for name in names}


class Side:
    """One engine in its process, with the groups that work for it."""

    def __init__(self, model: Path, threads: int, fleet: Any = None, settings: Any = None) -> None:
        context = mp.get_context("spawn")
        self.threads = threads
        self._pipe, far = context.Pipe()
        self._process = context.Process(
            target=serve_engine, args=(str(model), threads, settings, far), daemon=True
        )
        self._process.start()
        far.close()
        self._pipe.recv()
        pids = [self._process.pid, *(p.pid for p in (fleet.processes.values() if fleet else ()))]
        self._processes = [psutil.Process(pid) for pid in pids]

    def run(self, prompts: list[list[int]]) -> dict[str, Any]:
        before = self._cpu_s()
        self._pipe.send(prompts)
        seconds, totals = self._pipe.recv()
        tokens = len(prompts) * NEW_TOKENS
        return {
            "tokens_per_s": tokens / seconds,
            "cpu_ms_per_token": 1e3 * (self._cpu_s() - before) / tokens,
            "client": totals,
        }

    def _cpu_s(self) -> float:
        return sum(t.user + t.system for t in (p.cpu_times() for p in self._processes))

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def per_layer(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
    """Milliseconds of dispatch, wait and combine of one MoE layer, between two totals."""
    batches = last["batches"] - first["batches"]
    parts = ("dispatch_s", "wait_s", "combine_s")
    return {f"{p.removesuffix('_s')}_ms": 1e3 * (last[p] - first[p]) / batches for p in parts}


def compare(ours: Side, stock: list[Side], vocab: int, streams: int, turns: int) -> dict[str, Any]:
    """The sides in turns; the first turn of each is not counted."""
    for side in (ours, *stock):
        side.run(ragged_prompts(streams, vocab, seed=streams))
    start = ours.run(ragged_prompts(streams, vocab, seed=streams))["client"]
    rows = []
    for turn in range(turns):
        prompts = ragged_prompts(streams, vocab, seed=1000 * streams + turn)
        rows.append((ours.run(prompts), [side.run(prompts) for side in stock]))
    best = max(
        range(len(stock)), key=lambda s: statistics.median(r[1][s]["tokens_per_s"] for r in rows)
    )

    def median(name: str, pick: Any) -> float:
        return statistics.median(pick(row)[name] for row in rows)

    return {
        "streams": streams,
        "raymoe_tokens_per_s": median("tokens_per_s", lambda r: r[0]),
        "vllm_tokens_per_s": median("tokens_per_s", lambda r: r[1][best]),
        "ratio": statistics.median(r[0]["tokens_per_s"] / r[1][best]["tokens_per_s"] for r in rows),
        "vllm_threads": stock[best].threads,
        "raymoe_cpu_ms": median("cpu_ms_per_token", lambda r: r[0]),
        "vllm_cpu_ms": median("cpu_ms_per_token", lambda r: r[1][best]),
        **per_layer(start, rows[-1][0]["client"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--wide", action="store_true", help="a random model, hidden 1024")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of vLLM alone")
    args = parser.parse_args()
    from tests.vllm.groups import Fleet

    with tempfile.TemporaryDirectory() as folder:
        model = write_wide_checkpoint(Path(folder)) if args.wide else args.model
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        fleet = Fleet(model, {"a": lambda _, e: e % 2 == 0, "b": lambda _, e: e % 2 == 1})
        sides: list[Side] = []
        try:
            settings = fleet.settings(Path(folder) / "secret")
            ours = Side(model, 1, fleet, settings)
            sides.append(ours)
            for threads in args.threads:
                sides.append(Side(model, threads))
            rows = [compare(ours, sides[1:], vocab, s, args.turns) for s in args.streams]
        finally:
            for side in sides:
                side.stop()
            fleet.close()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    finish("vllm", {**vars(args), "model": str(args.model)}, rows)


if __name__ == "__main__":
    main()
