"""Traffic for the tests: completions through the `openai` package, alone or many at once."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import openai

from raymoe.gateway.tokenizer import GatewayTokenizer
from tests.e2e.conftest import DEMO, Deployment
from tests.e2e.exact import Drawing, Step, near_ties


class Answer(NamedTuple):
    """A stream's text and, of a client that asks for `logprobs`, its tokens' texts and their
    likeliest."""

    text: str
    tokens: tuple[str, ...]
    tops: tuple[dict[str, float], ...]


class Client:
    """Asks one deployment for completions of a fixed length; nothing is tried twice."""

    def __init__(self, deployment: Deployment, **sampling: Any) -> None:
        self._client = openai.OpenAI(
            base_url=deployment.url + "/v1", api_key="none", max_retries=0, timeout=240
        )
        self._sampling = {"temperature": 0, **sampling}

    def ask(self, prompt: str, tokens: int, **sampling: Any) -> str:
        """The text of `tokens` streamed tokens."""
        return self.answer(prompt, tokens, **sampling).text

    def answer(self, prompt: str | list[int], tokens: int, **sampling: Any) -> Answer:
        """The same with what else was told."""
        told = {**self._sampling, **sampling}
        extra = {"ignore_eos": True}
        if "top_k" in told:
            extra["top_k"] = told.pop("top_k")
        stream = self._client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
            **told,
        )
        text: list[str] = []
        texts: list[str] = []
        tops: list[dict[str, float]] = []
        generated = 0
        for chunk in stream:
            for choice in chunk.choices:
                text.append(choice.text)
                if choice.logprobs is not None:
                    texts += choice.logprobs.tokens or ()
                    tops += choice.logprobs.top_logprobs or ()
            if chunk.usage is not None:
                generated = chunk.usage.completion_tokens
        assert generated == tokens
        assert not texts or len(texts) == tokens
        return Answer("".join(text), tuple(texts), tuple(tops))

    def close(self) -> None:
        """Its connections, and those of clients made from it."""
        self._client.close()

    def with_tokens(self) -> Client:
        """One whose answers can be judged."""
        other = copy.copy(self)
        other._sampling = {**self._sampling, "logprobs": 0}
        return other


class Judge:
    """Answers of a client `with_tokens` of the demo model: are they what they should be?

    Ask when nothing else runs: it asks the deployment again.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ties: dict[tuple[Any, ...], int] = {}
        self._asked: dict[tuple[Any, ...], list[Step]] = {}

    def near_ties(self, prompt: str, answer: Answer, **sampling: Any) -> int:
        """How many it has. Raises AssertionError for an answer that they do not explain.

        sampling: `temperature`, `seed` and `top_k` (20 at most) of one that is sampled.
        """
        key = (prompt, answer.tokens, *sorted(sampling.items()))
        if key not in self._ties:
            said = [self._ids[text] for text in answer.tokens]
            assert said and self._tokenizer.decode(said) == answer.text, "text and tokens differ"
            drawing = None
            if sampling:
                drawing = Drawing(temperature=sampling["temperature"], seed=sampling["seed"])

            def again(ids: tuple[int, ...], count: int) -> list[Step]:
                return self._again(ids, count, sampling)

            self._ties[key] = near_ties(self._tokenizer.encode(prompt), said, again, drawing)
        return self._ties[key]

    def _again(self, ids: tuple[int, ...], count: int, sampling: dict[str, Any]) -> list[Step]:
        key = (ids, count, *sorted(sampling.items()))
        if key not in self._asked:
            told = {**sampling, "logprobs": sampling.get("top_k", 5)}
            answer = self._client.answer(list(ids), count, **told)
            self._asked[key] = [
                Step(self._ids[text], {self._ids[t]: p for t, p in top.items()})
                for text, top in zip(answer.tokens, answer.tops, strict=True)
            ]
        return self._asked[key]

    @cached_property
    def _tokenizer(self) -> GatewayTokenizer:
        return GatewayTokenizer.load(str(DEMO))

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Token ids by the texts that answers have: of the demo model no two are alike."""
        known = list(itertools.takewhile(self._tokenizer.token_bytes, itertools.count()))
        ids = {self._tokenizer.token_text(at): at for at in known}
        assert len(ids) == len(known)
        return ids


def judge(
    client: Client,
    prompts: Sequence[str],
    before: Sequence[Answer],
    after: Sequence[Answer],
    **sampling: Any,
) -> int:
    """How many answers differ from those before, all by near ties. The n-th was asked with n as
    its seed, as a `Wave` does."""
    court, ties = Judge(client), []
    for n, (prompt, one, other) in enumerate(zip(prompts, before, after, strict=True)):
        if one != other:
            seeded = {**sampling, "seed": n} if sampling else {}
            ties.append(court.near_ties(prompt, other, **seeded))
    print(f"{len(ties)} of {len(after)} streams differ, by near ties: {ties}")
    return len(ties)


class Wave:
    """Several requests at once, in threads: `with Wave(client, prompts, 120) as wave: kill()`.

    At the end of the block they have all finished. A request that fails fails the test.
    """

    def __init__(self, client: Client, prompts: list[str], tokens: int) -> None:
        self._client, self._tokens = client, tokens
        self._answers: dict[int, Answer | Exception] = {}
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

    def answers(self) -> list[Answer]:
        """All in order; raises the first failure."""
        found = []
        for number in range(len(self._threads)):
            assert number in self._answers, "a request did not end"
            answer = self._answers[number]
            if isinstance(answer, Exception):
                raise answer
            found.append(answer)
        return found

    def texts(self) -> list[str]:
        """Of all answers, in order."""
        return [answer.text for answer in self.answers()]

    def _run(self, number: int, prompt: str) -> None:
        try:
            self._answers[number] = self._client.answer(prompt, self._tokens, seed=number)
        except Exception as e:
            self._answers[number] = e


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.1)
    return False
