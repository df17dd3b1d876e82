"""A long prompt of one client beside another's decode: who waits for whom, and for how long.

    python -m benchmarks.prefill MODEL [--prompt-tokens 4096] [--decoding 1 8]

Some streams decode; when each has had its first tokens, another client sends a long prompt and
wants one token. Compared: time between two reads of the decoding streams without and beside the
prefill, and the prefill's time to first token alone and beside them. Medians over the turns; the
longest gap of all turns. MODEL must hold the prompt (the demo model's context is 2,048 tokens;
`benchmarks.random_checkpoint` makes one with 8,192).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import finish, table
from benchmarks.serving import Server, Streamed, stream_one

_DECODE_TOKENS = 384
_BEFORE_S = 1.0  # of decoding alone


async def beside(
    server: Server, prompts: list[list[int]], long: list[int]
) -> tuple[list[Streamed], float, float]:
    """The decoding streams, and from when to when the long prompt was computed."""
    decoding = [
        asyncio.create_task(stream_one(server.port, server.model, prompt, _DECODE_TOKENS))
        for prompt in prompts
    ]
    await asyncio.sleep(_BEFORE_S)
    began_s = time.perf_counter()
    await stream_one(server.port, server.model, long, 1)
    ended_s = time.perf_counter()
    return await asyncio.gather(*decoding), began_s, ended_s


def gaps_of(
    streams: list[Streamed], began_s: float, ended_s: float
) -> tuple[list[float], list[float]]:
    """Seconds between two reads: away from the prefill, and while it went on."""
    apart: list[float] = []
    during: list[float] = []
    for one in streams:
        for before, now in zip(one.times_s[1:], one.times_s[2:], strict=False):
            overlaps = now > began_s and before < ended_s
            (during if overlaps else apart).append(now - before)
    return apart, during


def measure(server: Server, count: int, args: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """One row: `count` decoding streams."""
    rng = np.random.default_rng(count)
    apart: list[float] = []
    during: list[float] = []
    alone_s, beside_s = [], []
    for _ in range(args.turns):
        lone = rng.integers(16, vocab, args.prompt_tokens).tolist()
        started = time.perf_counter()
        asyncio.run(stream_one(server.port, server.model, lone, 1))
        alone_s.append(time.perf_counter() - started)
        prompts = [rng.integers(16, vocab, 16).tolist() for _ in range(count)]
        long = rng.integers(16, vocab, args.prompt_tokens).tolist()
        streams, began_s, ended_s = asyncio.run(beside(server, prompts, long))
        beside_s.append(ended_s - began_s)
        for into, found in zip((apart, during), gaps_of(streams, began_s, ended_s), strict=True):
            into.extend(found)
    return {
        "decoding": count,
        "gap_p50_ms": 1e3 * statistics.median(apart),
        "gap_p50_beside_ms": 1e3 * statistics.median(during),
        "gap_max_beside_ms": 1e3 * max(during),
        "prefill_alone_s": statistics.median(alone_s),
        "prefill_beside_s": statistics.median(beside_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--decoding", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--config", help="config file for raymoe serve")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    server = Server(args.model, args.groups, args.routers, args.config)
    try:
        rows = [measure(server, count, args, vocab) for count in args.decoding]
    finally:
        server.stop()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    finish("prefill", vars(args), rows)


if __name__ == "__main__":
    main()
