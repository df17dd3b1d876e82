"""What `raymoe serve` prints, and the one sentence made of a long error text."""

from __future__ import annotations

import re
from collections.abc import Iterable

from raymoe.config import DeploymentConfig

_OURS = re.compile(r"^\s*(?:\S*\s)?(?:raymoe|placement)\.errors\.(\w+): (.+)$", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Trying again does not help against these.
_LASTING = ("ConfigError", "CheckpointError", "HandshakeRefused", "PlacementError")


def say(line: str) -> None:
    """One line on standard output, at once."""
    print(line, flush=True)


def base_url(config: DeploymentConfig) -> str:
    """Where the endpoint's routes begin, without a slash at the end."""
    host = config.gateway.host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    where = f"http://{f'[{host}]' if ':' in host else host}:{config.gateway.port}"
    return where + config.gateway.route_prefix.rstrip("/")


def announce(config: DeploymentConfig, seconds: float) -> None:
    """Says that the endpoint answers, and how to ask it."""
    url, model = base_url(config), config.served_model_name
    say(f"ready: {url}/v1  model {model!r}  ({seconds:.1f} s)")
    say("try:")
    say(
        f"  curl {url}/v1/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "prompt": "In the beginning", "max_tokens": 32}}\''
    )


def lasting_error(messages: Iterable[str]) -> str | None:
    """The sentence of the last error of ours in Serve's messages that a new try cannot mend."""
    for message in messages:
        for kind, sentence in reversed(_OURS.findall(_COLOUR.sub("", message))):
            if kind in _LASTING:
                return str(sentence).strip()
    return None


def last_sentence(messages: Iterable[str]) -> str:
    """The last error of ours in Serve's messages, else the last line of the first that has any."""
    plain = [_COLOUR.sub("", message) for message in messages]
    for message in plain:
        found = _OURS.findall(message)
        if found:
            return str(found[-1][1]).strip()
    lines = [line.strip() for message in plain for line in message.splitlines() if line.strip()]
    first = [line.strip() for line in (plain[0] if plain else "").splitlines() if line.strip()]
    return first[-1] if first else (lines[-1] if lines else "no reason given")
