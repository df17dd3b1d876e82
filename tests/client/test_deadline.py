"""Deadlines follow what groups are seen to take."""

from __future__ import annotations

import pytest

from raymoe.client.deadline import MAX_STRIKES, Patience


def patience() -> Patience:
    return Patience(multiple=8.0, floor_s=0.2, first_s=5.0)


def test_before_anything_is_known_the_first_deadline_holds() -> None:
    assert patience().limit_s(1) == 5.0


def test_floor_for_small_work_and_a_multiple_for_large() -> None:
    p = patience()
    p.observe(100, 0.0108, 0.011)  # 0.1 ms a pair, 8 pairs of fixed cost
    assert p.limit_s(1) == pytest.approx(0.2)
    assert p.predict_s(10_000) == pytest.approx(1.0, rel=0.01)
    assert p.limit_s(10_000) == pytest.approx(8.0, rel=0.01)
    assert p.limit_s(5_000, messages=10) < p.limit_s(10_000)


def test_the_worst_rate_is_remembered_and_forgotten_slowly() -> None:
    p = patience()
    p.observe(100, 0.108, 0.1)
    slow_s = p.predict_s(1000)
    p.observe(100, 0.00108, 0.1)
    assert 0.9 * slow_s < p.predict_s(1000) < slow_s
    for _ in range(600):
        p.observe(100, 0.00108, 0.001)
    assert p.predict_s(1000) == pytest.approx(slow_s / 100, rel=0.1)
    assert p.limit_s(1) == pytest.approx(0.2)


def test_late_answers_of_a_busy_machine_stretch_the_deadline() -> None:
    p = patience()
    p.observe(1, 1e-4, 0.15)
    assert p.limit_s(1) == pytest.approx(0.45)


def test_strikes_double_up_to_a_limit_and_an_answer_ends_them() -> None:
    p = patience()
    p.observe(1, 1e-4, 1e-3)
    for strikes in range(MAX_STRIKES + 3):
        assert p.limit_s(1) == pytest.approx(0.2 * 2 ** min(strikes, MAX_STRIKES))
        p.struck()
    p.observe(1, 1e-4, 1e-3)
    assert p.limit_s(1) == pytest.approx(0.2)
