"""A forced tool call: the model writes one JSON object, clients get it as `tool_calls`.

With `tool_choice` "required" or a named function the output follows a grammar,
`{"name": "f", "arguments": {...}}` (raymoe.grammar.build.call_grammar); here its text is taken
apart again, also while it comes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from raymoe.grammar.build import call_opening


class CallReader:
    """One output's call. `push` its text as it comes; `name` is known from some point on."""

    def __init__(self, names: Sequence[str]) -> None:
        self.id = f"call_{secrets.token_hex(12)}"
        self.name: str | None = None
        self._openings = {name: call_opening(name) for name in names}
        self._held = ""
        self._given: list[str] = []

    def push(self, text: str, ended: bool) -> str:
        """What this adds to the arguments. The last character waits: it may be the call's own
        closing brace."""
        self._held += text
        if self.name is None and not self._find_name():
            return ""
        if not ended:
            given, self._held = self._held[:-1], self._held[-1:]
        else:
            given, self._held = self._held, ""
            if given and _is_json("".join(self._given) + given[:-1]):
                given = given[:-1]
        self._given.append(given)
        return given

    def _find_name(self) -> bool:
        for name, opening in self._openings.items():
            if self._held.startswith(opening):
                self.name = name
                self._held = self._held[len(opening) :]
                return True
        return False


class ForcedCalls:
    """All outputs of one request that forces a call."""

    def __init__(self, names: Sequence[str], finish: str) -> None:
        """finish: the finish_reason of a complete call."""
        self._names = tuple(names)
        self._finish = finish
        self._readers: dict[int, CallReader] = {}

    def finish(self, finish: str | None) -> str | None:
        return self._finish if finish == "stop" else finish

    def message(self, text: str) -> dict[str, Any]:
        """A whole answer's message; without a call when it was cut before the function's name."""
        reader = CallReader(self._names)
        arguments = reader.push(text, ended=True)
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if reader.name is not None:
            function = {"name": reader.name, "arguments": arguments}
            message["tool_calls"] = [{"id": reader.id, "type": "function", "function": function}]
        return message

    def delta(self, index: int, text: str, ended: bool) -> dict[str, Any]:
        """What a chunk says of choice `index`; empty when it says nothing new."""
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = CallReader(self._names)
        known = reader.name is not None
        arguments = reader.push(text, ended)
        if reader.name is None or (known and not arguments):
            return {}
        call: dict[str, Any] = {"index": 0, "function": {"arguments": arguments}}
        if not known:
            call.update(id=reader.id, type="function")
            call["function"] = {"name": reader.name, "arguments": arguments}
        return {"tool_calls": [call]}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
