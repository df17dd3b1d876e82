"""Real group processes with the product's expert kernels: for alpha and gamma, and a closed loop.

Each process holds the experts of a checkpoint's first layer in an ExpertShard and computes what it
is sent, as a group's compute thread does. A group's time is its process's own CPU time, so that a
busy machine does not decide; a slowed process does its work several times. A batch's time is that
of the slowest group, layer by layer.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from benchmarks.planning.score import Costs
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.checkpoint.spec import ModelSpec
from raymoe.experts.shard import ExpertShard
from raymoe.speed import fit_speed, measure_speed

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
_ROWS = 1 << 13
_SHAPES = tuple((active, each) for active in (1, 2, 4, 8, 16) for each in (1, 4, 16, 64))


class _Group:
    """The experts of one layer in this process."""

    def __init__(self, spec: ModelSpec, repeat: int) -> None:
        torch.set_num_threads(1)
        self.spec, self.repeat = spec, repeat
        self.shard = ExpertShard(spec, sum(spec.expert_bytes) * spec.experts)
        for expert in range(spec.experts):
            self.shard.add(0, expert, load_expert(spec, 0, expert))
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(_ROWS, spec.hidden, generator=generator)

    def seconds(self, counts: np.ndarray) -> float:
        """CPU seconds of a message with counts [E] pairs of each expert, partial sums."""
        active = np.flatnonzero(counts)
        if not len(active):
            return 0.0
        each = counts[active]
        rows = int(each.max())
        ids = torch.from_numpy(active.astype(np.int32))
        token_of_pair = torch.from_numpy(np.concatenate([np.arange(n) for n in each])).int()
        weights = torch.full((int(each.sum()),), 1.0 / len(active))
        out = torch.empty(rows, self.spec.hidden)
        started = time.process_time()
        for _ in range(self.repeat):
            self.shard.compute(
                0,
                self.x[:rows],
                ids,
                torch.from_numpy(each.astype(np.int32)),
                token_of_pair,
                weights,
                out,
            )
        return time.process_time() - started


def _serve(pipe: Connection, spec: ModelSpec, repeat: int) -> None:
    group = _Group(spec, repeat)
    while True:
        asked = pipe.recv()
        if asked is None:
            return
        if isinstance(asked, float):
            pipe.send(measure_speed(spec, slowdown=repeat, seconds=asked))
        else:
            pipe.send(group.seconds(asked))


class Groups:
    """Group processes; `run(cut [E, G])` gives the CPU seconds of each."""

    def __init__(self, repeats: list[int], model: Path = DEMO) -> None:
        self.spec = read_spec(str(model))
        self.experts, self.expert_bytes = self.spec.experts, int(self.spec.expert_bytes[0])
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for repeat in repeats:
            mine, other = context.Pipe()
            args = (other, self.spec, repeat)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for _ in range(3):
            self.run(np.ones((self.experts, len(repeats)), np.int64))

    def run(self, cut: np.ndarray) -> np.ndarray:
        for g, pipe in enumerate(self.pipes):
            pipe.send(cut[:, g])
        return np.array([pipe.recv() for pipe in self.pipes])

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)

    def measure(self, group: int) -> Costs:
        """The product's fit (raymoe.speed) on this group's CPU times, medians of each shape."""
        rng = np.random.default_rng(1)
        samples = []
        for active, each in _SHAPES:
            if active > self.experts:
                continue
            cut = np.zeros((self.experts, len(self.pipes)), np.int64)
            cut[rng.permutation(self.experts)[:active], group] = each
            times = [float(self.run(cut)[group]) for _ in range(7)]
            samples.append((active * each, active, float(np.median(times))))
        fitted = fit_speed(samples)
        assert fitted is not None, "the group's times do not grow with the pairs"
        return Costs(
            alpha_s=fitted.alpha_s, pair_s=1.0 / fitted.pairs_per_s, gamma_s=fitted.gamma_s
        )

    def says(self, group: int, seconds: float = 0.3) -> Costs:
        """What the group itself measures before it serves (wall clock)."""
        self.pipes[group].send(seconds)
        found = self.pipes[group].recv()
        return Costs(alpha_s=found.alpha_s, pair_s=1.0 / found.pairs_per_s, gamma_s=found.gamma_s)
