"""Two micro-batches of one step take turns: one is computed while the other waits for experts.

Each runs the model's forward in a greenlet of its own, in the engine's one thread: nothing is
pre-empted, so the model, the cache and the client need no locks. The first is always a layer's
attention ahead of the second, whose rows may thus belong to the same sequences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from greenlet import getcurrent, greenlet
from torch import Tensor

log = logging.getLogger(__name__)

ALL = slice(None)


class _MicroBatch(greenlet):
    """rows: which of the step's packed rows it computes."""

    def __init__(self, run: Callable[[], None], rows: slice) -> None:
        super().__init__(run)
        self.rows = rows
        self.other: _MicroBatch | None = None


def in_turns(
    first: Callable[[], Tensor], second: Callable[[], Tensor], border: int
) -> list[Tensor]:
    """What both return. `first` computes the packed rows below `border`, `second` the others.

    When one raises, the other is ended where it waits (`GreenletExit`), and this raises.
    """
    results: dict[int, Tensor] = {}

    def keep(number: int, run: Callable[[], Tensor]) -> Callable[[], None]:
        def kept() -> None:
            results[number] = run()

        return kept

    ahead = _MicroBatch(keep(0, first), slice(None, border))
    behind = _MicroBatch(keep(1, second), slice(border, None))
    ahead.other, behind.other = behind, ahead
    try:
        ahead.switch()  # until one of them is done
        for each in (ahead, behind):
            if not each.dead:
                each.other = None
                each.switch()
    except BaseException:
        for each in (ahead, behind):
            if each and not each.dead:
                _end(each)
        raise
    return [results[0], results[1]]


def _end(waiting: _MicroBatch) -> None:
    """What fails at the end of a step that has failed is not what the step is about."""
    try:
        waiting.throw()
    except Exception:
        log.exception("a micro-batch of a failed step did not end well")


def rows_here() -> slice:
    """The rows of the step that the caller computes; outside of `in_turns` all."""
    here = getcurrent()
    return here.rows if isinstance(here, _MicroBatch) else ALL


def others_turn() -> None:
    """Called with nothing to do but wait: the other micro-batch goes on until it waits."""
    here = getcurrent()
    if isinstance(here, _MicroBatch) and here.other is not None and not here.other.dead:
        here.other.switch()
