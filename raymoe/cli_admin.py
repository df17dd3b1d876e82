"""`raymoe scale | drain | pin | evict | dry-run | history`: what operators ask of a deployment."""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from raymoe.errors import ConfigError


def add_admin_parsers(commands: Any) -> None:
    """Adds these commands."""
    scale = commands.add_parser("scale", help="change how many expert groups serve")
    scale.add_argument("--groups", type=int, required=True, help="how many shall serve")
    scale.add_argument("--kind", help="of this kind (needed when there are several)")
    _add_common(scale)
    scale.set_defaults(run=_scale)

    drain = commands.add_parser("drain", help="empty an expert group, then end it")
    drain.add_argument("group", metavar="GROUP", help="its id, as `raymoe status` shows it")
    drain.add_argument("--undo", action="store_true", help="have it back")
    _add_common(drain)
    drain.set_defaults(run=_drain)

    for name, what in (("pin", "keep a replica on a group"), ("evict", "keep one off a group")):
        pin = commands.add_parser(name, help=f"{what}, whatever the planner would like")
        pin.add_argument("layer", type=int, metavar="LAYER", help="MoE layer, from 0")
        pin.add_argument("expert", type=int, metavar="EXPERT", help="expert of the layer, from 0")
        pin.add_argument("group", metavar="GROUP", help="its id, as `raymoe status` shows it")
        pin.add_argument("--undo", action="store_true", help="let the planner decide again")
        _add_common(pin)
        pin.set_defaults(run=_pin, path=f"/{name}")

    dry = commands.add_parser(
        "dry-run", help="would moving help? the plan that would be made now; nothing changes"
    )
    dry.add_argument("--horizon-s", type=float, metavar="S", help="copies must pay within this")
    dry.add_argument("--margin", type=float, metavar="PART", help="least gain over the price")
    dry.add_argument("--interval-bytes", type=int, metavar="N", help="most bytes to copy")
    dry.add_argument(
        "--without", action="append", default=[], metavar="GROUP", help="as if it were drained"
    )
    dry.add_argument("--json", action="store_true", help="print the answer as JSON")
    _add_address(dry)
    dry.set_defaults(run=_dry_run)

    history = commands.add_parser("history", help="show what the planner did, and why")
    history.add_argument("--json", action="store_true", help="print one JSON object")
    _add_address(history)
    history.set_defaults(run=_history)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address of the endpoint")
    parser.add_argument("--port", type=int, default=8000, help="port of the endpoint")


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_address(parser)
    parser.add_argument(
        "--token-file", metavar="FILE", help="admin token (default: RAYMOE_ADMIN_TOKEN)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _scale(args: argparse.Namespace) -> int:
    answer = _post(args, "/scale", {"groups": args.groups, "kind": args.kind})
    return _show(args, answer)


def _drain(args: argparse.Namespace) -> int:
    return _show(args, _post(args, "/drain", {"group": args.group, "undo": args.undo}))


def _pin(args: argparse.Namespace) -> int:
    body = {"layer": args.layer, "expert": args.expert, "group": args.group, "undo": args.undo}
    return _show(args, _post(args, args.path, body))


def _show(args: argparse.Namespace, answer: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps(answer))
        return 0
    for member in answer["members"]:
        what = f"draining ({member['draining']})" if member["draining"] else "to serve"
        print(f"{member['id']:12} {member['kind']:12} {what}")
    for pin in answer["pins"]:
        where = "stays on" if pin["keep"] else "stays off"
        print(f"layer {pin['layer']} expert {pin['expert']} {where} {pin['group']}")
    print("see `raymoe status` for how far it is")
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    named = ("horizon_s", "margin", "interval_bytes")
    body = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    answer = _post(args, "/placement/dry-run", {**body, "without": args.without})
    if args.json:
        print(json.dumps(answer))
        return 0
    print(answer["answer"])
    for reason in answer["reasons"]:
        print(f"  {reason}")
    return 0


def _history(args: argparse.Namespace) -> int:
    history = _ask(args, "/placement/history", None)
    if args.json:
        print(json.dumps(history))
        return 0
    for plan in history["plans"]:
        promised, realised = _percent(plan["promised"]), _percent(plan["realised"])
        print(
            f"{_clock(plan['at'])}  {plan['mode']} plan ({plan['trigger']}): {plan['loads']} "
            f"loads, {plan['drops']} drops, {plan['loaded_bytes'] / 1e6:.1f} MB; "
            f"promised {promised}, brought {realised}"
        )
        for reason in plan["reasons"][:3]:
            print(f"          {reason}")
    if not history["plans"]:
        print("no plan has changed anything yet")
    return 0


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def _post(args: argparse.Namespace, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return _ask(args, path, json.dumps(body).encode())


def _ask(args: argparse.Namespace, path: str, body: bytes | None) -> dict[str, Any]:
    """The answer of a route; raises ConfigError with what the server said."""
    url = f"http://{args.host}:{args.port}{path}"
    headers = {"content-type": "application/json"}
    token = _token(getattr(args, "token_file", None))
    if body is not None and token:
        headers["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as e:
        raise ConfigError(_said(e)) from e
    except (urllib.error.URLError, OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        raise ConfigError(
            f"no raymoe answers at {url} ({reason}): is it serving, on this port?"
        ) from e


def _said(error: urllib.error.HTTPError) -> str:
    text = error.read()[:2000].decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} said {error.code}: {text[:300]}"


def _token(path: str | None) -> str:
    if path is None:
        return os.environ.get("RAYMOE_ADMIN_TOKEN", "").strip()
    try:
        return Path(path).read_text().strip()
    except OSError as e:
        raise ConfigError(f"cannot read the token file {path}: {e.strerror}") from e
