"""Stop strings, found over token borders; text that could be the start of one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes one output's text through, cut before the first stop string.

    What is held back is the longest end of the text that begins a stop string, so any stop
    string lies wholly in held text plus what comes after it.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """include: the stop string itself stays in the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may go out now. After a match (`matched` is set) nothing more may."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[: at + len(self.matched)] if self._include else text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the output ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
