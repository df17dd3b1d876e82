"""vLLM engines in this process, stock and over remote experts, and what they generate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from raymoe.vllm_plugin.remote import RemoteExperts

NEAR_TIE = 1e-4
"""Where the reference's two best logprobs are closer, float32 rounding may choose either."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One greedy output: token ids, and by how much each was ahead of the next best."""

    ids: tuple[int, ...]
    leads: tuple[float, ...]


@contextmanager
def engine_of(model: Path, **options: Any) -> Iterator[LLM]:
    """float32, small steps: prompts are prefilled in chunks, beside others' decoding.

    Shut down at the end: an engine that is only forgotten ends vLLM's process groups when it is
    collected, under whichever engine there is by then.
    """
    engine = LLM(
        model=str(model), dtype="float32", max_model_len=256, max_num_seqs=8,
        max_num_batched_tokens=64, block_size=32, seed=0, **{"enforce_eager": True, **options},
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def prompts(vocab: int, count: int = 6, longest: int = 100) -> list[dict[str, list[int]]]:
    draw = random.Random(1)
    return [
        {"prompt_token_ids": [draw.randrange(4, vocab) for _ in range(draw.randrange(3, longest))]}
        for _ in range(count)
    ]


def generate(engine: LLM, asked: Sequence[Any], tokens: int = 24) -> list[Text]:
    """Greedy, without end-of-text."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    texts = []
    for output in engine.generate(asked, sampling, use_tqdm=False):
        made = output.outputs[0]
        best = [sorted((e.logprob for e in step.values()), reverse=True) for step in made.logprobs]
        texts.append(Text(ids=tuple(made.token_ids), leads=tuple(b[0] - b[1] for b in best)))
    return texts


def differences(reference: Sequence[Text], texts: Sequence[Text]) -> list[str]:
    """Where a text leaves the reference at no near tie; near ties are printed."""
    wrong = []
    for number, (right, text) in enumerate(zip(reference, texts, strict=True)):
        pairs = enumerate(zip(right.ids, text.ids, strict=True))
        at = next((i for i, (a, b) in pairs if a != b), None)
        if at is None:
            continue
        line = f"text {number} token {at}: the reference leads by {right.leads[at]:.1e}"
        if right.leads[at] < NEAR_TIE:
            print("near tie:", line)
        else:
            wrong.append(line)
    return wrong


def remote_of(engine: LLM) -> RemoteExperts:
    """The remote experts of an engine in this process; every layer has the same."""

    def find(model: Any) -> RemoteExperts:
        found = {m.remote for m in model.modules() if getattr(m, "remote", None) is not None}
        (remote,) = found
        return remote

    remote: RemoteExperts = engine.apply_model(find)[0]
    return remote


@contextmanager
def remote_engine(model: Path, settings: dict[str, Any], **options: Any) -> Iterator[LLM]:
    """An engine with its experts elsewhere; its threads have ended afterwards."""
    more = {"load_format": "raymoe", "additional_config": {"raymoe": settings}}
    with engine_of(model, **more, **options) as engine:
        try:
            yield engine
        finally:
            remote_of(engine).close()


@contextmanager
def at_dispatch(engine: LLM, number: int, act: Callable[[], None]) -> Iterator[None]:
    """`act` once, when the messages of the `number`th dispatch from now are out."""
    client = remote_of(engine).client
    dispatch = client.dispatch
    left = number

    def counted(*args: Any) -> Any:
        nonlocal left
        batch = dispatch(*args)
        left -= 1
        if left == 0:
            act()
        return batch

    client.dispatch = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        client.dispatch = dispatch  # type: ignore[method-assign]
    assert left <= 0, f"{left} dispatches short"
