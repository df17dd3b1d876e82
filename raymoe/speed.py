"""How fast a group computes: seconds of a message = alpha + pairs / speed + gamma * experts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ModelSpec
from raymoe.experts.shard import ExpertShard


@dataclass(frozen=True, kw_only=True)
class GroupSpeed:
    """The fitted time of a message: `alpha_s + pairs / pairs_per_s + gamma_s * active experts`."""

    alpha_s: float
    pairs_per_s: float
    gamma_s: float

    def seconds(self, pairs: int, experts: int) -> float:
        """Predicted busy seconds of a message."""
        return self.alpha_s + pairs / self.pairs_per_s + self.gamma_s * experts


def fit_speed(samples: Iterable[tuple[int, int, float]]) -> GroupSpeed | None:
    """Least squares of *relative* errors over (pairs, active experts, seconds), nothing negative.

    Non-negative by trying every subset of the three terms. None with fewer than three samples or
    when no time grows with the pairs.
    """
    table = np.array(list(samples), dtype=np.float64).reshape(-1, 3)
    table = table[table[:, 2] > 0]
    if len(table) < 3:
        return None
    seconds = table[:, 2]
    terms = np.stack([np.ones(len(table)), table[:, 0], table[:, 1]], axis=1) / seconds[:, None]
    best: tuple[float, np.ndarray] | None = None
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            if 1 not in chosen:
                continue
            factors, *_ = np.linalg.lstsq(terms[:, chosen], np.ones(len(table)), rcond=None)
            if (factors < 0).any():
                continue
            full = np.zeros(3)
            full[list(chosen)] = factors
            error = float(((terms @ full - 1.0) ** 2).sum())
            if best is None or error < best[0] - 1e-12:
                best = (error, full)
    if best is None or best[1][1] <= 0:
        return None
    alpha_s, pair_s, gamma_s = best[1].tolist()
    return GroupSpeed(alpha_s=alpha_s, pairs_per_s=1.0 / pair_s, gamma_s=gamma_s)


def measure_speed(
    spec: ModelSpec,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    slowdown: float = 1.0,
    seconds: float = 0.3,
    layer: int = 0,
    vllm_on_cuda: bool = False,
) -> GroupSpeed:
    """Time made-up experts of a layer's shape on this device, for about `seconds`.

    Holds at most 4 replicas for that long, so that a group can be timed before it holds any. On a
    CPU by the thread's own time: groups that start together have to share the cores while they
    measure, and what each gets of them by then says nothing of its speed.
    """
    experts = min(4, spec.layer_specs[layer].experts)
    budget_bytes = sum(spec.expert_bytes) * spec.experts
    shard = ExpertShard(spec, budget_bytes, device, dtype, vllm_on_cuda=vllm_on_cuda)
    generator = torch.Generator().manual_seed(0)
    for expert in range(experts):
        shard.add(layer, expert, _random_record(spec, layer, generator))
    shapes = [(a, n) for a in sorted({1, 2, experts}) if a <= experts for n in (1, 8, 32) if n >= 1]
    samples: list[tuple[int, int, float]] = []
    for active, each in shapes:  # the first of each shape warms up
        _time_once(shard, layer, active, each, generator)
    clock = time.thread_time if torch.device(device).type == "cpu" else time.perf_counter
    started = clock()
    while clock() - started < seconds or len(samples) < len(shapes):
        for active, each in shapes:
            took = _time_once(shard, layer, active, each, generator, clock) * slowdown
            samples.append((active * each, active, took))
    return _fit_medians(samples)


def _fit_medians(samples: list[tuple[int, int, float]]) -> GroupSpeed:
    """Fit the median of each shape: one preempted run must not bend the line."""
    by_shape: dict[tuple[int, int], list[float]] = {}
    for pairs, active, took in samples:
        by_shape.setdefault((pairs, active), []).append(took)
    medians = [(n, a, float(np.median(took))) for (n, a), took in by_shape.items()]
    fitted = fit_speed(medians)
    if fitted is None:  # flat: all cost is fixed
        per_pair = max(took / n for n, _, took in medians)
        fitted = GroupSpeed(alpha_s=0.0, pairs_per_s=1.0 / per_pair, gamma_s=0.0)
    return fitted


def _random_record(spec: ModelSpec, layer: int, generator: torch.Generator) -> ExpertRecord:
    dtype = getattr(torch, spec.stored_dtype)
    return ExpertRecord(
        tensors={
            source.tensor: (torch.randn(source.shape, generator=generator) * 0.02).to(dtype)
            for source in spec.layer_specs[layer].sources
        }
    )


def _time_once(
    shard: ExpertShard,
    layer: int,
    active: int,
    each: int,
    generator: torch.Generator,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    hidden = shard.spec.hidden
    x = torch.randn(each, hidden, generator=generator)
    token_of_pair = torch.arange(each, dtype=torch.int32).repeat(active)
    weights = torch.full((active * each,), 1.0 / active)
    out = torch.empty(each, hidden)
    ids = torch.arange(active, dtype=torch.int32)
    counts = torch.full((active,), each, dtype=torch.int32)
    started = clock()
    missing = shard.compute(layer, x, ids, counts, token_of_pair, weights, out)
    assert not missing
    return clock() - started
