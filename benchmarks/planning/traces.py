"""Routing traces -> windows of counts [W, L, E]; and synthetic loads, labelled as such."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FAMILIES = {  # prefix: experts, tokens a window, bytes of one expert as published
    "dsv2lite": (64, 1024, 3 * 2048 * 1408 * 2),  # bf16
    "gptoss20b": (32, 2048, 3 * 2880 * 2880 * 17 // 32),  # MXFP4: 4.25 bits a weight
}
PARTS = 16  # of a window
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "traces"


def parser_of(doc: str, of: str) -> argparse.ArgumentParser:
    """For a program over the traces, which its docstring describes: --traces and --only."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=BESIDE)
    parser.add_argument("--only", default="", help=f"{of} whose name contains this")
    return parser


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    name: str
    windows: np.ndarray  # int64 [W, L, E]
    expert_bytes: int
    groups: int
    parts: np.ndarray | None = None  # int64 [W, P, L, E], what each window was made of


def load_traces(folder: Path) -> list[Trace]:
    """Every file as a trace, and each family's files one after the other as a drifting one."""
    traces = []
    for prefix, (experts, tokens, size) in FAMILIES.items():
        whole = []
        for path in sorted(folder.glob(f"{prefix}*.npz")):
            ids = np.load(path)["ids"]
            whole.append(ids)
            if len(ids) >= 5 * tokens:
                traces.append(trace_of(path.stem, ids, experts, tokens, size))
            else:
                print(f"({path.stem}: {len(ids)} tokens, under 5 windows: only in the drift trace)")
        if whole:
            name = f"{prefix} drift ({len(whole)} files)"
            traces.append(trace_of(name, np.concatenate(whole), experts, tokens, size))
    return traces


def trace_of(name: str, ids: np.ndarray, experts: int, tokens: int, size: int) -> Trace:
    """Windows of so many tokens, and each in 16 parts, as a controller's reports would have it."""
    count = len(ids) // tokens
    parts = count_windows(ids[: count * tokens], experts, tokens // PARTS)
    parts = parts.reshape(count, PARTS, *parts.shape[1:])
    return Trace(name=name, windows=parts.sum(1), expert_bytes=size, groups=8, parts=parts)


def count_windows(ids: np.ndarray, experts: int, tokens: int) -> np.ndarray:
    """ids [tokens, L, K] -> counts int64 [W, L, E] of whole windows."""
    layers = ids.shape[1]
    out = np.zeros((len(ids) // tokens, layers, experts), np.int64)
    for w in range(len(out)):
        part = ids[w * tokens : (w + 1) * tokens]
        for layer in range(layers):
            out[w, layer] = np.bincount(part[:, layer].ravel(), minlength=experts)
    return out


def r1_like(windows: int = 12, groups: int = 32, seed: int = 0) -> Trace:
    """Synthetic, shaped like DeepSeek-R1 by rank: 58 layers x 256 experts, top-8.

    Per layer sigma ~ U(0.35, 1.7), popularity lognormal(0, sigma), log-drift rho 0.95 a window;
    8,192 x groups tokens a window.
    """
    rng = np.random.default_rng(seed)
    return _lognormal(
        rng, "R1-like synthetic", windows, 58, 256, groups, 8192 * groups * 8, 44_040_192
    )


def synthetic_family(
    name: str, layers: int, experts: int, pairs: int, seed: int, size: int
) -> Trace:
    """A fallback without trace files; same shape as a family, lognormal loads."""
    rng = np.random.default_rng(seed)
    return _lognormal(rng, f"{name} SYNTHETIC fallback", 20, layers, experts, 8, pairs, size)


def _lognormal(
    rng: np.random.Generator,
    name: str,
    windows: int,
    layers: int,
    experts: int,
    groups: int,
    pairs: int,
    size: int,
) -> Trace:
    sigma = rng.uniform(0.35, 1.7, (layers, 1))
    z = rng.normal(size=(layers, experts))
    counts = np.zeros((windows, layers, experts), np.int64)
    for w in range(windows):
        weight = np.exp(sigma * z)
        for layer in range(layers):
            counts[w, layer] = rng.multinomial(pairs, weight[layer] / weight[layer].sum())
        z = 0.95 * z + np.sqrt(1 - 0.95**2) * rng.normal(size=z.shape)
    return Trace(name=name, windows=counts, expert_bytes=size, groups=groups)
