"""One output: its token events become text, log probabilities and the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raymoe.gateway.stops import StopStrings
from raymoe.gateway.tokenizer import GatewayTokenizer
from raymoe.requests import GenerationRequest, TokenEvent, TokenLogprobs


class TokenEntry(NamedTuple):
    """One token with its log probabilities; `offset` is where its text begins, in characters."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None  # None for a prompt's first token


class Delta(NamedTuple):
    """What one event adds to an output."""

    text: str
    entries: Sequence[TokenEntry]
    finish: str | None  # "stop" or "length"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How a request wants its text; the same for all its choices."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    eos_ids: tuple[int, ...] = ()


class Choice:
    """State of one output. `take` each event, in order."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        tokenizer: GatewayTokenizer,
        options: TextOptions,
    ) -> None:
        self.index = index
        self.request = request
        self.completion_tokens = 0
        self.cached_prompt_tokens = 0
        self.finish: str | None = None
        self.cumulative_logprob = 0.0
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._detokenizer = tokenizer.detokenizer(request.prompt_ids, options.skip_special_tokens)
        self._stops = StopStrings(options.stops, options.include_stop)
        self._min_tokens = request.sampling.min_tokens
        self._wants_logprobs = request.sampling.logprobs is not None
        self._characters = 0
        self._held_entries: list[TokenEntry] = []
        ending = set(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            ending.update(options.eos_ids)
        self._silent_ends = frozenset() if options.include_stop else frozenset(ending)

    def take(self, event: TokenEvent) -> Delta:
        """The text that may go out, with the entries of all tokens since the last text.

        A finish that the event does not have is a stop string's: the caller cancels the rest.
        """
        text = ""
        last = len(event.token_ids) - 1
        for at, token_id in enumerate(event.token_ids):
            self.completion_tokens += 1
            if self._wants_logprobs:
                self._note(token_id, event.logprobs[at])
            if at == last and event.finish == "stop" and token_id in self._silent_ends:
                break  # what ended the output is not part of its text
            text += self._push(self._detokenizer.push(token_id))
            if self.finish is not None:
                break
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
            self.cached_prompt_tokens = event.cached_prompt_tokens
        elif event.cached_prompt_tokens:
            self.cached_prompt_tokens = event.cached_prompt_tokens
        if event.finish is not None and self.finish is None:
            text += self._push(self._detokenizer.flush())
            if self.finish is None:
                text += self._stops.flush()
            self.finish = self.finish or event.finish
        entries: Sequence[TokenEntry] = ()
        if self._held_entries and (text or self.finish is not None):
            entries, self._held_entries = self._held_entries, []
        return Delta(text, entries, self.finish)

    def _push(self, text: str) -> str:
        if not text:
            return ""
        self._characters += len(text)
        if self.completion_tokens <= self._min_tokens:
            return text  # no stop string counts yet
        passed = self._stops.push(text)
        if self._stops.matched is not None:
            self.finish = "stop"
        return passed

    def _note(self, token_id: int, logprobs: TokenLogprobs) -> None:
        self.cumulative_logprob += logprobs.token
        self._held_entries.append(TokenEntry(token_id, self._characters, logprobs))


def prompt_entries(
    prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: GatewayTokenizer
) -> list[TokenEntry]:
    """The prompt's tokens as entries; the first has no log probabilities.

    `logprobs` has one for each prompt token but the first.
    """
    entries = []
    offset = 0
    detokenizer = tokenizer.detokenizer()
    for at, token_id in enumerate(prompt_ids):
        entries.append(TokenEntry(token_id, offset, logprobs[at - 1] if at else None))
        offset += len(detokenizer.push(token_id))
    return entries
