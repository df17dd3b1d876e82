"""Traffic for the tests: completions through the `openai` package, alone or many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import openai

from tests.e2e.conftest import Deployment


class Client:
    """Asks one deployment for completions of a fixed length; nothing is tried twice."""

    def __init__(self, deployment: Deployment, **sampling: Any) -> None:
        self._client = openai.OpenAI(
            base_url=deployment.url + "/v1", api_key="none", max_retries=0, timeout=240
        )
        self._sampling = {"temperature": 0, **sampling}

    def ask(self, prompt: str, tokens: int, **sampling: Any) -> str:
        """The text of `tokens` streamed tokens."""
        stream = self._client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
            **{**self._sampling, **sampling},
        )
        text, generated = [], 0
        for chunk in stream:
            text += [choice.text for choice in chunk.choices]
            if chunk.usage is not None:
                generated = chunk.usage.completion_tokens
        assert generated == tokens
        return "".join(text)


class Wave:
    """Several requests at once, in threads: `with Wave(client, prompts, 120) as wave: kill()`.

    At the end of the block they have all finished. A request that fails fails the test.
    """

    def __init__(self, client: Client, prompts: list[str], tokens: int) -> None:
        self._client, self._tokens = client, tokens
        self._answers: dict[int, str | Exception] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(i, prompt)) for i, prompt in enumerate(prompts)
        ]

    def __enter__(self) -> Wave:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.join(240)

    def texts(self) -> list[str]:
        """All answers in order; raises the first failure."""
        for answer in self._answers.values():
            if isinstance(answer, Exception):
                raise answer
        assert len(self._answers) == len(self._threads), "a request did not end"
        return [str(self._answers[i]) for i in range(len(self._threads))]

    def _run(self, number: int, prompt: str) -> None:
        try:
            self._answers[number] = self._client.ask(prompt, self._tokens, seed=number)
        except Exception as e:
            self._answers[number] = e


def differing(before: list[str], after: list[str]) -> int:
    """How many texts differ: batches of other sizes round otherwise, which turns near-ties."""
    return sum(a != b for a, b in zip(before, after, strict=True))


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.1)
    return False
