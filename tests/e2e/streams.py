"""Streams that go on while something happens to the deployment, each checked against itself."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType

from tests.e2e.traffic import Answer, Client, Judge


class Streams:
    """Asks the same prompts again and again from several threads until the block ends.

    `expected[i]` is what prompt i gave while nothing happened. A failed request fails the block,
    and so does an answer that differs from `expected` by more than near ties (`exact.py`). Those
    that differ are kept and judged at the end, when nothing else runs.
    """

    def __init__(
        self, client: Client, prompts: list[str], tokens: int, *, threads: int = 6
    ) -> None:
        self._client, self._prompts, self._tokens = client.with_tokens(), prompts, tokens
        self.expected = [self._client.answer(prompt, tokens) for prompt in prompts]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.among: Sequence[int] = range(len(prompts))
        """Which prompts are asked for; may be changed while it runs."""
        self.asked = 0
        self.different: list[tuple[str, Answer]] = []
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
        if self.failures:
            raise self.failures[0]
        assert self.asked > 0
        judge = Judge(self._client)
        ties = [judge.near_ties(prompt, answer) for prompt, answer in self.different]
        print(
            f"{self.asked} streams, none failed; {len(ties)} differ, all by near ties "
            f"({sum(ties)} in all)"
        )

    def _run(self, thread: int) -> None:
        at = thread
        while not self._stop.is_set() and not self.failures:
            among = self.among
            number = among[at % len(among)]
            at += 1
            try:
                answer = self._client.answer(self._prompts[number], self._tokens)
            except Exception as e:
                with self._lock:
                    self.failures.append(e)
                return
            with self._lock:
                self.asked += 1
                if answer != self.expected[number]:
                    self.different.append((self._prompts[number], answer))
