"""Whatever a client may ask for, no step fails: a step that does ends the router for everybody."""

from __future__ import annotations

import random
from typing import Any

from raymoe.requests import GenerationRequest, SamplingParams
from tests.engine.support import stock_engine

VOCABULARY = 512
# what the gateway lets through, the ends of every range among it
CHOICES: dict[str, tuple[Any, ...]] = {
    "choice": (0, 127),
    "temperature": (0, 0, 1e-300, 1e-38, 1e-5, 0.7, 1.0, 2.0),
    "top_p": (1.0, 1.0, 1e-300, 1e-9, 0.5, 0.999999),
    "top_k": (0, 1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 2**63 - 1),
    "min_p": (0.0, 0.0, 1e-300, 0.1, 1.0),
    "typical_p": (1.0, 1.0, 1e-300, 0.5),
    "presence_penalty": (0, 0, -2, 2),
    "frequency_penalty": (0, -2, 2),
    "repetition_penalty": (1.0, 5e-324, 1e-30, 1.2, 100.0),
    "logit_bias": (
        (),
        tuple((token, -100.0) for token in range(VOCABULARY)),
        ((0, 100.0), (0, 100.0)),
        ((VOCABULARY - 1, -100.0),),
    ),
    "max_tokens": (0, 1, 2, 5),
    "ignore_eos": (True, False),
    "stop_token_ids": ((), (1,), tuple(range(256)), tuple(range(256, VOCABULARY))),
    "logprobs": (None, None, 0, 5, 20),
    "prompt_logprobs": (None, None, 0, 20),
}


def any_request(draw: random.Random, name: str) -> GenerationRequest:
    fields = {field: draw.choice(values) for field, values in CHOICES.items()}
    fields["min_tokens"] = draw.randint(0, fields["max_tokens"])
    return GenerationRequest(
        request_id=name,
        prompt_ids=_ids(draw, draw.choice((1, 2, 15, 16, 17, 33, 60))),
        output_ids=_ids(draw, draw.choice((0, 0, 0, 1, 3))),
        sampling=SamplingParams(seed=draw.randrange(2**63), **fields),
        priority=draw.choice((0, -(2**31), 2**31 - 1)),
    )


def _ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(VOCABULARY) for _ in range(count))


def test_no_allowed_request_makes_a_step_fail() -> None:
    draw, engine = random.Random(0), stock_engine()
    for turn in range(60):
        requests = [any_request(draw, f"{turn}-{n}") for n in range(draw.randint(1, 4))]
        ended: dict[str, str] = {}
        for one in requests:
            engine.add(one)
        if turn % 5 == 0:
            engine.cancel(requests[0].request_id)
        while engine.has_work:
            for event in engine.step():
                assert event.error is None
                assert all(0 <= token < VOCABULARY for token in event.token_ids)
                if event.finish is not None:
                    ended[event.request_id] = event.finish
        assert ended.keys() == {one.request_id for one in requests}
