"""The activations of expert FFNs, and the join of gate and up between the two products."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raymoe.checkpoint.spec import ExpertMaths

Activation = Callable[[Tensor], Tensor]


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Activation] = {
    "silu": _silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_new,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}
"""By the names used in `ExpertMaths.activation`. They may overwrite their input."""


def join(maths: ExpertMaths, gate: Tensor | None, up: Tensor, out: Tensor) -> Tensor:
    """gate (None for a family without one) and up, both [..., F] -> out, as `ExpertMaths` says.

    May overwrite gate and up. All three may be strided.
    """
    if gate is None:
        return out.copy_(ACTIVATIONS[maths.activation](up))
    limit = maths.limit
    if limit is not None:
        up.clamp_(-limit, limit)
        if not maths.limit_after:
            gate.clamp_(max=limit)
    if maths.alpha != 1.0:
        gate = gate * torch.sigmoid(gate * maths.alpha)
    else:
        gate = ACTIVATIONS[maths.activation](gate)
    if limit is not None and maths.limit_after:
        gate.clamp_(max=limit)
    if maths.up_shift:
        up.add_(maths.up_shift)
    return torch.mul(gate, up, out=out)
