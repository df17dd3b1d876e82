"""`raymoe top`: what the web page shows, live in a terminal. Plain ANSI; q or Ctrl-C ends it."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from raymoe.errors import ConfigError
from raymoe.http_get import add_endpoint, endpoint_of, get_json

MIB = 1 << 20
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # other screen, no cursor
_BARS = " ▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"


def add_top_parser(commands: Any) -> None:
    """The subcommand of `raymoe`."""
    top = commands.add_parser("top", help="live view of a deployment in the terminal")
    top.add_argument("--once", action="store_true", help="print it once, for scripts")
    top.add_argument("--layer", type=int, default=0, help="MoE layer whose experts are shown")
    top.add_argument("--interval-s", type=float, default=1.0, help="seconds between two looks")
    add_endpoint(top)
    top.set_defaults(run=_top)


def _top(args: argparse.Namespace) -> int:
    if args.layer < 0 or args.interval_s <= 0:
        raise ConfigError("--layer begins at 0, and --interval-s is more than 0")
    url, layer = endpoint_of(args), args.layer
    view = get_json(f"{url}/ui/view?layer={layer}")
    if layer >= max(view["layer_count"], 1):
        raise ConfigError(
            f"there is no MoE layer {layer}: {view['layer_count']} of them are placed"
        )
    if args.once:
        print("\n".join(screen(view, _size())))
        return 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("raymoe top needs a terminal: use --once in a script")
    with _keys() as fd:
        try:
            while True:
                _draw(screen(view, _size(), help_line=True))
                pressed = _pressed(fd, args.interval_s)
                if pressed in ("q", "Q", "\x03", "\x04"):
                    return 0
                step = {"n": 1, "p": -1, "\x1b[C": 1, "\x1b[D": -1}.get(pressed, 0)
                layer = min(max(layer + step, 0), max(view["layer_count"] - 1, 0))
                view = _next(url, layer, view)
        except KeyboardInterrupt:
            return 0


def _next(url: str, layer: int, last: Mapping[str, Any]) -> Mapping[str, Any]:
    """The next view, or the last one with what went wrong: a look that fails ends nothing."""
    try:
        view: Mapping[str, Any] = get_json(f"{url}/ui/view?layer={layer}", timeout_s=5.0)
    except ConfigError as e:
        return {**last, "trouble": str(e)}
    return view


def screen(view: Mapping[str, Any], size: tuple[int, int], *, help_line: bool = False) -> list[str]:
    """The lines, none longer than the terminal, and no more than it has.

    view: the answer of GET /ui/view; size: columns and rows.
    """
    columns, rows = size
    lines = [*_head(view), "", *_groups(view), "", *_experts(view, columns), "", "events:"]
    room = rows - len(lines) - help_line - ("trouble" in view)
    events = view["events"][-max(room, 1) :][::-1]
    lines += [f"  {_clock(e['at'])}  {e['kind']:8}{e['text']}" for e in events] or ["  none yet"]
    if "trouble" in view:
        lines.insert(0, f"what you see is old: {view['trouble']}")
    lines = lines[: rows - help_line]
    if help_line:
        lines.append("q: end   n, p or arrows: next, previous layer")
    return [line[:columns] for line in lines]


def _head(view: Mapping[str, Any]) -> Iterator[str]:
    status, history = view["status"], view["history"]
    now = history[-1] if history else {}
    yield (
        f"{status['model']} ({status['family']})  deployment {status['deployment']}  "
        f"epoch {status['epoch']}  {'ready' if status['ready'] else 'EXPERTS MISSING'}"
        + (f": {status['problem']}" if status.get("problem") else "")
    )
    yield (
        f"tokens/s {_number(now.get('tokens_per_s'))}  "
        f"first token p95 {_seconds(now.get('first_token_p95_s'))}  "
        f"between tokens p95 {_seconds(now.get('next_token_p95_s'))}  "
        f"balancedness {_number(status['balancedness'], 3)}  plans {view['plans']}"
    )
    rates = [point["tokens_per_s"] for point in history[-60:]]
    yield f"tokens/s, last {2 * len(rates)} s  {spark(rates)}"


def _groups(view: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{'group':10} {'state':9} {'pairs/s':>9} {'':12} {'MiB held':>14} {'speed':>6} "
        f"{'replicas':>8} {'queue':>6} {'answer':>8}"
    )
    most = max(view["group_load"].values(), default=0.0)
    for group in view["status"]["groups"]:
        load = view["group_load"].get(group["id"], 0.0)
        held = f"{group['resident_bytes'] / MIB:.0f}/{group['memory_bytes'] / MIB:.0f}"
        yield (
            f"{group['id'][:10]:10} {group['state'][:9]:9} {load:9.0f} {bar(load, most, 12)} "
            f"{held:>14} {group['speed']:6.2f} {group['replicas']:8} {group['queued_pairs']:6} "
            f"{_seconds(view['latency_s'].get(group['id'])):>8}"
        )
    for router in view["status"]["routers"]:
        profile = router["profile"]
        used = 100 * profile["kv_used_blocks"] / max(profile["kv_blocks"], 1)
        yield f"{router['id']}: {router['state']}, KV cache {used:.0f} %"


def _experts(view: Mapping[str, Any], columns: int) -> Iterator[str]:
    layer = view["layer"]
    balanced = view["layer_balancedness"].get(str(layer["index"]))
    yield (
        f"layer {layer['index']} of {view['layer_count']}: experts from left to right, darker is "
        f"more load; balancedness {_number(balanced, 3)}"
    )
    rows = list(zip(layer["load"], map(dict, layer["replicas"]), strict=True))
    most = max((load * share for load, shares in rows for share in shares.values()), default=0.0)
    for g, group in enumerate(layer["groups"]):
        cells = "".join(
            _cell(load * shares[g], most) if g in shares else "·" for load, shares in rows
        )
        room = max(columns - 12, 1)
        for at in range(0, max(len(cells), 1), room):
            yield f"{(group if at == 0 else '')[:10]:10} {cells[at : at + room]}"


def _cell(load: float, most: float) -> str:
    """A replica: ░ to █ by the square root of its load; never a blank."""
    return _SHADES[max(1, round(4 * (load / most) ** 0.5))] if most > 0 else _SHADES[1]


def bar(value: float, most: float, width: int) -> str:
    """A bar of `width` characters."""
    full = round(width * value / most) if most > 0 else 0
    return ("█" * full).ljust(width, "·")


def spark(values: list[float]) -> str:
    """One character a value, 0 to the largest."""
    most = max(values, default=0.0)
    return "".join(_BARS[round(8 * v / most) if most > 0 else 0] for v in values)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _size() -> tuple[int, int]:
    columns, rows = shutil.get_terminal_size((100, 40))
    return max(columns, 20), max(rows, 10)


def _draw(lines: list[str]) -> None:
    sys.stdout.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\r\n" for line in lines[:-1]))
    sys.stdout.write(f"{lines[-1]}{_CLEAR_LINE}{_CLEAR_BELOW}")
    sys.stdout.flush()


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """The terminal gives keys at once and shows another screen; all is put back in the end."""
    import termios
    import tty

    # Ctrl-C ends it also where whoever started us ignores the signal, as shells do for jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        sys.stdout.write(_ENTER)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _pressed(fd: int, timeout_s: float) -> str:
    """The key, if one comes in time."""
    ready, _, _ = select.select([fd], [], [], timeout_s)
    return os.read(fd, 8).decode(errors="replace") if ready else ""
