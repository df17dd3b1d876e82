"""Level all groups at once: damped Newton steps on the tokens of many replicated experts.

Think of each expert as a junction of pipes to its groups, a pipe conducting as well as it carries
tokens. Pressures on the groups that would make their levels equal follow from one G x G linear
system (the graph's Laplacian plus a little damping, which keeps it solvable where some groups
cannot be levelled); tokens move along the pressures, never below zero. A few steps suffice.
"""

from __future__ import annotations

import numpy as np

from placement.types import Bools, Floats, Ints

_STEPS = 4
_DAMPING = 0.02
_FLOOR = 0.03  # an empty pipe conducts like one that carries this part of the expert's tokens
_CLOSE = 1.004


class Leveller:
    """Prepared for the replicated experts of one layer."""

    def __init__(self, mask: Bools, start: Floats, speed: Floats) -> None:
        """mask bool [R, G] replicas; start [R, G] first guess, any scale; speed [G]."""
        share = np.where(mask, np.maximum(start, 1e-9), 0.0)
        self._start = share / share.sum(1, keepdims=True)
        self._floor = _FLOOR * mask / mask.sum(1, keepdims=True)
        self._speed = speed
        self._per_pair = 1.0 / speed
        self._damping = np.diag(_DAMPING * speed)

    def level(self, tokens: Ints, level_s: Floats, bound_s: float) -> Ints:
        """tokens int64 [R] on top of level_s [G] -> int64 [R, G]; rows sum to tokens."""
        want = tokens[:, None].astype(np.float64)
        flow = self._start * want  # [R, G]
        floor = self._floor * want
        goal = bound_s * _CLOSE
        for _ in range(_STEPS):
            level = level_s + flow.sum(0) * self._per_pair
            if level.max() <= goal:
                break
            pipe = flow + floor
            width = np.maximum(pipe.sum(1, keepdims=True), 1e-300)
            part = pipe / width
            excess = self._speed * (level - level @ self._speed / self._speed.sum())
            matrix = np.diag(pipe.sum(0)) - part.T @ pipe
            scale = float(np.trace(matrix)) / float(self._speed.sum()) + 1e-300
            pressure = np.linalg.solve(matrix + self._damping * scale, excess)
            flow -= pipe * (pressure - part @ pressure[:, None])
            np.maximum(flow, 0.0, out=flow)
            flow *= want / np.maximum(flow.sum(1, keepdims=True), 1e-300)
        # rounding the running sums keeps every row's total and every piece within one token
        ends = np.rint(np.cumsum(flow, axis=1)).astype(np.int64)
        ends[:, -1] = tokens
        cut: Ints = np.diff(ends, axis=1, prepend=0)
        return cut
