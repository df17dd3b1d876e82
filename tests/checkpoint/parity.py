"""One family against stock transformers: its experts read singly, its dense part, its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.families import experts_modules, load_config, model_class
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.checkpoint.spec import ModelSpec
from raymoe.experts.shard import ExpertShard

LOGITS_WITHIN = 1e-5
NEAR_TIE = 1e-4
"""Where the reference's two best logits are nearer than this, either token is right."""


class TwoShards:
    """The experts seam over two shards, even and odd experts; partial sums or rows."""

    def __init__(self, spec: ModelSpec, *, rows: bool = False) -> None:
        self.rows = rows
        self.shards = tuple(ExpertShard(spec, budget_bytes=1 << 30) for _ in range(2))
        for layer, experts in enumerate(spec.experts_of_layer):
            for expert in range(experts):
                self.shards[expert % 2].add(layer, expert, load_expert(spec, layer, expert))

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Any:
        top_k, flat = expert_ids.shape[1], expert_ids.reshape(-1)
        weights = gate_weights.reshape(-1).float()
        order = torch.argsort(flat, stable=True)
        row_of_pair = torch.zeros(flat.shape[0], hidden.shape[1])
        total = torch.zeros(hidden.shape)
        for parity, shard in enumerate(self.shards):
            mine = order[flat[order] % 2 == parity]
            ids, counts = torch.unique_consecutive(flat[mine], return_counts=True)
            out = torch.full((len(mine) if self.rows else len(hidden), hidden.shape[1]), torch.nan)
            missing = shard.compute(
                layer, hidden, ids.int(), counts.int(), (mine // top_k).int(),
                None if self.rows else weights[mine], out,
            )  # fmt: skip
            assert missing == []
            if self.rows:
                row_of_pair[mine] = out
            else:
                total += out
        if self.rows:
            total = (row_of_pair * weights.unsqueeze(1)).view(len(hidden), top_k, -1).sum(1)
        return total.to(hidden.dtype)

    def combine(self, pending: Any) -> Tensor:
        result: Tensor = pending
        return result


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What the comparison found."""

    spec: ModelSpec
    tokens_equal: bool  # up to the first near-tie
    near_ties: int
    logits_differ_by: float  # the largest, of the whole prompt and up to the first near-tie
    dense_parameters: int
    total_parameters: int
    experts_equal: bool  # bit for bit, each read alone, against the full load


def compare(path: Path, tokens: int = 8, prompts: int = 2) -> Parity:
    """Generate greedily with stock transformers and with two shards; compare everything."""
    spec = read_spec(path)
    assert ModelSpec.from_json(spec.to_json()) == spec
    stock = stock_model(path)
    equal = experts_equal(spec, stock)
    ids = torch.randint(3, 500, (prompts, 12), generator=torch.Generator().manual_seed(3))
    truth_of_prompt = logits_of(stock, ids)
    truth, truth_logits = greedy(stock, ids, tokens)
    total = sum(parameter.numel() for parameter in stock.parameters())
    del stock
    dense = load_dense(spec, TwoShards(spec))
    of_prompt = float((logits_of(dense, ids) - truth_of_prompt).abs().max())
    found, logits = greedy(dense, ids, tokens)
    same, ties, differ = _agree(found, logits, truth, truth_logits)
    return Parity(
        spec=spec,
        tokens_equal=same,
        near_ties=ties,
        logits_differ_by=max(differ, of_prompt),
        dense_parameters=sum(parameter.numel() for parameter in dense.parameters()),
        total_parameters=total,
        experts_equal=equal,
    )


def stock_model(path: Path) -> nn.Module:
    config = load_config(path)
    kind: Any = model_class(config)
    model: nn.Module = kind.from_pretrained(path, config=config, dtype=torch.float32).eval()
    return model


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """One forward of whole prompts [B, S] -> [B, S, V]: rare gate choices show at some position."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def greedy(model: Any, ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """-> token ids [B, tokens], logits [B, tokens, V]."""
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    return made.sequences[:, ids.shape[1] :], torch.stack(made.logits, dim=1)


def _agree(
    found: Tensor, logits: Tensor, truth: Tensor, truth_logits: Tensor
) -> tuple[bool, int, float]:
    """A row counts up to its first different token, which must be a near-tie of the reference."""
    same, ties, differ = True, 0, 0.0
    for row in range(len(truth)):
        different = (found[row] != truth[row]).nonzero()
        compared = truth.shape[1]
        if len(different):
            compared = int(different[0]) + 1
            best = truth_logits[row, compared - 1].topk(2).values
            if float(best[0] - best[1]) < NEAR_TIE:
                ties += 1
            else:
                same = False
        gap = (logits[row, :compared] - truth_logits[row, :compared]).abs().max()
        differ = max(differ, float(gap))
    return same, ties, differ


def experts_equal(spec: ModelSpec, stock: nn.Module) -> bool:
    """First, second and last expert of every layer, read alone, against the full load."""
    modules = experts_modules(stock)
    assert tuple(modules) == spec.layer_names
    for layer, module in enumerate(modules.values()):
        for expert in {0, 1, spec.experts_of_layer[layer] - 1}:
            tensors = load_expert(spec, layer, expert).tensors
            for name, tensor in resident(module, expert).items():
                if not torch.equal(tensors[name], tensor):
                    return False
    return True


def resident(module: Any, expert: int) -> dict[str, Tensor]:
    """One expert of transformers' fused parameters in our resident layout, worked out anew."""
    if type(module).__name__ == "DbrxExperts":
        shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
        w1, v1, w2 = (getattr(module.mlp, n).view(shape)[expert] for n in ("w1", "v1", "w2"))
        return {"up": torch.cat([w1.T, v1.T], dim=1), "down": w2}
    llama4 = type(module).__name__ == "Llama4TextExperts"
    in_out = getattr(module, "is_transposed", llama4)
    found = {}
    for name, parameter in module.named_parameters():
        tensor = parameter[expert]
        if tensor.dim() == 2 and not in_out:
            tensor = tensor.T
        if "up_proj" in name and not getattr(module, "is_concatenated", True):
            tensor = torch.cat([tensor[..., 0::2], tensor[..., 1::2]], dim=-1)
        ours = "down" if name.startswith("down") else "up"
        found[ours + ("_bias" if name.endswith("_bias") else "")] = tensor.detach()
    return found
