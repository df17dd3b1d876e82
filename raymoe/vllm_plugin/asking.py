"""A router's request as vLLM takes it: token ids, what ends it, and how its tokens are drawn.

vLLM draws from generators that have a state and takes the tokens of a continued request for its
prompt. So it is asked for the likeliest token only; everything else is done by our own sampler as
one of its logits processors (`drawing.py`), for which this packs what it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raymoe.requests import FinishReason, GenerationRequest, SamplingParams

KEY = "raymoe"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What travels in vLLM's `extra_args`. `sampling` None: the likeliest token, nothing more.

    prompt_tokens: where the output begins, which for vLLM may be inside the prompt; ends: ids that
    end the text, not allowed before `min_tokens`; eos_ids: the model's own, with which a grammar
    ends.
    """

    request_id: str
    prompt_tokens: int
    ends: tuple[int, ...]
    eos_ids: tuple[int, ...]
    sampling: SamplingParams | None

    def to_extra(self) -> dict[str, Any]:
        """Plain values, as msgpack carries them."""
        if self.sampling is None:
            return {KEY: {"id": self.request_id}}
        return {
            KEY: {
                "id": self.request_id,
                "prompt_tokens": self.prompt_tokens,
                "ends": list(self.ends),
                "eos_ids": list(self.eos_ids),
                "sampling": asdict(self.sampling),
            }
        }

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any] | None) -> Asked | None:
        """None for a request that is no router's."""
        values = (extra or {}).get(KEY)
        if values is None:
            return None
        sampling = values.get("sampling")
        if sampling is not None:
            sampling = SamplingParams(
                **{
                    **sampling,
                    "logit_bias": tuple((int(i), float(b)) for i, b in sampling["logit_bias"]),
                    "stop_token_ids": tuple(sampling["stop_token_ids"]),
                }
            )
        return cls(
            request_id=values["id"],
            prompt_tokens=values.get("prompt_tokens", 0),
            ends=tuple(values.get("ends", ())),
            eos_ids=tuple(values.get("eos_ids", ())),
            sampling=sampling,
        )


def ends_of(sampling: SamplingParams, eos_ids: Collection[int]) -> tuple[int, ...]:
    """Ids that end the text."""
    own = set(sampling.stop_token_ids)
    return tuple(sorted(own if sampling.ignore_eos else own | set(eos_ids)))


def asked(request: GenerationRequest, eos_ids: Collection[int]) -> Asked:
    """What our sampler has to know of a request."""
    sampling = request.sampling
    likeliest = (
        sampling.temperature == 0
        and not sampling.logit_bias
        and sampling.min_tokens == 0
        and sampling.repetition_penalty == 1.0
        and sampling.frequency_penalty == sampling.presence_penalty == 0
        and sampling.grammar is None
    )
    return Asked(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_ids),
        ends=ends_of(sampling, eos_ids),
        eos_ids=tuple(sorted(eos_ids)),
        sampling=None if likeliest else sampling,
    )


def vllm_params(request: GenerationRequest, eos_ids: Collection[int]) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams for what is left to generate."""
    sampling = request.sampling
    return {
        "temperature": 0.0,
        # at least one: with max_tokens 0 only the prompt was of interest, the token is left out
        "max_tokens": max(sampling.max_tokens - len(request.output_ids), 1),
        "ignore_eos": True,  # the ids that end it are all in stop_token_ids
        "stop_token_ids": list(ends_of(sampling, eos_ids)),
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "detokenize": False,
        "extra_args": asked(request, eos_ids).to_extra(),
    }


def ended_already(
    request: GenerationRequest, eos_ids: Collection[int], max_context: int
) -> FinishReason | None:
    """Whether a request that was continued from elsewhere had had its last token."""
    output = request.output_ids
    if not output:
        return None
    if (
        output[-1] in ends_of(request.sampling, eos_ids)
        and len(output) > request.sampling.min_tokens
    ):
        return "stop"
    if len(output) >= request.sampling.max_tokens:
        return "length"
    return "length" if len(request.prompt_ids) + len(output) >= max_context else None
