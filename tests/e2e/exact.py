"""DESIGN.md's exactness rule, over HTTP: a stream that differs has to show the near tie it took.

Batches of other sizes round otherwise, so a token whose rival is as good as equal may turn. Nothing
else may differ. A stream that does is therefore asked for once more, on a deployment that is left
alone, from its first different token on: there the two tokens must be a near tie, and from there
the quiet deployment, given the token that was taken, must say what the stream said, to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from raymoe.engine.randomness import uniform
from tests.checkpoint.parity import NEAR_TIE


class Step(NamedTuple):
    """One token of a quiet deployment, and the log probabilities of the likeliest, by token."""

    token: int
    top: Mapping[int, float]


class Drawing(NamedTuple):
    """How sampled tokens are drawn: among the `len(step.top)` likeliest, which the request has to
    ask for as `top_k`."""

    temperature: float
    seed: int


Again = Callable[[tuple[int, ...], int], Sequence[Step]]
"""Of prompt ids and a count: so many tokens that follow."""


def near_ties(
    prompt: Sequence[int], said: Sequence[int], again: Again, drawing: Drawing | None = None
) -> int:
    """How many near ties explain the stream `said`. Raises AssertionError when they do not."""
    at = ties = 0
    while at < len(said):
        told = again((*prompt, *said[:at]), len(said) - at)
        assert len(told) == len(said) - at, "the quiet stream is shorter"
        rest = said[at:]
        same = next((n for n, step in enumerate(told) if step.token != rest[n]), len(rest))
        at += same
        if at == len(said):
            break
        step = told[same]
        point = 0.0
        if drawing is not None:
            point = uniform(drawing.seed, 0, len(prompt) + at)
        for token in (step.token, said[at]):
            near = token in step.top and (
                _is_best(step, token)
                if drawing is None
                else _is_drawn(step, token, drawing.temperature, point)
            )
            assert near, (
                f"token {at} is {said[at]} and should be {step.token}: no near tie, the likeliest "
                f"are {dict(step.top)}"
            )
        at, ties = at + 1, ties + 1
    return ties


def _is_best(step: Step, token: int) -> bool:
    return max(step.top.values()) - step.top[token] < NEAR_TIE


def _is_drawn(step: Step, token: int, temperature: float, point: float) -> bool:
    """Whether the inverse of the cumulative distribution, in token order, has it at `point`."""
    best = max(step.top.values())
    weights = {t: math.exp((p - best) / temperature) for t, p in step.top.items()}
    total = sum(weights.values())
    below = sum(weight for t, weight in weights.items() if t < token) / total
    return below - NEAR_TIE <= point <= below + weights[token] / total + NEAR_TIE
