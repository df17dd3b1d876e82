"""What every benchmark prints: a table, and one JSON line with where the figures come from."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, Python: what a reader needs to compare figures."""
    model = ""
    try:
        with open("/proc/cpuinfo") as f:
            model = next(line.split(":", 1)[1].strip() for line in f if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor()
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "python": platform.python_version(),
    }


def commit() -> str:
    """Short commit of the checkout, with a + when it has uncommitted changes; or unknown."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Right-aligned columns."""
    text = [[_cell(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *text]) for i in range(len(header))]
    lines = [
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True))
        for row in [list(header), *text]
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finish(name: str, arguments: Mapping[str, Any], results: Any) -> None:
    """Prints the last line."""
    sys.stdout.flush()
    print(
        json.dumps(
            {
                "benchmark": name,
                "arguments": dict(arguments),
                "commit": commit(),
                "machine": machine(),
                "results": results,
            }
        ),
        flush=True,
    )
