"""Small engines and requests for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.local import LocalExperts
from raymoe.experts.shard import ExpertShard
from raymoe.requests import GenerationRequest, SamplingParams, TokenEvent, TokenLogprobs
from tests.zoo import tiny_model

SMALL: dict[str, Any] = {"block_tokens": 4, "chunk_tokens": 16, "kv_bytes": 1 << 20}


def stock_model(family: str = "qwen3_moe") -> nn.Module:
    """A tiny model with transformers' own experts."""
    return tiny_model(family)


def stock_engine(family: str = "qwen3_moe", **config: Any) -> Engine:
    """An engine over a tiny model with transformers' own experts."""
    return Engine(stock_model(family), None, EngineConfig(**{**SMALL, **config}))


def local_engine(path: Path, device: str = "cpu", **config: Any) -> Engine:
    """An engine over a checkpoint's dense part, with its experts in this process."""
    spec = read_spec(path)
    shard = ExpertShard(spec, budget_bytes=1 << 30, device=device)
    for layer, count in enumerate(spec.experts_of_layer):
        for expert in range(count):
            shard.add(layer, expert, load_expert(spec, layer, expert))
    experts = LocalExperts(shard)
    model = load_dense(spec, experts, device=device)
    return Engine(model, experts, EngineConfig(**{**SMALL, **config}))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 500, (length,), generator=draw).tolist())


def request(
    name: str = "a",
    prompt_ids: tuple[int, ...] = (5, 6, 7),
    output_ids: tuple[int, ...] = (),
    priority: int = 0,
    **sampling: Any,
) -> GenerationRequest:
    """Greedy, seed 1, without end-of-text unless said otherwise."""
    fields = {"seed": 1, "temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id=name,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        priority=priority,
        sampling=SamplingParams(**fields),
    )


@dataclass
class Outcome:
    """All that came of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    cached_tokens: int = field(default=0, compare=False)

    def take(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the end"
        self.tokens += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.finish, self.error = event.finish, event.error
        assert not (event.cached_prompt_tokens and self.cached_tokens), "said twice"
        self.cached_tokens += event.cached_prompt_tokens


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[str, Outcome]:
    """Add all at once and step until nothing is left."""
    outcomes = {}
    for each in requests:
        engine.add(each)
        outcomes[each.request_id] = Outcome()
    finish(engine, outcomes)
    return outcomes


def finish(engine: Engine, outcomes: dict[str, Outcome]) -> None:
    """Step until nothing is left."""
    for _ in range(10_000):
        if not engine.has_work:
            assert engine.pool.used == 0, "blocks were not freed"
            return
        for event in engine.step():
            outcomes[event.request_id].take(event)
    raise AssertionError("the engine does not come to an end")


def generate(
    model: Any, prompt_ids: tuple[int, ...], tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Stock greedy generation without end-of-text: token ids, and logits [tokens, V]."""
    ids = torch.tensor([prompt_ids], device=model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return made.sequences[0, len(prompt_ids) :].tolist(), torch.cat(made.logits)
