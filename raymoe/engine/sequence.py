"""One request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raymoe.errors import ExpertsUnavailable
from raymoe.grammar.state import GrammarState
from raymoe.requests import GenerationRequest, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """Why a request is set aside, and when (monotonic seconds) to try it again at the earliest."""

    error: ExpertsUnavailable
    retry_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """The state of one request between steps.

    `tokens` is the prompt followed by all output; the first `computed` of them have their keys
    and values in `blocks` (or in `state`, for models without pages). Tokens past `computed` are
    pending: one pending token after others is a decode row, anything else is prefill.
    """

    request: GenerationRequest
    arrival: int
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    state: Any = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs_sent: bool = False
    keys: list[bytes] = field(default_factory=list)  # names of its full blocks (`PrefixChain`)
    published: int = 0  # leading blocks that can be found by their names, or need not be
    cached_tokens: int = 0  # prompt tokens that others had computed when it came
    announced: bool = False  # its first event has been made
    began_s: float = 0.0  # monotonic s when it first left the queue
    preempted: bool = False
    away: Away | None = None  # its experts are: it takes no part in steps
    tries: int = 0  # that found experts away since a success
    stalled_since: float | None = None  # monotonic s of the first failed try since a success
    grammar: GrammarState | None = None  # has taken every output token
    plain_greedy: bool = False  # nothing but the likeliest token is wanted of each step

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet; at least 1 while it runs."""
        return len(self.tokens) - self.computed

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: a lower priority number, then the earlier arrival."""
        return (self.request.priority, self.arrival)


def start_sequence(request: GenerationRequest, arrival: int) -> Sequence:
    """A sequence with nothing computed; tokens made elsewhere count as output."""
    sampling = request.sampling
    return Sequence(
        request=request,
        arrival=arrival,
        tokens=[*request.prompt_ids, *request.output_ids],
        plain_greedy=(
            sampling.temperature == 0
            and not sampling.logit_bias
            and sampling.min_tokens == 0
            and sampling.repetition_penalty == 1.0
            and sampling.frequency_penalty == sampling.presence_penalty == 0
            and sampling.logprobs is None
            and sampling.grammar is None
        ),
    )
