"""Shared experts run between dispatch and combine, and change nothing by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.overlap import SHARED, move_beside
from raymoe.checkpoint.reader import read_spec
from tests.checkpoint.parity import TwoShards
from tests.zoo import tiny_checkpoint

IDS = torch.tensor([[5, 9, 200, 17, 3]])


class Noting:
    """Experts that note when they are called."""

    def __init__(self, experts: TwoShards, events: list[str]) -> None:
        self.experts = experts
        self.events = events

    def dispatch(self, *call: Any) -> Any:
        self.events.append("dispatch")
        return self.experts.dispatch(*call)

    def combine(self, pending: Any) -> Tensor:
        self.events.append("combine")
        return self.experts.combine(pending)


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe", "llama4_text", "afmoe"]
)
def test_shared_experts_run_while_the_others_are_away(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path)
    spec = read_spec(path)
    events: list[str] = []
    model: Any = load_dense(spec, Noting(TwoShards(spec), events))
    assert events == []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SHARED:
            # Whatever makes up the shared part: its last product shows when it is computed.
            last = [each for each in module.modules() if isinstance(each, nn.Linear)][-1]
            last.register_forward_hook(lambda *_: events.append("shared"))
    with torch.inference_mode():
        found = model(input_ids=IDS, use_cache=False).logits
        stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        expected = stock(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert events == ["dispatch", "shared", "combine"] * spec.layers


class Odd(nn.Module):
    """Looks at what its shared experts say before it asks the routed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = nn.Linear(8, 8)
        self.beside: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        shared = self.shared_experts(hidden)
        routed = hidden * shared.sum()
        if self.beside is not None:
            self.beside(routed)
        return routed + shared


def test_a_block_of_another_kind_stays_as_it_is() -> None:
    block = Odd()

    def use(beside: Any) -> None:
        block.beside = beside

    assert not move_beside(block, use, 8)
    assert block.beside is None and "forward" not in vars(block.shared_experts)
