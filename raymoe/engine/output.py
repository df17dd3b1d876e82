"""From a step's logits to tokens, log probabilities and ends of requests."""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from torch import Tensor

from raymoe.engine.batch import Chunks
from raymoe.engine.sampling import Draw, likeliest, logprobs, pick
from raymoe.engine.sequence import Sequence
from raymoe.requests import FinishReason, TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Which packed rows of one sequence need logits.

    prompt: rows whose logits give the log probabilities of the next prompt tokens, which start at
    token `prompt_from`; sample: the row that the next token is drawn from, None when the prompt is
    not through yet or no token is wanted.
    """

    sequence: Sequence
    prompt: range
    prompt_from: int
    sample: int | None


def readings(chunks: Chunks) -> list[Reading]:
    """What to read of a step, in row order."""
    found, row = [], 0
    for one, tokens in chunks:
        done = one.computed + tokens
        wanted = done == len(one.tokens) and one.sampling.max_tokens > 0
        prompt, prompt_from = range(0), 0
        if one.sampling.prompt_logprobs is not None:
            # Token t is predicted at position t - 1; a preempted prompt is not read twice.
            prompt_from = max(one.computed, len(one.prompt_logprobs)) + 1
            last = min(done, one.prompt_tokens - 1)
            shift = row - one.computed
            prompt = range(prompt_from - 1 + shift, max(prompt_from - 1, last) + shift)
        found.append(
            Reading(
                sequence=one,
                prompt=prompt,
                prompt_from=prompt_from,
                sample=row + tokens - 1 if wanted else None,
            )
        )
        row += tokens
    return found


def rows_of(found: Rows[Reading]) -> list[int]:
    """The packed rows to compute logits of, in the order `take_*` expects them."""
    rows: list[int] = []
    for one in found:
        rows += one.prompt
        if one.sample is not None:
            rows.append(one.sample)
    return rows


def readings_without(found: Rows[Reading], lost: Container[int]) -> tuple[list[Reading], list[int]]:
    """The readings but those numbered in `lost`, and which rows of the logits are theirs."""
    kept: list[Reading] = []
    rows: list[int] = []
    row = 0
    for at, one in enumerate(found):
        count = len(one.prompt) + (one.sample is not None)
        if at not in lost:
            kept.append(one)
            rows += range(row, row + count)
        row += count
    return kept, rows


def take_prompt_logprobs(logits: Tensor, found: Rows[Reading]) -> None:
    """Add the prompt log probabilities of a step's logits to their sequences."""
    row = 0
    for one in found:
        count = len(one.prompt)
        if count:
            tokens = one.sequence.tokens[one.prompt_from : one.prompt_from + count]
            top = one.sequence.sampling.prompt_logprobs or 0
            one.sequence.prompt_logprobs += logprobs(
                logits[row : row + count], tokens, [top] * count
            )
        row += count + (one.sample is not None)


def take_tokens(
    logits: Tensor, found: Rows[Reading], eos_ids: frozenset[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Next tokens of the readings that sample, and their log probabilities where asked for."""
    drawing = [one for one in found if one.sample is not None]
    if len(drawing) < len(logits):  # some rows are prompt rows
        keep, row = [], 0
        for one in found:
            row += len(one.prompt)
            if one.sample is not None:
                keep.append(row)
                row += 1
        logits = logits[keep]
    if all(one.sequence.plain_greedy for one in drawing):
        tokens = likeliest(logits)
        return tokens, [None] * len(tokens)
    sequences = [one.sequence for one in drawing]
    asked = [row for row, one in enumerate(sequences) if one.sampling.logprobs is not None]
    raw = logits[asked] if asked else logits  # indexing copies: shaping leaves it as it was
    tokens = pick(
        logits,
        [
            Draw(
                sampling=one.sampling,
                tokens=one.tokens,
                prompt_tokens=one.prompt_tokens,
                banned=banned(one, eos_ids),
                allowed=None if one.grammar is None else one.grammar.allowed(),
            )
            for one in sequences
        ],
    )
    found_logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
    if asked:
        counts = [sequences[row].sampling.logprobs or 0 for row in asked]
        made = logprobs(raw, [tokens[row] for row in asked], counts)
        for row, each in zip(asked, made, strict=True):
            found_logprobs[row] = each
    return tokens, found_logprobs


def stop_ids(sequence: Sequence, eos_ids: frozenset[int]) -> frozenset[int]:
    """Token ids that end this request."""
    own = frozenset(sequence.sampling.stop_token_ids)
    return own if sequence.sampling.ignore_eos else own | eos_ids


def banned(sequence: Sequence, eos_ids: frozenset[int]) -> tuple[int, ...]:
    """Ids not allowed yet: those that would end the request before `min_tokens`."""
    if sequence.output_tokens >= sequence.sampling.min_tokens:
        return ()
    return tuple(sorted(stop_ids(sequence, eos_ids)))


def end_of(sequence: Sequence, eos_ids: frozenset[int], max_context: int) -> FinishReason | None:
    """Whether the last token was the request's last; a stop token is part of the output."""
    if sequence.output_tokens and sequence.tokens[-1] in stop_ids(sequence, eos_ids):
        return "stop"
    if sequence.grammar is not None and sequence.grammar.ended:
        return "stop"
    if sequence.output_tokens >= sequence.sampling.max_tokens:
        return "length"
    return "length" if len(sequence.tokens) >= max_context else None
