"""Following a grammar token by token, on the side where tokens are drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from raymoe.errors import RequestError

_BITS = torch.arange(8, dtype=torch.uint8)


class GrammarState:
    """Where one output stands in its grammar. A function of the grammar and the tokens taken:
    a router that goes on with a request rebuilds it from the output so far."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._failed: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing can follow any more (but the end of the text)."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why it can no longer be followed: a token that it does not allow, or its own limits."""
        if self._failed is not None or not self._matcher.is_error():
            return self._failed
        lines = str(self._matcher.get_error()).strip().splitlines()
        return lines[0] if lines else "the grammar cannot be followed"

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool [V].

        All of them once the library has failed: `error` then says so after the next `take`, and
        one client's grammar ends one request, not the router's engine.
        """
        try:
            mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        except Exception as error:  # of the library: any kind
            self._failed = f"the grammar's library failed: {error!r}"
            return torch.ones(self._vocab, dtype=torch.bool)
        bits = (mask[:, None] >> _BITS) & 1  # [V / 8 rounded up, 8], lowest bit first
        return bits.view(-1)[: self._vocab].bool()

    def take(self, tokens: Sequence[int]) -> None:
        """The output's next tokens; look at `error` afterwards."""
        if self._failed is None:
            self._matcher.consume_tokens(list(tokens))


GrammarStart = Callable[[str, Sequence[int]], GrammarState]
"""(grammar, output so far) -> where that output stands. Raises RequestError."""


def grammar_start(tokenizer: Any, vocab: int, eos_ids: Iterable[int]) -> GrammarStart:
    """For one model: `tokenizer` is a `tokenizers.Tokenizer`, `vocab` the width of the logits.

    A vocabulary of 150,000 takes about 1 s, and 125 MiB from then on; a token 0.25 ms.
    """
    from llguidance import LLMatcher, LLTokenizer

    ends = sorted(eos_ids) or None
    tokens = LLTokenizer(tokenizer.to_str(), n_vocab=vocab, eos_token=ends)

    def start(grammar: str, output_ids: Sequence[int] = ()) -> GrammarState:
        state = GrammarState(LLMatcher(tokens, grammar, log_level=0), vocab)
        if state.error is None and output_ids:
            state.take(output_ids)
        if state.error is None and not state.ended and not bool(state.allowed().any()):
            raise RequestError("nothing satisfies the output's grammar", "response_format")
        if state.error is not None:
            raise RequestError(
                f"the output's grammar cannot be followed: {state.error}", "response_format"
            )
        return state

    return start


class LateGrammars:
    """A GrammarStart that is made in the background; whoever needs it earlier waits for it.

    `make` runs once, in a thread of its own. What it raises is raised to everyone who asks, as a
    RequestError: a router whose tokenizer cannot be used still serves everything else.
    """

    def __init__(self, make: Callable[[], GrammarStart]) -> None:
        self._made: Future[GrammarStart] = Future()
        threading.Thread(
            target=self._run, args=(make,), name="raymoe-grammars", daemon=True
        ).start()

    def __call__(self, grammar: str, output_ids: Sequence[int] = ()) -> GrammarState:
        try:
            start = self._made.result()
        except Exception as error:
            raise RequestError(
                f"this model's tokenizer follows no grammars: {error}", "response_format"
            ) from error
        return start(grammar, output_ids)

    def _run(self, make: Callable[[], GrammarStart]) -> None:
        try:
            self._made.set_result(make())
        except Exception as error:  # of the tokenizer's library: any kind
            self._made.set_exception(error)
