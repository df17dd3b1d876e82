"""Which request is sent when: a closed loop, Poisson arrivals, or a trace."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from raymoe.bench.prompts import Prompts
from raymoe.errors import ConfigError

Mix = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One request to send. `at_s` seconds after the start; None: as soon as a stream is free."""

    at_s: float | None
    domain: str
    prompt: str
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class DomainMix:
    """Shares of the domains, which may change: (from this second on, shares), in order."""

    phases: tuple[tuple[float, Mix], ...]

    def at(self, seconds: float) -> Mix:
        current = self.phases[0][1]
        for start, mix in self.phases:
            if start <= seconds:
                current = mix
        return current

    def draw(self, seconds: float, draw: random.Random) -> str:
        mix = self.at(seconds)
        return draw.choices(list(mix), list(mix.values()))[0]


def parse_mix(text: str | None, domains: tuple[str, ...]) -> Mix:
    """ "prose=3,code=1" -> shares; None: all domains alike. Raises ConfigError."""
    if text is None:
        return dict.fromkeys(domains, 1.0)
    mix = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        if name not in domains:
            raise ConfigError(f"there is no domain {name!r}; there are {', '.join(domains)}")
        try:
            mix[name] = float(share or 1)
        except ValueError:
            raise ConfigError(f"the share of {name!r} is not a number: {share!r}") from None
        if not 0 <= mix[name] < float("inf"):
            raise ConfigError(f"the share of {name!r} must be 0 or more, not {share}")
    if not any(mix.values()):
        raise ConfigError(f"all shares of {text!r} are 0")
    return mix


def parse_shifts(first: Mix, shifts: list[str], domains: tuple[str, ...]) -> DomainMix:
    """ "30:code=1": from second 30 on this mix. Raises ConfigError."""
    phases = [(0.0, first)]
    for shift in shifts:
        at, found, mix = shift.partition(":")
        try:
            seconds = float(at)
        except ValueError:
            found = ""
        if not found:
            raise ConfigError(f"--shift {shift!r} is not SECONDS:DOMAIN=SHARE,...")
        phases.append((seconds, parse_mix(mix, domains)))
    return DomainMix(phases=tuple(sorted(phases, key=lambda phase: phase[0])))


class Load:
    """The requests of one run. `next(now_s)` gives the next one; None when there is none left."""

    def __init__(
        self,
        prompts: Prompts,
        mix: DomainMix,
        output_tokens: tuple[int, int],
        seed: int,
        rate: float | None = None,
    ) -> None:
        """rate: requests a second, with exponential times between them; None: a closed loop."""
        self._prompts, self._mix, self._output = prompts, mix, output_tokens
        self._draw = random.Random(f"{seed} load")
        self._rate = rate
        self._at_s = 0.0

    def next(self, now_s: float) -> Planned | None:
        at_s = None
        if self._rate is not None:
            self._at_s += self._draw.expovariate(self._rate)
            at_s = now_s = self._at_s
        domain = self._mix.draw(now_s, self._draw)
        return Planned(
            at_s=at_s,
            domain=domain,
            prompt=self._prompts.draw(domain),
            max_tokens=self._draw.randint(*self._output),
        )


class Trace:
    """Requests recorded before; the same interface as `Load`.

    A JSON-lines file: {"at_s", "max_tokens", and "prompt" or "domain"}; in order of time.
    """

    def __init__(self, path: str, prompts: Prompts, speed: float = 1.0) -> None:
        """speed: 2 replays in half the time. Raises ConfigError naming the line."""
        self._planned = iter(sorted(_read(path, prompts, speed), key=lambda one: one.at_s or 0.0))

    def next(self, now_s: float) -> Planned | None:
        return next(self._planned, None)


def _read(path: str, prompts: Prompts, speed: float) -> Iterator[Planned]:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            domain = str(value.get("domain", prompts.domains[0]))
            prompt = value["prompt"] if "prompt" in value else prompts.draw(domain)
            at_s, max_tokens = float(value["at_s"]), int(value["max_tokens"])
            if not isinstance(prompt, str) or not prompt or max_tokens < 1 or not at_s >= 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f'{path}, line {number}: expected {{"at_s": seconds, "max_tokens": n, '
                f'"prompt": text}}, or "domain" (one of {", ".join(prompts.domains)})'
            ) from None
        yield Planned(at_s=at_s / speed, domain=domain, prompt=prompt, max_tokens=max_tokens)
