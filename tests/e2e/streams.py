"""Streams that go on while something happens to the deployment, each checked against itself."""

from __future__ import annotations

import threading
from types import TracebackType

from tests.e2e.traffic import Client


class Streams:
    """Asks the same prompts again and again from several threads until the block ends.

    `expected[i]` is what prompt i gave while nothing happened. A failed request fails the block;
    other texts are counted in `different`: batches of another size round otherwise, and a near-tie
    falls the other way.
    """

    def __init__(
        self, client: Client, prompts: list[str], tokens: int, *, threads: int = 6
    ) -> None:
        self._client, self._prompts, self._tokens = client, prompts, tokens
        self.expected = [client.ask(prompt, tokens) for prompt in prompts]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.asked = self.different = 0
        self.failures: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)
        ]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(240)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a request did not end"
            self.check()

    def check(self) -> None:
        """No request failed, and what was said is what would have been said."""
        print(
            f"{self.asked} streams, {self.different} with a near-tie, {len(self.failures)} failed"
        )
        if self.failures:
            raise self.failures[0]
        assert self.asked > 0
        assert self.different <= max(1, self.asked // 10), "more than near-ties differ"

    def _run(self, number: int) -> None:
        at = number
        while not self._stop.is_set() and not self.failures:
            prompt = at % len(self._prompts)
            at += 1
            try:
                text = self._client.ask(self._prompts[prompt], self._tokens)
            except Exception as e:
                with self._lock:
                    self.failures.append(e)
                return
            with self._lock:
                self.asked += 1
                self.different += text != self.expected[prompt]
