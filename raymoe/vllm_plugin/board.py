"""What a router and its vLLM workers tell each other beside vLLM: a folder that both see.

    router       the router's process id: workers end with it
    controller   host:port of the controller's control end, kept current by the router
    void         two mapped counters: steps that came to nothing, and those the router dealt with
    void-N.json  the requests that were in the Nth of those steps
    client.json  totals of the workers' client, for the router's report

A step is void when its experts stayed away: raising would end vLLM's engine with every request.
From then on every step is void, without waiting, until the router has dealt with it: whatever vLLM
publishes meanwhile means nothing, and the router publishes none of it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_VOIDED, _HANDLED = 0, 1


class Board:
    """One end; the router makes the folder's files with `Board.create`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with open(self.folder / "void", "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 16)
        # Eight aligned bytes are written at once, so no reader sees half a number.
        self._counters = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, folder: str | Path) -> Board:
        """The router's end, in an empty folder."""
        (Path(folder) / "void").write_bytes(bytes(16))
        board = cls(folder)
        board._write("router", str(os.getpid()))
        return board

    @property
    def pending(self) -> bool:
        """Whether there is a void step that the router has not dealt with."""
        return self._counters[_VOIDED] != self._counters[_HANDLED]

    @property
    def router_pid(self) -> int:
        return int((self.folder / "router").read_text())

    @property
    def controller_file(self) -> Path:
        return self.folder / "controller"

    def set_controller(self, host: str, port: int) -> None:
        self._write("controller", f"{host}:{port}")

    def void(self) -> None:
        """The worker's step is void; repeatable, also by several ranks."""
        self._counters[_VOIDED] = self._counters[_HANDLED] + 1

    def name_requests(self, request_ids: Iterable[str]) -> None:
        """Who was in the void step; the first to say so is right: later steps are void for free."""
        name = self._requests_file()
        if not (self.folder / name).exists():
            self._write(name, json.dumps(sorted(request_ids)))

    def requests(self) -> frozenset[str] | None:
        """Who was in the pending void step; None while that has not been said."""
        try:
            return frozenset(json.loads((self.folder / self._requests_file()).read_text()))
        except FileNotFoundError:
            return None

    def handle(self) -> None:
        """The router has ended those requests, and nothing that vLLM keeps is of the void step."""
        (self.folder / self._requests_file()).unlink(missing_ok=True)
        self._counters[_HANDLED] = self._counters[_VOIDED]

    def tell_client(self, stats: Mapping[str, Any]) -> None:
        self._write("client.json", json.dumps(stats))

    def client(self) -> dict[str, Any]:
        """The latest totals of the workers' client; empty before the first."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "client.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def _requests_file(self) -> str:
        return f"void-{self._counters[_VOIDED]}.json"

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        new = self.folder / f"{name}.{os.getpid()}"
        new.write_text(text)
        new.replace(self.folder / name)
