"""One call in place of many for the small operations between a model's products.

RMS norms and rotary embeddings are most of the calls of a decode step, and each of their half dozen
torch operations costs more than its arithmetic. They differ by family in details; so each is
replaced where the replacement gives the same on random numbers, and nowhere else. One step of the
demo model, experts in process: see benchmarks/engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from raymoe.native import Native

ROTARY = "apply_rotary_pos_emb"
SAME_WITHIN = 1e-5


class FusedNorm:
    """`weight * x / rms(x)` in C; calls that do not fit go to the module's own forward."""

    def __init__(self, native: Native, weight: Tensor, epsilon: float, own: Any) -> None:
        self._norm = native.norm
        self._weight = weight
        self._address = weight.data_ptr()
        self._width = len(weight)
        self._epsilon = epsilon
        self._own = own

    def __call__(self, x: Tensor, *more: Any, **options: Any) -> Tensor:
        """[..., D] -> [..., D]."""
        if more or options or x.dtype is not torch.float32 or not x.is_contiguous():
            given: Tensor = self._own(x, *more, **options)
            return given
        out = torch.empty_like(x)
        self._norm(
            out.data_ptr(), x.data_ptr(), self._address, x.numel() // self._width, self._width,
            self._epsilon,
        )  # fmt: skip
        return out


class FusedRotary:
    """`apply_rotary_pos_emb` of one packed step in C; calls that do not fit go to the family's."""

    def __init__(self, native: Native, own: Any) -> None:
        self._rotate = native.rotate
        self._own = own

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any
    ) -> Any:
        """[1, H, N, D] and [1, H_kv, N, D], both turned; cos and sin [1, N, D]."""
        plain = cos.is_contiguous() and sin.is_contiguous() and not more and not options
        if plain and _fits(query, cos) and _fits(key, cos) and sin.shape == cos.shape:
            return self._turned(query, cos, sin), self._turned(key, cos, sin)
        return self._own(query, key, cos, sin, *more, **options)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _, heads, rows, width = x.shape
        out = torch.empty(1, rows, heads, width)
        self._rotate(
            out.data_ptr(), x.data_ptr(), x.stride(2), x.stride(1), cos.data_ptr(), sin.data_ptr(),
            rows, heads, width,
        )  # fmt: skip
        return out.transpose(1, 2)


def _fits(x: Tensor, cos: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and cos.dtype is torch.float32
        and x.dim() == 4
        and cos.dim() == 3
        and x.shape[0] == cos.shape[0] == 1
        and x.shape[2:] == cos.shape[1:]
        and x.shape[3] % 2 == 0
        and x.stride(3) == 1
    )


class QuickConfig:
    """A config whose attention name is a plain attribute: asking transformers' costs 5 us, and
    every layer asks."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._attn_implementation = config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # being copied: it has nothing yet
            raise AttributeError(name)
        return getattr(self._config, name)


@torch.inference_mode()
def fuse(model: nn.Module, attention: Iterable[nn.Module], native: Native) -> Callable[[], None]:
    """Replace what can be; `attention` are the modules that attend. Gives what undoes it."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        norm = _norm_of(module, native)
        if norm is not None:
            _set(module, "forward", norm, undo)
    for module in attention:
        forward = _rotating_forward(module, native)
        if forward is not None:
            _set(module, "forward", forward, undo)
        config: Any = getattr(module, "config", None)
        if config is not None:
            module.config = QuickConfig(config)  # type: ignore[assignment]
            undo.append(lambda module=module, config=config: setattr(module, "config", config))  # type: ignore[misc]

    def undo_all() -> None:
        for one in undo:
            one()

    return undo_all


def _set(module: nn.Module, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    setattr(module, name, value)
    undo.append(lambda: delattr(module, name))


def _norm_of(module: nn.Module, native: Native) -> FusedNorm | None:
    weight: Any = getattr(module, "weight", None)
    epsilon: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or "forward" in vars(module):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return None
    fused = FusedNorm(native, weight.detach(), epsilon, module.forward)
    try:
        same = _same(map(fused, _tries(weight)), map(module, _tries(weight)))
    except TypeError:  # it wants more than what it norms
        return None
    return fused if same else None


def _tries(weight: Tensor) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [scale * torch.randn(3, len(weight), generator=draw) for scale in (1e-3, 1.0, 30.0)]


def _rotating_forward(module: nn.Module, native: Native) -> Any:
    """The module's forward with another rotary embedding among its globals."""
    forward: Any = type(module).forward
    if "forward" in vars(module) or not isinstance(forward, FunctionType):
        return None
    own = forward.__globals__.get(ROTARY)
    if own is None or ROTARY not in forward.__code__.co_names:
        return None
    fused = FusedRotary(native, own)
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=draw) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=draw) for _ in range(2))
    try:
        if not _same(fused(query, key, cos, sin), own(query, key, cos, sin)):
            return None
    except (TypeError, RuntimeError, ValueError):  # of another kind: it wants other arguments
        return None
    changed = FunctionType(
        forward.__code__, {**forward.__globals__, ROTARY: fused}, forward.__name__,
        forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    changed.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(changed, module)


def _same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=SAME_WITHIN, atol=SAME_WITHIN)
        for a, b in zip(found, expected, strict=True)
    )
