"""Softmax attention on plain tensors: torch's fused operators, or plain operations.

Letters: b, h batch dimensions, t queries, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Softmax attention, [b, h, t, d] each -> [b, h, t, d].

    mask: additive. sinks: logits that broadcast to [b, h, t], take part in the softmax and add
    nothing. cap: scores are squashed to within it (tanh).
    """
    if query.device.type != "cpu" and cap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask.to(query.dtype),
            is_causal=causal,
            scale=scale,
        )
    if query.device.type != "cpu" or cap is not None or value.shape[-1] != query.shape[-1]:
        return attend_plain(
            query, key, value, scale=scale, causal=causal, mask=mask, sinks=sinks, cap=cap
        )
    # The operator behind scaled_dot_product_attention, which also returns the log of each
    # softmax's sum: a sink then costs one product (6 times less than explicit matmuls).
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    attended: Tensor = out
    if sinks is not None:
        attended = attended * torch.sigmoid(total - sinks).unsqueeze(-1).to(out.dtype)
    return attended


def attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """The same in plain operations: soft caps, other devices, values wider than keys."""
    scores = (query @ key.transpose(-1, -2)).float() * scale  # [b, h, t, keys]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float().expand_as(total))
    return torch.exp(scores - total.unsqueeze(-1)).to(value.dtype) @ value
