"""raymoe's sampler inside vLLM: a logits processor that leaves one token possible.

The same function draws for the embedded engine (`raymoe/engine/sampling.py`). Every draw depends on
the seed and the token's position only, and penalties know where the output begins, so a request
goes on elsewhere, in either engine, with the tokens it would have had.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

from raymoe.engine.sampling import Draw, pick
from raymoe.grammar.state import GrammarStart, GrammarState
from raymoe.vllm_plugin.asking import Asked
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.settings import read_settings

NAME = f"{__name__}:RaymoeSampling"
"""As vLLM's `logits_processors` wants it."""


@dataclass(slots=True, kw_only=True)
class _Row:
    """One request of the batch. vLLM goes on appending to `output_ids`."""

    asked: Asked
    prompt_ids: list[int]  # vLLM's: with the output so far of a continued request
    output_ids: list[int]
    grammar: GrammarState | None = None
    taken: int = field(default=0)  # output tokens that the grammar has seen

    def draw(self) -> Draw:
        """How the next token is drawn."""
        asked, sampling = self.asked, self.asked.sampling
        assert sampling is not None
        tokens = [*self.prompt_ids, *self.output_ids]
        early = len(tokens) - asked.prompt_tokens < sampling.min_tokens
        if self.grammar is not None:
            self.grammar.take(self.output_ids[self.taken :])
            self.taken = len(self.output_ids)
        return Draw(
            sampling=sampling,
            tokens=tokens,
            prompt_tokens=asked.prompt_tokens,
            banned=asked.ends if early else (),
            allowed=None if self.grammar is None else self.grammar.allowed(),
        )


class RaymoeSampling(LogitsProcessor):  # type: ignore[misc]
    """Made by vLLM in each of its workers. Requests that are no router's are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        settings = read_settings(vllm_config.additional_config)
        self._board = None if settings.board is None else Board(settings.board)
        self._model = vllm_config.model_config
        self._grammars: GrammarStart | None = None  # made for the first request that has one
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Called before every forward; what has joined, left and moved."""
        process_dict_updates(self._rows, batch_update, self._row)

    def apply(self, logits: Tensor) -> Tensor:
        """logits [R, V] of the batch's rows; changed in place."""
        if self._board is not None and self._board.pending:
            self._board.name_requests(row.asked.request_id for row in self._rows.values())
            return logits
        drawn = [at for at, row in self._rows.items() if row.asked.sampling is not None]
        if not drawn:
            return logits
        tokens = pick(logits[drawn], [self._rows[at].draw() for at in drawn])
        logits[drawn] = float("-inf")
        logits[drawn, tokens] = 0.0
        return logits

    def _row(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Row | None:
        asked = Asked.from_extra(params.extra_args)
        if asked is None:
            return None
        row = _Row(asked=asked, prompt_ids=prompt_ids or [], output_ids=output_ids)
        if asked.sampling is not None and asked.sampling.grammar is not None:
            if self._grammars is None:
                self._grammars = grammars_of(
                    self._model.model, self._model.get_vocab_size(), asked.eos_ids
                )
            row.grammar = self._grammars(
                asked.sampling.grammar, row.prompt_ids[asked.prompt_tokens :]
            )
        return row


def grammars_of(model: str, vocab: int, eos_ids: Collection[int]) -> GrammarStart:
    """How outputs of a checkpoint's grammars begin. Raises CheckpointError."""
    from raymoe.gateway.tokenizer import GatewayTokenizer  # transformers: only where needed

    return GatewayTokenizer.load(model).grammar_start(vocab, eos_ids)
