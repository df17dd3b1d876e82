"""raymoe's sampler as vLLM calls it: rows that come, move and go; needs vLLM, but no engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from raymoe.engine.sampling import Draw, pick
from raymoe.requests import GenerationRequest, SamplingParams
from raymoe.vllm_plugin.asking import asked
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.drawing import NAME, RaymoeSampling

VOCAB = 50
PROMPT = (5, 6, 7)


def processor(folder: Path) -> RaymoeSampling:
    config = SimpleNamespace(
        additional_config={"raymoe": {"controller": "h:1", "board": str(folder)}},
        model_config=SimpleNamespace(model="", get_vocab_size=lambda: VOCAB),
    )
    return RaymoeSampling(config, torch.device("cpu"), False)


def joins(index: int, output: tuple[int, ...], made: list[int], **sampling: Any) -> Any:
    """What vLLM says of a request that joins its batch, `output` being from elsewhere."""
    request = GenerationRequest(
        request_id=f"r{index}",
        prompt_ids=PROMPT,
        output_ids=output,
        sampling=SamplingParams(seed=index, **sampling),
    )
    params = SimpleNamespace(extra_args=asked(request, (2,)).to_extra())
    return (index, params, [*PROMPT, *output], made)


def test_each_row_is_drawn_as_the_embedded_engine_draws_it(tmp_path: Path) -> None:
    Board.create(tmp_path)
    (named,) = _load_logitsprocs_by_fqcns([NAME])
    assert named is RaymoeSampling
    sampler = processor(tmp_path)
    made = [1, 2]
    added = [
        joins(0, (), [], temperature=0.0),
        joins(1, (), made, temperature=1.0, frequency_penalty=0.5),
        joins(2, (9, 9), [3], temperature=1.0, min_tokens=5),
        (3, SimpleNamespace(extra_args=None), [4], []),  # somebody else's
    ]
    sampler.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))

    def draw(index: int, tokens: list[int], banned: tuple[int, ...] = ()) -> int:
        settings = added[index][1].extra_args["raymoe"]["sampling"]
        sampling = SamplingParams(**{**settings, "logit_bias": (), "stop_token_ids": ()})
        one = Draw(sampling=sampling, tokens=tokens, prompt_tokens=3, banned=banned)
        return pick(logits[[index]], [one])[0]

    shaped = sampler.apply(logits.clone())
    assert torch.equal(shaped[[0, 3]], logits[[0, 3]])
    assert shaped.argmax(-1)[1:3].tolist() == [
        draw(1, [*PROMPT, 1, 2]),
        draw(2, [*PROMPT, 9, 9, 3], banned=(2,)),
    ]
    made.append(8)  # vLLM goes on in the list that it gave
    assert int(sampler.apply(logits.clone()).argmax(-1)[1]) == draw(1, [*PROMPT, 1, 2, 8])

    moved = [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]
    sampler.update_state(BatchUpdate(batch_size=2, removed=[0, 3], added=[], moved=moved))
    logits = logits[[2, 1]]
    assert (
        int(sampler.apply(logits.clone()).argmax(-1)[0])
        == pick(
            logits[[0]],
            [
                Draw(
                    sampling=SamplingParams(seed=2, temperature=1.0, min_tokens=5),
                    tokens=[*PROMPT, 9, 9, 3],
                    prompt_tokens=3,
                    banned=(2,),
                )
            ],
        )[0]
    )


def test_in_a_void_step_it_says_who_was_there(tmp_path: Path) -> None:
    board = Board.create(tmp_path)
    sampler = processor(tmp_path)
    added = [joins(0, (), [], temperature=0.0), joins(1, (), [], temperature=1.0)]
    sampler.update_state(BatchUpdate(batch_size=2, removed=[], added=added, moved=[]))
    board.void()
    logits = torch.zeros(2, VOCAB)
    assert torch.equal(sampler.apply(logits.clone()), logits)
    assert board.requests() == {"r0", "r1"}
