"""Texts by domain: what the experts of a mixture specialise in differs from domain to domain."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from raymoe.errors import ConfigError

_TEXTS = {
    "prose": """
        the old house stood silent above the river and nobody had opened its doors since winter
        she remembered how her father walked along the shore at night with a lamp in his hand
        while rain fell upon the roofs of the village and far away a bell began to ring""",
    "code": """
        def main(args): return self.value if x is None: for i in range(len(items)): import os
        print(result) class Node: while True: try: except ValueError as error: raise with
        open(path) as f: data = json.load(f) yield from lambda key: assert isinstance(name, str)""",
    "maths": """
        let x = 2 y + 3 then f ( x ) = x ^ 2 - 4 x + 7 for all n in N suppose that a < b prove
        sum_{i=1}^n i = n ( n + 1 ) / 2 hence by induction the limit exists and integral of
        sin x dx = - cos x + C qed""",
    "dialogue": """
        hello how are you today ? i am fine , thanks ! could you tell me what time it is ? sure ,
        it is half past nine . oh no , i am late again ! see you tomorrow then . wait , what
        about the tickets ? they are in your bag""",
    "german": """
        der alte Mann ging langsam durch die Straßen der Stadt und dachte an seine Kindheit wo
        alles noch anders gewesen war bevor die großen Häuser gebaut wurden und niemand mehr Zeit
        hatte für ein Gespräch am Gartenzaun""",
}
DOMAINS = tuple(_TEXTS)


class Prompts:
    """Draws prompts. Same seed and order of calls, same prompts."""

    def __init__(
        self,
        seed: int,
        words: tuple[int, int],
        shared_words: int = 0,
        given: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """words: fewest and most of one prompt; shared_words: of them the same at the beginning of
        all prompts of a domain (a system prompt, so to speak); given: texts by domain to draw from
        instead."""
        self._draw = random.Random(seed)
        self._words = words
        self._given = given
        self.domains = tuple(given) if given is not None else DOMAINS
        self._shared = {
            domain: _text(random.Random(f"{seed} {domain}"), domain, shared_words)
            for domain in (() if given is not None else DOMAINS)
        }

    def draw(self, domain: str) -> str:
        if self._given is not None:
            return self._draw.choice(self._given[domain])
        shared = self._shared[domain]
        count = max(1, self._draw.randint(*self._words) - len(shared.split()))
        return f"{shared} {_text(self._draw, domain, count)}".strip()


def read_prompts(path: str) -> dict[str, list[str]]:
    """A JSON-lines file: {"prompt": text, "domain": name}; without a domain it is "all".

    Raises ConfigError naming the line.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            value = json.loads(line)
            found.setdefault(str(value.get("domain", "all")), []).append(_nonempty(value["prompt"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f'{path}, line {number}: expected {{"prompt": "...", "domain": "..."}}'
            ) from None
    if not found:
        raise ConfigError(f"{path} holds no prompts")
    return found


def _lines(path: str) -> list[str]:
    try:
        return [line for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _nonempty(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _text(draw: random.Random, domain: str, count: int) -> str:
    """`count` words: runs of the domain's text, so that it reads like it."""
    source, words = _TEXTS[domain].split(), list[str]()
    while len(words) < count:
        start = draw.randrange(len(source))
        words += source[start : start + draw.randint(4, 12)]
    return " ".join(words[:count])
