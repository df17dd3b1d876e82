"""Which requests, when: reproducible, at the asked rate, of the asked domains."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from raymoe.bench.load import Load, Planned, Trace, parse_mix, parse_shifts
from raymoe.bench.prompts import DOMAINS, Prompts, read_prompts
from raymoe.errors import ConfigError


def load(seed: int, rate: float | None = None, shifts: tuple[str, ...] = ()) -> Load:
    mix = parse_shifts(parse_mix("prose=3,code=1", DOMAINS), list(shifts), DOMAINS)
    return Load(Prompts(seed, (5, 20), shared_words=3), mix, (4, 9), seed, rate)


def take(source: Load | Trace, count: int, now_s: float = 0.0) -> list[Planned]:
    return [one for _ in range(count) if (one := source.next(now_s)) is not None]


def test_the_same_seed_gives_the_same_requests() -> None:
    assert take(load(1, 2.0), 50) == take(load(1, 2.0), 50)
    assert take(load(1, 2.0), 50) != take(load(2, 2.0), 50)


def test_arrivals_are_poisson() -> None:
    times = [one.at_s or 0.0 for one in take(load(3, rate=4.0), 800)]
    between = np.diff([0.0, *times])
    assert stats.kstest(between, "expon", args=(0, 1 / 4.0)).pvalue > 0.01
    assert all(one.at_s is None for one in take(load(3), 5))


def test_shares_lengths_and_a_shift() -> None:
    early = take(load(4, shifts=("10:maths=1",)), 400, now_s=9.9)
    counts = Counter(one.domain for one in early)
    assert set(counts) == {"prose", "code"}
    assert stats.binomtest(counts["prose"], 400, 0.75).pvalue > 0.01
    assert {one.max_tokens for one in early} == set(range(4, 10))
    assert {len(one.prompt.split()) for one in early} == set(range(5, 21))
    by_domain = {one.domain: " ".join(one.prompt.split()[:3]) for one in early}
    assert all(one.prompt.startswith(by_domain[one.domain]) for one in early)
    late = take(load(4, shifts=("10:maths=1",)), 20, now_s=10.0)
    assert {one.domain for one in late} == {"maths"}


def test_a_trace_is_replayed_in_order_and_faster(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"at_s": 4, "max_tokens": 3, "prompt": "b"},
        {"at_s": 1, "max_tokens": 2, "domain": "code"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = take(Trace(str(path), Prompts(0, (4, 4)), speed=2.0), 5)
    assert (first.at_s, first.domain, first.max_tokens) == (0.5, "code", 2)
    assert len(first.prompt.split()) == 4
    assert (second.at_s, second.prompt) == (2.0, "b")


def test_own_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "x", "domain": "a"}\n{"prompt": "y"}\n')
    given = read_prompts(str(path))
    prompts = Prompts(0, (1, 1), given=given)
    assert prompts.domains == ("a", "all")
    assert (prompts.draw("a"), prompts.draw("all")) == ("x", "y")


@pytest.mark.parametrize(
    "content", ['{"at_s": -1, "max_tokens": 1, "prompt": "x"}', '{"at_s": 1}', "nonsense", "[]"]
)
def test_bad_files_name_the_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_text(f"\n{content}\n")
    with pytest.raises(ConfigError, match="line 2"):
        Trace(str(path), Prompts(0, (1, 1)))
    path.write_text(content)
    with pytest.raises(ConfigError, match="line 1"):
        read_prompts(str(path)) if "prompt" not in content else Trace(str(path), Prompts(0, (1, 1)))
    with pytest.raises(ConfigError, match="cannot read"):
        Trace(str(tmp_path / "none"), Prompts(0, (1, 1)))


@pytest.mark.parametrize("mix", ["poetry=1", "prose=x", "prose=-1", "prose=0", "prose=inf"])
def test_bad_mixes(mix: str) -> None:
    with pytest.raises(ConfigError):
        parse_mix(mix, DOMAINS)
    with pytest.raises(ConfigError):
        parse_shifts({"prose": 1.0}, [f"10:{mix}"], DOMAINS)
    with pytest.raises(ConfigError, match="--shift"):
        parse_shifts({"prose": 1.0}, [mix], DOMAINS)
