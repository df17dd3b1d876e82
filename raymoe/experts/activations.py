"""The activations of expert FFNs, and the join of gate and up, both in place where they can be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from raymoe.checkpoint.spec import ExpertMaths

Activation = Callable[[torch.Tensor], torch.Tensor]


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_new,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}
"""By the names used in `ExpertMaths.activation`."""


def join(maths: ExpertMaths, up: torch.Tensor) -> torch.Tensor:
    """[P, 2F] (gated) or [P, F] -> [P, F], as `ExpertMaths` says. May overwrite `up`."""
    if not maths.gated:
        return ACTIVATIONS[maths.activation](up)
    gate, up = up.chunk(2, dim=-1)
    if maths.limit is not None:
        up = up.clamp(-maths.limit, maths.limit)
        if not maths.limit_after:
            gate = gate.clamp(max=maths.limit)
    if maths.alpha != 1.0:
        gate = gate * torch.sigmoid(gate * maths.alpha)
    elif maths.activation == "silu":
        gate = F.silu(gate, inplace=True)
    else:
        gate = ACTIVATIONS[maths.activation](gate)
    if maths.limit_after and maths.limit is not None:
        gate = gate.clamp(max=maths.limit)
    if maths.up_shift:
        up = up + maths.up_shift
    return gate.mul_(up)
