"""A bf16 experts forward for training on a CPU, registered as ``padded_bf16``.

The CPU's bf16 matrix kernels are compiled per shape. Expert batches differ in length at
every step, so each group is padded to a multiple of ``BLOCK`` rows: a few dozen shapes
instead of thousands. Master weights and the sum over experts stay in fp32.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BLOCK = 64


def padded_slots(expert_of_pair: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Place pairs in padded, expert-sorted rows.

    expert_of_pair: [P] int64. Returns ``slot_of_pair`` [P] int64 and the end row of each
    expert's padded group [E] int32 (the last entry is the number of rows).
    """
    order = expert_of_pair.argsort(stable=True)  # [P]
    counts = torch.bincount(expert_of_pair, minlength=experts)  # [E]
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    slot_of_pair = torch.empty_like(order)
    slot_of_pair[order] = torch.arange(order.numel()) + shift[expert_of_pair[order]]
    return slot_of_pair, ends.to(torch.int32)


def padded_bf16_experts(
    self: torch.nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """hidden [T, D], chosen [T, K] int64, weights [T, K] -> [T, D] fp32, with autograd."""
    tokens, top_k = chosen.shape
    slot_of_pair, ends = padded_slots(chosen.reshape(-1), self.num_experts)
    rows = int(ends[-1])
    token_of_pair = torch.arange(tokens * top_k) // top_k
    # A padding row repeats token 0 with weight 0, so it adds nothing and gets no gradient.
    token_of_row = torch.zeros(rows, dtype=torch.long).index_copy_(0, slot_of_pair, token_of_pair)
    weight_of_row = torch.zeros(rows).index_copy(0, slot_of_pair, weights.reshape(-1).float())
    with torch.autocast("cpu", enabled=False):
        x = hidden.bfloat16().index_select(0, token_of_row)  # [R, D]
        gate_up = F.grouped_mm(x, self.gate_up_proj.bfloat16().transpose(1, 2), offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)  # [R, F] each
        inner = F.silu(gate) * up * weight_of_row.bfloat16()[:, None]
        y = F.grouped_mm(inner, self.down_proj.bfloat16().transpose(1, 2), offs=ends)  # [R, D]
        y_of_pair = y.index_select(0, slot_of_pair).view(tokens, top_k, -1)
        return y_of_pair.sum(1, dtype=torch.float32)  # [T, D]


def causal_attention_fp32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in fp32 (the bf16 CPU backward is twice as slow).

    query [B, H, S, C], key and value [B, H_kv, S, C] -> [B, S, H, C]. No padding mask:
    every training row is full.
    """
    repeat = query.shape[1] // key.shape[1]
    with torch.autocast("cpu", enabled=False):
        key, value = (t.float().repeat_interleave(repeat, dim=1) for t in (key, value))
        out = F.scaled_dot_product_attention(
            query.float(), key, value, is_causal=True, scale=scaling
        )
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make both functions known to transformers under the names used by ``train.py``."""
    ALL_EXPERTS_FUNCTIONS.register("padded_bf16", padded_bf16_experts)
    AttentionInterface.register("causal_fp32", causal_attention_fp32)
