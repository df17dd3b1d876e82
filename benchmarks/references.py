"""What the endpoint is measured against, each in a process of its own: transformers' `generate`,
and our engine with its experts in the same process."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]


def generate_process(model: str, pipe: Any) -> None:
    """Answers (prompts, (implementation, threads), new tokens) with tokens/s of `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.generation_config.pad_token_id = 0
    while (task := pipe.recv()) is not None:
        prompts, (implementation, threads), new_tokens = task
        torch.set_num_threads(threads)
        loaded.set_experts_implementation(implementation)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        started = time.perf_counter()
        with torch.inference_mode():
            loaded.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
        pipe.send(len(prompts) * new_tokens / (time.perf_counter() - started))


def engine_process(model: str, pipe: Any) -> None:
    """Answers (prompts, threads, new tokens) with tokens/s of our engine, experts included."""
    import torch

    from benchmarks.engine import local_engine, run_engine

    engine: Any = None
    while (task := pipe.recv()) is not None:
        prompts, threads, new_tokens = task
        if engine is None:  # what kernel is fastest depends on the threads, which stay
            torch.set_num_threads(threads)
            engine, _ = local_engine(Path(model))
            run_engine(engine, prompts, 4)
        started = time.perf_counter()
        made = run_engine(engine, prompts, new_tokens)
        pipe.send(sum(map(len, made)) / (time.perf_counter() - started))


class Reference:
    """One of the two above, with the settings (`variants`) of which the best counts."""

    def __init__(
        self,
        target: Callable[[str, Any], None],
        model: str,
        new_tokens: int,
        variants: tuple[Any, ...],
    ) -> None:
        self.variants = variants
        self.new_tokens = new_tokens
        context = mp.get_context("spawn")
        self.pipe, other = context.Pipe()
        before = os.environ.pop("OMP_NUM_THREADS", None)  # its best thread count is tried
        self.process = context.Process(target=target, args=(model, other), daemon=True)
        self.process.start()
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before

    def run(self, prompts: Prompts, variant: Any, new_tokens: int | None = None) -> float:
        """Tokens/s."""
        self.pipe.send((prompts, variant, new_tokens or self.new_tokens))
        return float(self.pipe.recv())

    def best_variant(self, prompts: Prompts, probe_tokens: int) -> Any:
        """The fastest, best of two runs each."""

        def rate(variant: Any) -> float:
            return max(self.run(prompts, variant, probe_tokens) for _ in range(2))

        return max(self.variants, key=rate)

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join(10)


def generate(model: str, new_tokens: int) -> Reference:
    """transformers."""
    variants = (("grouped_mm", 1), ("grouped_mm", 2), ("eager", 1), ("eager", 2))
    return Reference(generate_process, model, new_tokens, variants)


def in_process(model: str, new_tokens: int, threads: int) -> Reference:
    """Our engine without groups, links and HTTP."""
    return Reference(engine_process, model, new_tokens, (threads,))
