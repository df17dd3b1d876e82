"""Closed loop: real processes with real matrix products, one of them slowed three times.

A group's time is its process's own CPU time, so that a busy machine does not decide; the slowed
process does its work three times. The batch's time is that of the slowest group, layer by layer.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.planning.score import Costs

HIDDEN, INNER = 256, 512


def _group(pipe: Connection, experts: int, repeat: int) -> None:
    rng = np.random.default_rng(0)
    weights = [
        (
            rng.standard_normal((HIDDEN, INNER), np.float32),
            rng.standard_normal((INNER, HIDDEN), np.float32),
        )
        for _ in range(experts)
    ]
    tokens = rng.standard_normal((1 << 14, HIDDEN), np.float32)
    while True:
        counts = pipe.recv()
        if counts is None:
            return
        started = time.process_time()
        for _ in range(repeat):
            for expert in np.flatnonzero(counts):
                up, down = weights[expert]
                np.maximum(tokens[: counts[expert]] @ up, 0) @ down
        pipe.send(time.process_time() - started)


class Groups:
    """Group processes; `run(cut [E, G])` gives the CPU seconds of each."""

    def __init__(self, experts: int, repeats: list[int]) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for repeat in repeats:
            mine, other = context.Pipe()
            process = context.Process(target=_group, args=(other, experts, repeat), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for _ in range(3):
            self.run(np.ones((experts, len(repeats)), np.int64))

    def run(self, cut: np.ndarray) -> np.ndarray:
        for g, pipe in enumerate(self.pipes):
            pipe.send(cut[:, g])
        return np.array([pipe.recv() for pipe in self.pipes])

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)

    def measure(self, group: int, experts: int) -> Costs:
        """Fit alpha, seconds a pair and gamma to this group's times (least squares, medians)."""
        rows, times = [], []
        rng = np.random.default_rng(1)
        for active in (1, 2, 4, 8, experts):
            for each in (1, 4, 16, 64):
                cut = np.zeros((experts, len(self.pipes)), np.int64)
                cut[rng.permutation(experts)[:active], group] = each
                rows.append([1.0, active * each, active])
                times.append(np.median([self.run(cut)[group] for _ in range(5)]))
        # weigh small batches as much as large ones
        scale = 1 / np.maximum(times, 1e-6)
        fit = np.linalg.lstsq(np.array(rows) * scale[:, None], np.array(times) * scale, rcond=None)
        alpha, pair, gamma = np.maximum(fit[0], [0, 1e-9, 0])
        return Costs(alpha_s=float(alpha), pair_s=float(pair), gamma_s=float(gamma))
