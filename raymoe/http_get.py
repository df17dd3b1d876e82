"""Asking a running endpoint, for the command line."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any

from raymoe.errors import ConfigError


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """--host, --port and --url."""
    parser.add_argument("--host", default="127.0.0.1", help="address of the endpoint")
    parser.add_argument("--port", type=int, default=8000, help="port of the endpoint")
    parser.add_argument("--url", help="the endpoint with its route prefix, instead of both")


def endpoint_of(args: argparse.Namespace) -> str:
    """The URL that every path is put after."""
    url: str = args.url or f"http://{args.host}:{args.port}"
    return url.rstrip("/")


def get_json(url: str, timeout_s: float = 10.0) -> Any:
    """Raises ConfigError when nobody answers, or with what was said instead."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        raise ConfigError(f"{url} said {e.code}: {e.read()[:300].decode(errors='replace')}") from e
    except (urllib.error.URLError, OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        raise ConfigError(
            f"no raymoe answers at {url} ({reason}): is it serving, on this port?"
        ) from e
