from __future__ import annotations

from typing import Any

import pytest
import torch

from raymoe.engine.softmax import attend, attend_plain


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_operator_equals_plain_operations(
    causal: bool, sinks: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8) for _ in range(3))
    mask = torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -torch.inf) if masked else None
    sink = torch.randn(1, 3, 1) if sinks else None
    options: dict[str, Any] = {"causal": causal and not masked, "mask": mask, "sinks": sink}
    fused = attend(query, key, value, scale=0.3, **options)
    plain = attend_plain(query, key, value, scale=0.3, **options)
    assert torch.allclose(fused, plain, atol=1e-6)


def test_plain_operations_equal_torch() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8) for _ in range(3))
    found = attend_plain(query, key, value, scale=0.3, causal=True)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3
    )
    assert torch.allclose(found, truth, atol=1e-6)


def test_a_sink_is_one_more_key_that_adds_nothing() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    sinks = torch.randn(1, 2, 1)
    found = attend(query, key, value, scale=0.3, causal=False, sinks=sinks)
    scores = query @ key.transpose(-1, -2) * 0.3
    with_sink = torch.cat([scores, sinks.unsqueeze(-1).expand(1, 2, 5, 1)], -1)
    assert torch.allclose(found, with_sink.softmax(-1)[..., :-1] @ value, atol=1e-6)


def test_soft_cap() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 5, 8) for _ in range(3))
    found = attend(query, key, value, scale=1.0, causal=False, cap=2.0)
    truth = (torch.tanh(query @ key.transpose(-1, -2) / 2.0) * 2.0).softmax(-1) @ value
    assert torch.allclose(found, truth, atol=1e-6)
