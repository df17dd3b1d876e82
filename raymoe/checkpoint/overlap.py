"""Shared experts computed while the routed ones are on their way.

Families call the two one after the other, in either order, and add them up at the end. Between
dispatch and combine the router has nothing else to do; so the shared part is moved there, whatever
the order, and only for blocks that give the same with it on random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""What families call them."""

Beside = Callable[[Tensor], None]
"""Called between dispatch and combine with the routed experts' input [T, D]."""


class SharedFirst:
    """The block calls the shared experts before the routed ones and looks at the result later.

    It gets memory that is filled in between.
    """

    def __init__(self, shared: nn.Module, fill: float | None = None) -> None:
        self._own = shared.forward
        self._fill = fill
        self._late: tuple[Tensor, Tensor] | None = None
        self.used = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], not there yet."""
        out = torch.empty_like(x)
        if self._fill is not None:
            out.fill_(self._fill)
        self._late = (x, out)
        return out

    def beside(self, hidden: Tensor) -> None:
        assert self._late is not None
        (x, out), self._late = self._late, None
        out.copy_(self._own(x))


class SharedLast:
    """The block calls the shared experts after the routed ones, with the same input."""

    def __init__(self, shared: nn.Module) -> None:
        self._own = shared.forward
        self._early: list[tuple[Tensor, Tensor]] = []  # of up to two micro-batches
        self.used = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], computed already."""
        for at, (hidden, early) in enumerate(self._early):
            if hidden.data_ptr() == x.data_ptr() and hidden.numel() == x.numel():
                del self._early[at]
                self.used = True
                return early.view(x.shape)
        own: Tensor = self._own(x)
        return own

    def beside(self, hidden: Tensor) -> None:
        self._early = [*self._early[-1:], (hidden, self._own(hidden))]


@torch.inference_mode()
def move_beside(block: nn.Module, use: Callable[[Beside | None], None], width: int) -> bool:
    """Move the shared experts of an MoE block between its dispatch and its combine.

    `use(beside)` has the block's routed experts call `beside` there; they are silent meanwhile
    (each token's sum is its input). False, and nothing has changed, for blocks without shared
    experts and those that give something else then. width: D.
    """
    shared = next((getattr(block, name) for name in SHARED if hasattr(block, name)), None)
    if not isinstance(shared, nn.Module) or "forward" in vars(shared):
        return False
    weight = next(shared.parameters())
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, width, generator=draw).to(weight)
    order: list[str] = []
    use(lambda hidden: order.append("routed"))
    own = shared.forward

    def noting(given: Tensor) -> Any:
        order.append("shared")
        return own(given)

    shared.forward = noting
    try:
        expected = _sum_of(block(x))
    except Exception as why:  # whatever a family may need besides its input: it stays as it is
        log.debug("shared experts of %s stay where they are: %r", type(block).__name__, why)
        expected = None
    del shared.forward
    use(None)
    if expected is None or sorted(order) != ["routed", "shared"]:
        return False
    moved: Any = SharedFirst if order[0] == "shared" else SharedLast
    trial = SharedFirst(shared, torch.nan) if moved is SharedFirst else SharedLast(shared)
    if not _gives(block, shared, trial, use, x, expected):
        return False
    final = moved(shared)
    shared.forward = final.forward
    use(final.beside)
    return True


def _gives(
    block: nn.Module,
    shared: nn.Module,
    trial: SharedFirst | SharedLast,
    use: Callable[[Beside | None], None],
    x: Tensor,
    expected: Tensor,
) -> bool:
    shared.forward = trial.forward
    use(trial.beside)
    try:
        found = _sum_of(block(x))
    except Exception as why:  # it does something with the result or its input that does not fit
        log.debug("shared experts of %s stay where they are: %r", type(block).__name__, why)
        return False
    finally:
        del shared.forward
        use(None)
    return trial.used and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _sum_of(result: Any) -> Tensor:
    """A block's output, which may come with its gate's logits."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out
