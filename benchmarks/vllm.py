"""Tokens/s of vLLM with raymoe's experts against vLLM with its own, and against raymoe's engine.

    .venv-vllm/bin/python -m benchmarks.vllm [--model models/demo | --wide] [--streams 1 8 32]

One run, paired: the engines take turns at the same prompts, every figure is a median over turns,
every ratio a median of the turns' ratios. Greedy, float32, eager, 32 new tokens of ragged prompts
of 16 to 112 random ids, no prefix cache. The sides, all over the same two groups but the last:

    raymoe    vllm.LLM with load_format="raymoe"
    router    VllmEngine, as a router of `raymoe serve --engine vllm` runs it (AsyncLLM)
    embedded  raymoe's own engine, as a router runs it
    vllm      vllm.LLM alone, with the better of the given numbers of OpenMP threads

Engines over groups and the groups have one thread each. CPU time counts every process of a side, so
it can be compared on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import queue
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


def serve_llm(model: str, threads: int, settings: dict[str, Any] | None, pipe: Any) -> None:
    """A process with one vllm.LLM: answers prompts with (seconds, totals of its client)."""
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


def serve_router(model: str, kind: str, settings: dict[str, Any], folder: str, pipe: Any) -> None:
    """A process with the engine of a router ("router" or "embedded")."""
    os.environ.update({**ENVIRONMENT, "OMP_NUM_THREADS": "1"})
    del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as in a router
    import torch

    from raymoe.checkpoint.reader import read_spec
    from raymoe.config import parse_config, read_secret
    from raymoe.identity import identity_of
    from raymoe.requests import GenerationRequest, SamplingParams
    from raymoe.vllm_plugin.settings import host_and_port

    torch.set_num_threads(1)
    routers = {"max_batch": 32, "prefix_cache": False, "max_context_tokens": 256}
    values: dict[str, Any] = {
        "model": model, "secret_file": settings["secret_file"], "routers": routers
    }  # fmt: skip
    if kind == "router":
        values |= {"engine": "vllm", "vllm": {"engine_args": {"block_size": 32}}}
    config, spec = parse_config(values, source="benchmark"), read_spec(model)
    here: dict[str, Any] = {
        "name": f"{kind}-{os.getpid()}",
        "node": settings["node"],
        "controller": lambda: host_and_port(settings["controller"]),
    }
    if kind == "router":
        from raymoe.vllm_plugin.engine import VllmEngine

        board = Path(folder) / "vllm-board"
        board.mkdir()
        engine: Any = VllmEngine(config, spec, folder=board, **here)
    else:
        from actors.embedded import EmbeddedEngine

        identity, secret = identity_of(config, spec), read_secret(config)
        engine = EmbeddedEngine(config, spec, identity=identity, secret=secret, **here)
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    engine.start(
        lambda events: [ended.put(e.finish) for e in events if e.finish], lambda: ended.put("died")
    )
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    pipe.send(None)
    while (prompts := pipe.recv()) is not None:
        began = time.perf_counter()
        for number, prompt in enumerate(prompts):
            request = GenerationRequest(
                request_id=f"{began}-{number}", prompt_ids=tuple(prompt), sampling=sampling
            )
            engine.submit(request)
        finished = [ended.get(timeout=300) for _ in prompts]
        seconds = time.perf_counter() - began
        assert set(finished) == {"length"}, finished
        pipe.send((seconds, None))
    engine.close()


def client_totals(model: Any) -> dict[str, float]:
    """Seconds in each part of the exchange, and how many layers' batches there were."""
    stats = next(m.remote for m in model.modules() if getattr(m, "remote", None)).client.stats
    names = ("batches", "dispatch_s", "wait_s", "combine_s")
    return {name: getattr(stats, name) for name in names}


class Side:
    """One engine in its process, with the groups that work for it."""

    def __init__(self, name: str, serve: Any, *arguments: Any, fleet: Any = None) -> None:
        context = mp.get_context("spawn")
        self.name = name
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=serve, args=(*arguments, far))
        self._process.start()
        far.close()
        self._pipe.recv()
        self._groups = [psutil.Process(p.pid) for p in fleet.processes.values()] if fleet else []

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
        """Of the engine with its processes, and of the groups."""
        own = psutil.Process(self._process.pid)
        every = [own, *own.children(recursive=True), *self._groups]
        return sum(t.user + t.system for t in (p.cpu_times() for p in every))

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join(30)
        self._process.kill()
        self._process.join()


def per_layer(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
    """Milliseconds of dispatch, wait and combine of one MoE layer, between two totals."""
    batches = last["batches"] - first["batches"]
    parts = ("dispatch_s", "wait_s", "combine_s")
    return {f"{p.removesuffix('_s')}_ms": 1e3 * (last[p] - first[p]) / batches for p in parts}


def compare(sides: list[Side], vocab: int, streams: int, turns: int) -> dict[str, Any]:
    """The sides in turns; the first turn of each is not counted."""
    for side in sides:
        side.run(ragged_prompts(streams, vocab, seed=streams))
    start = sides[0].run(ragged_prompts(streams, vocab, seed=streams))["client"]
    rows = []
    for turn in range(turns):
        prompts = ragged_prompts(streams, vocab, seed=1000 * streams + turn)
        rows.append({side.name: side.run(prompts) for side in sides})

    def median(name: str, field: str) -> float:
        return statistics.median(row[name][field] for row in rows)

    alone = [side.name for side in sides if side.name.startswith("vllm")]
    best = max(alone, key=lambda name: median(name, "tokens_per_s"))
    shown = [side.name for side in sides if side.name not in alone]
    figures: dict[str, Any] = {"streams": streams}
    figures |= {f"{name}_tokens_per_s": median(name, "tokens_per_s") for name in shown}
    figures |= {"vllm_tokens_per_s": median(best, "tokens_per_s"), "vllm_is": best}
    for name in shown:
        ratios = [row[name]["tokens_per_s"] / row[best]["tokens_per_s"] for row in rows]
        figures[f"{name}_ratio"] = statistics.median(ratios)
    figures |= {f"{name}_cpu_ms": median(name, "cpu_ms_per_token") for name in (*shown, best)}
    return {**figures, **per_layer(start, rows[-1][sides[0].name]["client"])}


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
            sides.append(Side("raymoe", serve_llm, str(model), 1, settings, fleet=fleet))
            for kind in ("router", "embedded"):
                given = (str(model), kind, settings, folder)
                sides.append(Side(kind, serve_router, *given, fleet=fleet))
            for threads in args.threads:
                sides.append(Side(f"vllm-{threads}", serve_llm, str(model), threads, None))
            rows = [compare(sides, vocab, s, args.turns) for s in args.streams]
        finally:
            for side in sides:
                side.stop()
            fleet.close()
    # turned: a column for each number of streams
    print(table(["", *map(str, args.streams)], [[k, *(row[k] for row in rows)] for k in rows[0]]))
    finish("vllm", {**vars(args), "model": str(args.model)}, rows)


if __name__ == "__main__":
    main()
