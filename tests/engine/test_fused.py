"""Small operations in C give what the family's own give, or are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymoe.engine.fused import FusedRotary, QuickConfig, fuse
from raymoe.native import Native, native
from tests.engine.support import stock_model


@pytest.fixture
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("no C compiler here")
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_text"])
def test_a_fused_model_gives_the_same_and_can_be_taken_apart(family: str, library: Native) -> None:
    model: Any = stock_model(family)
    ids = torch.randint(3, 500, (1, 40))
    attention = [each for each in model.modules() if hasattr(each, "layer_idx")]
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits
        undo = fuse(model, attention, library)
        changed = [each for each in model.modules() if "forward" in vars(each)]
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, own, atol=1e-4)
        undo()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, own)
    assert changed
    assert not any("forward" in vars(each) for each in changed)
    assert not any(isinstance(each.config, QuickConfig) for each in attention)


class OtherRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class GatedRMSNorm(OtherRMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


def test_norms_of_another_kind_stay_as_they_are(library: Native) -> None:
    model = nn.ModuleList([OtherRMSNorm(), GatedRMSNorm()])
    fuse(model, (), library)
    assert not any("forward" in vars(each) for each in model)


def test_a_rotation_that_does_not_fit_is_the_familys(library: Native) -> None:
    asked = []

    def own(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        asked.append(query.shape)
        return query, key

    rotary = FusedRotary(library, own)
    query, key, cos = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
    rotary(query, key, cos, cos)
    assert not asked
    for args in (
        (query, key, cos[..., :4].contiguous(), cos[..., :4].contiguous()),  # part of each head
        (query.double(), key.double(), cos.double(), cos.double()),
        (query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), cos, cos),
    ):
        rotary(*args)
    rotary(query, key, cos, cos, unsqueeze_dim=1)
    assert len(asked) == 4


def test_a_quick_config_can_be_copied() -> None:
    model: Any = stock_model()
    quick = QuickConfig(model.config)
    assert copy.deepcopy(quick).hidden_size == model.config.hidden_size
