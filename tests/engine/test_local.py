from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.engine.local import LocalExperts
from raymoe.errors import ExpertsUnavailable
from raymoe.experts.shard import ExpertShard
from tests.zoo import tiny_checkpoint


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> ExpertShard:
    path: Path = tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("local"))
    spec = read_spec(path)
    made = ExpertShard(spec, budget_bytes=1 << 30)
    for expert in range(spec.experts_of_layer[1]):
        made.add(1, expert, load_expert(spec, 1, expert))
    return made


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_weighted_sums_in_token_order(shard: ExpertShard, tokens: int) -> None:
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 64)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3)
    experts = LocalExperts(shard)
    found = experts.combine(experts.dispatch(1, hidden, ids, weights))
    truth = torch.zeros(tokens, 64)
    for token in range(tokens):
        for choice in range(3):
            record = load_expert(shard.spec, 1, int(ids[token, choice]))
            gate, up = (hidden[token] @ record.tensors["up"].float()).chunk(2)
            row = (torch.nn.functional.silu(gate) * up) @ record.tensors["down"].float()
            truth[token] += weights[token, choice] * row
    assert torch.allclose(found, truth, atol=1e-5)


def test_a_missing_expert_is_named(shard: ExpertShard) -> None:
    with pytest.raises(ExpertsUnavailable, match="layer 0"):
        LocalExperts(shard).dispatch(
            0, torch.zeros(1, 64), torch.tensor([[2, 4]]), torch.ones(1, 2)
        )
