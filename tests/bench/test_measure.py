"""Figures of made-up records, computed a second way."""

from __future__ import annotations

import pytest

from raymoe.bench.measure import Objective, by_second, parse_objective, spread, summary
from raymoe.bench.page import as_page
from raymoe.bench.profile import profile
from raymoe.bench.run import Record
from raymoe.errors import ConfigError


def record(sent_s: float, chunk_s: list[float], error: str | None = None) -> Record:
    end = chunk_s[-1] + 0.01 if chunk_s else sent_s + 1
    return Record(
        domain="a", sent_s=sent_s, chunk_s=chunk_s, end_s=end, prompt_tokens=3,
        tokens=len(chunk_s), error=error,
    )  # fmt: skip


RECORDS = [
    record(0.0, [0.2, 0.3, 0.4]),
    record(0.5, [0.6, 1.6, 1.7, 1.8]),
    record(1.0, [1.1]),
    record(1.0, [1.2], error="it broke"),
    record(1.5, [], error="it broke"),
]


def test_a_summary() -> None:
    found = summary(RECORDS, 2.0, Objective(ttft=0.15, gap=2.0))
    assert (found["requests"], found["failed"], found["errors"]) == (5, 2, {"it broke": 2})
    assert (found["output_tokens"], found["prompt_tokens"]) == (8, 9)
    assert found["output_tokens_per_s"] == 4.0
    assert found["chunks_per_token"] == 1.0
    assert found["ttft_s"]["max"] == pytest.approx(0.2)
    assert found["ttft_s"]["p50"] == pytest.approx(0.1)
    assert found["tpot_s"]["max"] == pytest.approx((1.8 - 0.6) / 3)
    assert found["itl_s"]["max"] == found["longest_gap_s"]["max"] == pytest.approx(1.0)
    assert found["longest_gap_s"]["p50"] == pytest.approx((0.1 + 1.0) / 2)
    assert found["objective_met"] == 2  # the first is late, the last two failed
    assert found["goodput_requests_per_s"] == 1.0


def test_nothing_came() -> None:
    found = summary([RECORDS[-1]], 1.0)
    assert found["ttft_s"] is found["tpot_s"] is found["chunks_per_token"] is None
    assert summary([], 0.0)["output_tokens_per_s"] == 0.0
    assert spread([]) is None


def test_objectives() -> None:
    assert parse_objective("ttft=0.5,tpot=0.05") == Objective(ttft=0.5, tpot=0.05)
    for wrong in ("ttft", "ttft=0", "speed=1", "ttft=x"):
        with pytest.raises(ConfigError, match="--objective"):
            parse_objective(wrong)
    assert not Objective(tpot=0.3).met(RECORDS[1])
    assert Objective(tpot=0.5, e2e=1.4).met(RECORDS[1])
    assert not Objective(gap=0.9).met(RECORDS[1])


def test_by_second() -> None:
    found = by_second(RECORDS, 2.0)
    assert found["chunks"] == [4, 5, 0]
    assert found["running"] == [1, 1, 0]


def test_a_profile_adds_routers_up_and_leaves_newcomers_out() -> None:
    def router(name: str, pid: int, factor: float) -> dict[str, object]:
        totals = {"steps": 10, "decode_tokens": 80, "prefill_tokens": 5, "plan_s": 0.1}
        totals |= {"forward_s": 2.0, "sample_s": 0.2, "dispatch_s": 0.3, "wait_s": 0.6}
        totals |= {"combine_s": 0.1, "stalled_s": 0.0}
        values: dict[str, object] = {k: v * factor for k, v in totals.items()}
        values["last_error"] = ""
        values["layers"] = [[10 * factor, 0.1 * factor, 0.2 * factor, 0.05 * factor]] * 2
        values["answers"] = {"g0": 20 * factor}
        values["pairs"] = {"g0": 400 * factor}
        values["busy_s"] = {"g0": 0.4 * factor}
        values["latency_s"] = {"g0": 0.8 * factor}
        return {"id": name, "pid": pid, "profile": values}

    before = {"routers": [router("a", 1, 1), router("b", 2, 1)]}
    after = {"routers": [router("a", 1, 3), router("b", 2, 2), router("c", 3, 50)]}
    found = profile(before, after)
    assert found is not None
    assert (found["steps"], found["decode_tokens"]) == (30, 240)
    assert sum(found["step_ms"].values()) == pytest.approx(1e3 * (0.1 + 2.0 + 0.2) / 10)
    assert found["step_ms"]["dense part and attention"] == pytest.approx(100.0)
    assert [one["layer"] for one in found["layers"]] == [0, 1]
    assert found["layers"][1] == {
        "layer": 1, "batches": 30, "dispatch_ms": pytest.approx(10.0),
        "wait_ms": pytest.approx(20.0), "combine_ms": pytest.approx(5.0),
    }  # fmt: skip
    (group,) = found["groups"]
    assert (group["messages"], group["pairs_per_message"]) == (60, 20)
    assert (group["busy_ms"], group["latency_ms"]) == (pytest.approx(20.0), pytest.approx(40.0))
    assert profile(after, after) is None


@pytest.mark.parametrize("seconds", [0.0, 0.4, 9.03, 20.0, 99.9, 3600.0])
def test_a_page_of_any_length_has_a_few_ticks(seconds: float) -> None:
    found = {
        "summary": summary(RECORDS, seconds), "series": by_second(RECORDS, seconds), "faults": [],
        "requests": [{"sent_s": 0.0, "ttft_s": None, "failed": True}],
    }  # fmt: skip
    page = as_page(found, "<title>", {"mix": "<b>"})
    assert 3 * 3 <= page.count(" s</text>") <= 3 * 10
    assert "<title>&lt;title&gt;</title>" in page and "<b>" not in page
    assert "it broke" in page
