"""How long copies rest: in proportion to their CPU time, more where cores are wanted."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from raymoe import pacing
from raymoe.pacing import Pacer


def work(cpu_s: float) -> None:
    until = time.thread_time() + cpu_s
    while time.thread_time() < until:
        pass


def times(monkeypatch: pytest.MonkeyPatch, *values: tuple[float, float | None]) -> None:
    left = list(values)
    monkeypatch.setattr(pacing, "_times", lambda: left.pop(0))


def test_rests_grow_with_the_time_spent_without_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    pacer = Pacer()
    idle = [(float(i), 0.0) for i in range(20)]
    times(monkeypatch, *idle)
    for _ in range(10):
        with pacer.measured() as spent:
            pass
    assert spent.cpu_s == 1.0
    assert spent.rest_s < 1.5
    busy = [(float(i), 2.0 * i) for i in range(20)]
    times(monkeypatch, *busy)
    for _ in range(10):
        with pacer.measured() as spent:
            pass
    assert spent.rest_s > 11.0


def test_without_word_from_the_kernel_it_rests_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pacer = Pacer()
    times(monkeypatch, (0.0, None), (1.0, None))
    with pacer.measured() as spent:
        pass
    assert 3.0 < spent.rest_s < 8.0


def test_a_block_that_fails_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, (0.0, 0.0), (1.0, 0.0))
    with pytest.raises(KeyError), Pacer().measured() as spent:
        raise KeyError
    assert spent.rest_s > 0


@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/schedstat").exists(), reason="no schedstat here"
)
def test_the_kernel_says_who_waits_for_a_core() -> None:
    """A thread held to one core beside a busy process waits for it, and says so."""
    context = multiprocessing.get_context("spawn")
    core = sorted(os.sched_getaffinity(0))[0]
    other = context.Process(target=_spin_on, args=(core,), daemon=True)
    other.start()
    found: list[float] = []

    def measure() -> None:
        os.sched_setaffinity(0, {core})  # this thread's own
        pacer = Pacer()
        until = time.monotonic() + 30
        while pacer.waiting < 0.3 and time.monotonic() < until:
            with pacer.measured():
                work(0.05)
        found.append(pacer.waiting)

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join(60)
    other.terminate()
    other.join(10)
    assert found and found[0] >= 0.3


def _spin_on(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass
