"""From records to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from raymoe.bench.run import Record
from raymoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a good request keeps to, in seconds; None: it does not matter."""

    ttft: float | None = None  # time to first token
    tpot: float | None = None  # mean time a token after the first
    gap: float | None = None  # longest time between two tokens
    e2e: float | None = None  # whole request

    def met(self, record: Record) -> bool:
        if record.error is not None or not record.chunk_s:
            return False
        reached = {
            "ttft": ttft(record),
            "tpot": tpot(record) or 0.0,
            "gap": longest_gap(record) or 0.0,
            "e2e": record.end_s - record.sent_s,
        }
        limits = ((name, getattr(self, name)) for name in reached)
        return all(limit is None or reached[name] <= limit for name, limit in limits)


def parse_objective(text: str) -> Objective:
    """ "ttft=0.5,tpot=0.05", seconds. Raises ConfigError."""
    limits: dict[str, float] = {}
    known = [one.name for one in fields(Objective)]
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            raise ConfigError(f"--objective {part!r} is not NAME=SECONDS") from None
        if name not in known or not limits[name] > 0:
            raise ConfigError(f"--objective {part!r}: NAME is one of {', '.join(known)}, above 0")
    return Objective(**limits)


def ttft(record: Record) -> float:
    """Time to first token, seconds."""
    return record.chunk_s[0] - record.sent_s


def tpot(record: Record) -> float | None:
    """Mean time of a token after the first, seconds."""
    if record.tokens < 2 or len(record.chunk_s) < 2:
        return None
    return (record.chunk_s[-1] - record.chunk_s[0]) / (record.tokens - 1)


def gaps(record: Record) -> list[float]:
    """Times between chunks with output, seconds."""
    return np.diff(record.chunk_s).tolist()


def longest_gap(record: Record) -> float | None:
    return max(gaps(record), default=None)


def summary(
    records: Sequence[Record], seconds: float, objective: Objective | None = None
) -> dict[str, Any]:
    """All figures of a run of `seconds`; times in seconds, None where there was nothing.

    Failed requests count in `failed` and in goodput, and nowhere else.
    """
    good = [one for one in records if one.error is None]
    answered = [one for one in good if one.chunk_s]
    tokens = sum(one.tokens for one in good)
    chunks = sum(len(one.chunk_s) for one in good)
    found: dict[str, Any] = {
        "seconds": seconds,
        "requests": len(records),
        "failed": len(records) - len(good),
        "errors": dict(Counter(one.error for one in records if one.error).most_common(5)),
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "output_tokens": tokens,
        "requests_per_s": len(good) / seconds if seconds else 0.0,
        "output_tokens_per_s": tokens / seconds if seconds else 0.0,
        "chunks_per_token": chunks / tokens if tokens else None,
        "ttft_s": spread([ttft(one) for one in answered]),
        "tpot_s": spread([value for one in answered if (value := tpot(one)) is not None]),
        "itl_s": spread([gap for one in answered for gap in gaps(one)]),
        "longest_gap_s": spread(
            [value for one in answered if (value := longest_gap(one)) is not None]
        ),
        "e2e_s": spread([one.end_s - one.sent_s for one in answered]),
        "sent_late_s": spread([one.late_s for one in records]),
    }
    if objective is not None:
        met = sum(objective.met(one) for one in records)
        found["objective_met"] = met
        found["goodput_requests_per_s"] = met / seconds if seconds else 0.0
    return found


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {
        "mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99, "max": max(values),
    }  # fmt: skip


def by_second(records: Sequence[Record], seconds: float) -> dict[str, list[float]]:
    """Per second of the run: output chunks that came, and requests under way at its end."""
    count = int(seconds) + 1
    came = [at for one in records for at in one.chunk_s]
    chunks, _ = np.histogram(came, bins=np.arange(count + 1))
    edges = np.arange(1, count + 1)
    sent = np.sort([one.sent_s for one in records])
    ended = np.sort([one.end_s for one in records])
    running = np.searchsorted(sent, edges) - np.searchsorted(ended, edges)
    return {"chunks": chunks.tolist(), "running": running.tolist()}
