"""Each option against transformers' own logits processors, or a plain computation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as stock

from raymoe.engine.randomness import uniform
from raymoe.engine.sampling import Draw, allowed, logprobs, pick, sample, shape
from raymoe.requests import SamplingParams

V = 600  # more than the candidates looked at first


def logits(rows: int = 1, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def draw(tokens: list[int] | None = None, prompt: int = 2, banned: Any = (), **fields: Any) -> Draw:
    return Draw(
        sampling=SamplingParams(**{"seed": 1, **fields}),
        tokens=tokens or [5, 6],
        prompt_tokens=prompt,
        banned=banned,
    )


def kept(**fields: Any) -> Tensor:
    scaled = logits(4)
    return allowed(scaled, scaled.softmax(-1), [SamplingParams(seed=0, **fields)] * 4)


@pytest.mark.parametrize("k", [1, 5, 255, 256, 257, 599])
def test_top_k(k: int) -> None:
    truth = stock.TopKLogitsWarper(k)(torch.zeros(1, 1), logits(4)) > -torch.inf
    assert torch.equal(kept(top_k=k), truth)


@pytest.mark.parametrize("k", [0, 600, 10_000])
def test_top_k_off(k: int) -> None:
    assert kept(top_k=k, min_p=1e-30).all()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p(p: float, scale: float) -> None:
    scaled = logits(4, scale=scale)
    found = allowed(scaled, scaled.softmax(-1), [SamplingParams(seed=0, top_p=p)] * 4)
    truth = stock.TopPLogitsWarper(p)(torch.zeros(1, 1), scaled) > -torch.inf
    # Sums of thousands of floats in another order may differ by a token at the edge.
    assert (found ^ truth).sum(-1).max() <= (1 if scale < 1 or p > 0.9999 else 0)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.9, 1.0])
def test_min_p(p: float) -> None:
    truth = stock.MinPLogitsWarper(p)(torch.zeros(1, 1), logits(4)) > -torch.inf
    assert torch.equal(kept(min_p=p), truth)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_typical_p(p: float) -> None:
    truth = stock.TypicalLogitsWarper(p)(torch.zeros(1, 1), logits(4)) > -torch.inf
    assert torch.equal(kept(typical_p=p), truth)


def test_filters_together_in_order() -> None:
    fields = {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.7}
    values = logits(4)
    for warper in (
        stock.TopKLogitsWarper(40),
        stock.TopPLogitsWarper(0.8),
        stock.MinPLogitsWarper(0.05),
        stock.TypicalLogitsWarper(0.7),
    ):
        values = warper(torch.zeros(1, 1), values)
    assert torch.equal(kept(**fields), values > -torch.inf)


def test_rows_do_not_touch_each_other() -> None:
    many = [
        draw(temperature=0.7, top_p=0.6, seed=3),
        draw(temperature=0.0),
        draw(temperature=1.3, seed=4),
        draw(temperature=1.0, top_k=3, seed=5),
        draw(temperature=2.0, top_p=0.999, seed=6, frequency_penalty=1.0),
        draw(temperature=1.0, typical_p=0.5, seed=7),
    ]
    values = logits(len(many))
    together = pick(values.clone(), many)
    alone = [pick(values[row : row + 1].clone(), [each])[0] for row, each in enumerate(many)]
    assert together == alone


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    values = logits(1)
    for position in range(2, 200):
        each = draw(list(range(position)), temperature=1.5, seed=9, choice=2)
        probabilities = (values[0].double() / 1.5).softmax(-1).tolist()
        point, total, truth = uniform(9, 2, position), 0.0, -1
        for token, probability in enumerate(probabilities):
            total += probability
            if total > point:
                truth = token
                break
        assert sample(values, [each]).tolist() == [truth]


def test_draws_follow_the_distribution() -> None:
    values = logits(1, scale=2.0)[:, :8]
    draws = [draw([0] * n, temperature=0.8, seed=n % 50) for n in range(1, 6001)]
    found = Counter(sample(values.expand(6000, -1), draws).tolist())
    for token, probability in enumerate((values[0] / 0.8).softmax(-1).tolist()):
        assert abs(found[token] / 6000 - probability) < 0.025


def test_seed_choice_and_position_all_matter() -> None:
    values = torch.zeros(40, V)
    base = [draw([1] * n, seed=1, choice=0) for n in range(1, 41)]
    other_seed = [draw([1] * n, seed=2, choice=0) for n in range(1, 41)]
    other_choice = [draw([1] * n, seed=1, choice=1) for n in range(1, 41)]
    first = sample(values, base).tolist()
    assert len(set(first)) > 30
    assert first == sample(values, base).tolist()
    assert first != sample(values, other_seed).tolist()
    assert first != sample(values, other_choice).tolist()


def test_greedy_takes_the_likeliest() -> None:
    values = logits(3)
    assert pick(values.clone(), [draw(temperature=0.0)] * 3) == values.argmax(-1).tolist()


def test_logit_bias() -> None:
    values = logits(1)
    assert pick(values.clone(), [draw(temperature=0.0, logit_bias=((77, 100.0),))]) == [77]
    best = int(values.argmax())
    assert pick(values.clone(), [draw(temperature=0.0, logit_bias=((best, -100.0),))]) != [best]


def test_banned_tokens_are_never_drawn() -> None:
    values = torch.full((1, V), -50.0)
    values[0, :3] = 10.0
    for n in range(1, 50):
        assert pick(values.clone(), [draw([4] * n, banned=(0, 1))]) == [2]


def test_repetition_penalty() -> None:
    tokens = [5, 6, 5, 90, 91, 90]
    values = logits(1)
    shaped = values.clone()
    shape(shaped[0], draw(tokens, repetition_penalty=1.7))
    truth = stock.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), values.clone())
    assert torch.allclose(shaped, truth)


def test_presence_and_frequency_penalties_count_output_only() -> None:
    tokens = [5, 6, 5, 90, 91, 90, 5]
    values = logits(1)
    shaped = values.clone()
    shape(shaped[0], draw(tokens, prompt=3, presence_penalty=0.5, frequency_penalty=0.25))
    truth = values.clone()
    for token, count in ((90, 2), (91, 1), (5, 1)):
        truth[0, token] -= 0.5 + 0.25 * count
    assert torch.allclose(shaped, truth)
    assert shaped[0, 6] == values[0, 6]


def test_penalties_without_output_change_nothing() -> None:
    values = logits(1)
    shaped = values.clone()
    shape(shaped[0], draw([5, 6], prompt=2, presence_penalty=2.0, frequency_penalty=2.0))
    assert torch.equal(shaped, values)


def test_logprobs_are_of_the_raw_distribution() -> None:
    values = logits(3)
    truth = torch.log_softmax(values.double(), -1)
    found = logprobs(values, [1, 2, 3], [0, 2, 5])
    for row, (one, token, count) in enumerate(zip(found, (1, 2, 3), (0, 2, 5), strict=True)):
        assert one.token == pytest.approx(float(truth[row, token]), abs=1e-5)
        best = truth[row].topk(count)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-300},
        {"temperature": 1e-45, "top_p": 1e-300, "typical_p": 1e-300, "min_p": 1.0},
        {"temperature": 1e-300, "repetition_penalty": 5e-324, "top_k": 2**63 - 1},
        {"temperature": 2.0, "repetition_penalty": 5e-324},
        {"temperature": 1e-7, "logit_bias": ((1, 100.0), (2, -100.0))},
    ],
)
def test_extremes_draw_the_likeliest_token(params: dict[str, Any]) -> None:
    """And never an id that is no token, which would end the engine at the next step."""
    values = logits(seed=5)
    hot = draw([7, 8], banned=(9,), **params)
    wanted = values.clone()
    shape(wanted[0], hot)
    assert not wanted.isnan().any()
    assert pick(values, [hot]) == wanted.argmax(-1).tolist()


def test_not_a_number_draws_some_token() -> None:
    for params in ({}, {"top_p": 0.5}, {"typical_p": 0.5}):
        assert 0 <= pick(torch.full((1, V), torch.nan), [draw(**params)])[0] < V
