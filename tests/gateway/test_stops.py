"""Stop strings against a plain search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.gateway.stops import StopStrings


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[list[str], str | None]:
    stopper, out = StopStrings(stops, include), []
    for piece in pieces:
        out.append(stopper.push(piece))
        if stopper.matched is not None:
            return out, stopper.matched
    return [*out, stopper.flush()], None


def test_text_that_could_begin_a_stop_waits() -> None:
    out, matched = run(["END"], ["a", " E", "N", "d ", "EN", "D more"])
    assert out == ["a", " ", "", "ENd ", "", ""]
    assert matched == "END"


def test_what_was_held_comes_out_at_the_end() -> None:
    assert run(["END"], ["x E", "N"]) == (["x ", "", "EN"], None)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abSTOP")])
def test_the_stop_string_stays_only_when_asked(include: bool, text: str) -> None:
    out, matched = run(["STOP"], ["abST", "OPcd"], include)
    assert "".join(out) == text
    assert matched == "STOP"


def test_the_first_of_several_counts() -> None:
    out, matched = run(["world", "lo"], ["hello world"])
    assert ("".join(out), matched) == ("hel", "lo")


def test_without_stops_everything_passes() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], None)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_as_a_search_in_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    out, matched = run(stops, pieces)
    whole = "".join(pieces)
    # Pieces are searched as they come: the stop that is complete first ends the text.
    for end in range(len(pieces) + 1):
        text = "".join(pieces[:end])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            assert "".join(out) == whole[: min(found)]
            assert matched is not None
            return
    assert "".join(out) == whole
    assert matched is None
