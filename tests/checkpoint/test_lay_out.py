from __future__ import annotations

import torch
from torch import nn

from raymoe.checkpoint.dense import LARGEST_TURNED, lay_out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.inner = nn.Linear(16, 16)
        self.wide = nn.Linear(16, LARGEST_TURNED // 16 + 1, bias=False)
        self.narrow = nn.Linear(16, 16, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(self.embed(ids)))
        return out


@torch.no_grad()
def test_small_weights_are_stored_the_other_way_round_and_mean_the_same() -> None:
    model = Tied()
    ids = torch.arange(50)
    before, rows = model(ids), model.embed.weight.clone()
    lay_out(model)
    assert torch.allclose(model(ids), before, atol=1e-5)
    for module in (model.inner, model.head):
        assert module.weight.stride() == (1, module.weight.shape[0])
    for kept in (model.wide, model.narrow, model.embed):
        assert kept.weight.is_contiguous()
    assert torch.equal(model.embed.weight, rows)
    assert "head.weight" in model.state_dict()
