"""The quantised formats that are read: MXFP4 (gpt-oss) and block FP8 (DeepSeek-V3, Qwen3 FP8).

Both are undone while an expert is read; what stays resident is what any other checkpoint has. Any
other format is refused by name. Only the torch functions at the end run in groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymoe.errors import CheckpointError

BLOCK = 128
"""Rows and columns that share one FP8 scale."""

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the 4-bit floats (E2M1) by their low three bits; the fourth is the sign."""


def quantization_of(path: Path, raw: dict[str, Any]) -> str | None:
    """ "mxfp4", "fp8" or None, by a config.json. Raises CheckpointError naming any other format."""
    for holder in (raw, raw.get("text_config") or {}):
        found = holder.get("quantization_config") or holder.get("compression_config")
        if not found:
            continue
        method = found.get("quant_method", "unnamed")
        block = found.get("weight_block_size")
        if method == "mxfp4":
            return "mxfp4"
        if method == "fp8" and block in (None, [BLOCK, BLOCK]):
            return "fp8"
        detail = f" in blocks of {block}" if method == "fp8" else ""
        raise CheckpointError(
            f"{path} is quantised with {method!r}{detail}, which raymoe does not support"
        )
    return None


def scale_key(key: str) -> str:
    """The stored name of an FP8 weight's scales."""
    return f"{key}_scale_inv"


def from_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 [N, K] and its scales, one number or float32 [N/128, K/128] rounded up -> float32."""
    wide = weight.float()
    if scale.numel() == 1:
        return wide * scale.float()
    rows, columns = wide.shape
    grid = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    if grid.shape[0] < rows or grid.shape[1] < columns:
        raise CheckpointError(
            f"FP8 scales {list(scale.shape)} do not cover a weight of {[rows, columns]}"
        )
    return wide * grid[:rows, :columns]


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [N, B, 16] (32 numbers a block, low half-byte first), exponents uint8 [N, B] -> bf16.

    The values are exact in bfloat16: two bits of mantissa and a power of two. [N, 32 B]
    """
    signed = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).long()  # [N, B, 16, 2]
    numbers = torch.ldexp(signed[pairs].flatten(2), scales.int().sub(127).unsqueeze(-1))
    return numbers.flatten(1).bfloat16()
