"""A running deployment and streams that never stop: what chaos.py and elastic.py measure with.

The client is a few lines of asyncio on plain sockets: it must not take the cores it measures on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from raymoe.checkpoint.reader import read_spec

_SERVE = (sys.executable, "-m", "raymoe.cli", "serve")
DOMAINS = {
    "scripture": "And it came to pass in those days, that",
    "code": "def main(argv=None):\n    parser = argparse.ArgumentParser(",
    "proofs": "|- ( ph -> ( ps -> ch ) ) $= ( wi",
    "plays": "ROMEO. Shall I hear more, or shall I speak at this?",
}


_LAST_S = 120.0  # what the last streams get to end by themselves


class Server:
    """`raymoe serve` with these settings, as a child process. The model is called "demo"."""

    def __init__(self, settings: dict[str, Any]) -> None:
        settings = {**settings, "gateway": {**settings.get("gateway", {}), "model_name": "demo"}}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._folder = tempfile.TemporaryDirectory()
        config = Path(self._folder.name) / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [*_SERVE, "--config", str(config), "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        while not any(line.startswith("ready:") for line in self.log):
            if self.process.poll() is not None:
                self._reader.join(5)
                raise RuntimeError("raymoe serve did not come up:\n" + "\n".join(self.log))
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._folder.cleanup()

    def _read(self) -> None:
        """All that it prints, to its end: a full pipe would stop it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip())

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def groups(self) -> dict[str, dict[str, Any]]:
        """Rows of the status by id."""
        return {g["id"]: g for g in self.get("/status")["groups"]}

    def wait(
        self, what: Callable[[], bool], limit_s: float = 120.0, pause_s: float = 0.05
    ) -> float:
        """Seconds until it came true; raises when it does not. Each look takes CPU time too."""
        started = time.monotonic()
        while not what():
            if time.monotonic() - started > limit_s:
                raise TimeoutError(f"not within {limit_s} s: {self.get('/status')}")
            time.sleep(pause_s)
        return time.monotonic() - started

    def kill(self, group_id: str) -> None:
        os.kill(self.groups()[group_id]["pid"], signal.SIGKILL)

    def tree(self) -> list[psutil.Process]:
        """All processes of the deployment."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def group_processes(self) -> set[int]:
        """Ray's processes that are, or are about to be, expert groups."""
        found = set()
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if "ExpertGroup" in line or "default_worker.py" in line:
                    found.add(process.pid)
        return found


@dataclass
class Stream:
    """Arrival times (monotonic seconds) of the chunks of one request."""

    asked: float = field(default_factory=time.monotonic)  # when it was sent
    times: list[float] = field(default_factory=list)
    failed: str = ""
    ended: bool = False  # in whatever way


class Load:
    """`streams` requests at any time, each followed by the next, until the block ends."""

    def __init__(
        self,
        port: int,
        streams: int,
        tokens: int,
        domains: list[str],
        model: str = "",
        every_s: float = 0.0,
    ) -> None:
        """`model`: its folder, where prompts.json may have prompts by domain.

        `every_s`: each stream asks at its own fixed times, so long apart, however fast the answers
        come (at once when the last one took longer): a load that is offered, not a full machine.
        """
        self._port, self._streams, self._tokens = port, streams, tokens
        self._every_s = every_s
        self.domains = domains  # may be changed while it runs, and so may
        self.active = streams  # how many of the streams go on
        stored = Path(model) / "prompts.json"
        self._ids = json.loads(stored.read_text()) if model and stored.exists() else None
        self.done: list[Stream] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_LAST_S)
        for stream in list(self.done):
            if not stream.ended and not stream.failed:
                stream.failed = f"it has not ended {_LAST_S:g} s after the last was asked"

    @property
    def failures(self) -> list[str]:
        return [stream.failed for stream in self.done if stream.failed]

    def gaps(self, since: float, until: float) -> np.ndarray:
        """Seconds between two chunks of one stream, of all gaps that touch the time span. A stream
        that has not ended has been waiting for its next one up to now."""
        gaps = []
        for stream in list(self.done):
            times = _times(stream)
            inside = (times[1:] >= since) & (times[:-1] <= until)
            gaps.append(np.diff(times)[inside])
        return np.concatenate(gaps) if gaps else np.zeros(0)

    def resumed(self, at: float, within_s: float) -> list[float]:
        """Seconds from `at` until each stream then open had its next token, or, where a longer
        pause began within `within_s`, the token that ended it; up to now when it has not come."""
        found = []
        for stream in list(self.done):
            times = np.array([stream.asked, *_times(stream)])
            inside = np.flatnonzero((times[1:] > at) & (times[:-1] <= at + within_s))
            if stream.asked <= at and len(inside):
                longest = inside[np.argmax(np.diff(times)[inside])]
                found.append(float(times[longest + 1] - at))
        return found

    def rate(self, since: float, until: float) -> float:
        """Tokens/s of all streams in the time span (a chunk a token)."""
        count = sum(
            int(((t := np.array(stream.times)) >= since).sum() - (t >= until).sum())
            for stream in list(self.done)
            if stream.times
        )
        return count / (until - since)

    async def _run(self) -> None:
        await asyncio.gather(*(self._one_after_another(n) for n in range(self._streams)))

    async def _one_after_another(self, number: int) -> None:
        turn = number
        due = time.monotonic() + self._every_s * number / self._streams
        while not self._stop.is_set():
            now = time.monotonic()
            if number >= self.active or now < due:
                while self._every_s and number >= self.active and due < now:
                    due += self._every_s  # its turns meanwhile are not made up for
                await asyncio.sleep(min(0.1, max(0.0, due - now)) or 0.1)
                continue
            due += self._every_s
            domain = self.domains[turn % len(self.domains)]
            stream = Stream()
            self.done.append(stream)
            try:
                await self._ask(self._prompt(domain, turn), stream)
            except (OSError, asyncio.IncompleteReadError) as e:
                stream.failed = repr(e)
            stream.ended = True
            turn += self._streams

    def _prompt(self, domain: str, turn: int) -> str | list[int]:
        if self._ids is None:
            return f"{DOMAINS[domain]} {turn}"
        ids: list[int] = self._ids[domain]
        at = 16 * turn % (len(ids) - 16)
        return ids[at : at + 16]

    async def _ask(self, prompt: str | list[int], stream: Stream) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        body = json.dumps(
            {
                "model": "demo",
                "prompt": prompt,
                "max_tokens": self._tokens,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            stream.failed = status.decode().strip()
        ended = False
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                stream.times.append(time.monotonic())
                if line.startswith(b'data: {"error"'):
                    stream.failed = line.decode().strip()
        writer.close()
        if not ended and not stream.failed:
            stream.failed = "the stream ended before [DONE]"


def _times(stream: Stream) -> np.ndarray:
    """When its chunks came and, while it is open, now."""
    return np.array(stream.times if stream.ended else [*stream.times, time.monotonic()])


def model_bytes(model: str) -> int:
    """What one replica of each expert takes in memory."""
    spec = read_spec(model)
    return int(np.array(spec.expert_bytes) @ np.array(spec.experts_of_layer))


def group_bytes(model: str, groups: int, times: float) -> int:
    """Memory of each of so many groups that hold the model so many times, the reserve included."""
    return int(times * model_bytes(model) / groups) + 2 * max(read_spec(model).expert_bytes)


def percentile(values: np.ndarray, part: float) -> float:
    return float(np.percentile(values, part)) if len(values) else float("nan")
