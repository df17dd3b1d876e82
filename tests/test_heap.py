"""Freed memory leaves the process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from raymoe.heap import give_back

MIB = 1 << 20


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_freed_blocks_below_a_kept_one_leave_the_process() -> None:
    c = ctypes.CDLL(None)
    if not hasattr(c, "malloc_trim"):
        pytest.skip("not glibc")
    c.malloc.restype = ctypes.c_void_p
    c.malloc.argtypes, c.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    give_back()  # else part of what follows fills what is free in this process already
    before = anonymous_bytes()
    blocks = [c.malloc(65536) for _ in range(1600)]  # small ones, so all of them in the heap
    for block in blocks:
        ctypes.memset(block, 1, 65536)
    kept = c.malloc(65536)  # so that the heap cannot shrink from its end
    grown = anonymous_bytes() - before
    assert grown > 80 * MIB
    for block in blocks:
        c.free(block)
    give_back()
    assert anonymous_bytes() - before < grown - 60 * MIB
    c.free(kept)
