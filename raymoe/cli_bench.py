"""`raymoe bench`: load on an OpenAI endpoint, faults in a local deployment, a report."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from raymoe.errors import ConfigError


def add_bench_parser(subparsers: Any) -> None:
    """Adds `raymoe bench`."""
    parser = subparsers.add_parser(
        "bench", help="put load on an OpenAI endpoint and report what came of it"
    )
    parser.add_argument(
        "model_dir", nargs="?", metavar="MODEL_DIR", help="start a deployment of it for the run"
    )
    parser.add_argument("--url", help="the endpoint (default http://127.0.0.1:8000)")
    parser.add_argument("--groups", type=int, help="expert groups of the started deployment")
    parser.add_argument("--routers", type=int, help="its routers")
    parser.add_argument("--config", metavar="FILE", help="its settings")
    parser.add_argument("--api-key", help="default: the environment's OPENAI_API_KEY")
    parser.add_argument("--model", help="name of the model (default: the endpoint's first)")
    _add_load(parser)
    _add_report(parser)
    parser.set_defaults(run=run_bench)


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load (one of --streams, --rate, --trace)")
    load.add_argument("--streams", type=int, help="closed loop: as many at once (default 8)")
    load.add_argument("--rate", type=float, help="open loop: Poisson arrivals, requests a second")
    load.add_argument("--trace", metavar="FILE.jsonl", help="replay: at_s, max_tokens, prompt")
    load.add_argument("--speed", type=float, default=1.0, help="of the replay (default 1)")
    load.add_argument("--seconds", type=float, help="send for so long (default 30)")
    load.add_argument("--requests", type=int, help="send so many")
    load.add_argument("--warmup", type=int, default=2, help="requests before, not counted")
    load.add_argument("--prompt-words", type=int, nargs="+", default=[16, 96], metavar="N")
    load.add_argument("--shared-words", type=int, default=0, help="the same in all of a domain")
    load.add_argument("--output-tokens", type=int, nargs="+", default=[64], metavar="N")
    load.add_argument("--prompts", metavar="FILE.jsonl", help="own prompts: prompt, domain")
    load.add_argument("--mix", help="domains, e.g. prose=3,code=1 (default: all alike)")
    load.add_argument("--shift", action="append", default=[], metavar="AT:MIX")
    load.add_argument("--chat", action="store_true", help="chat completions")
    load.add_argument(
        "--ignore-eos", action="store_true", help="always --output-tokens (not OpenAI's)"
    )
    load.add_argument("--temperature", type=float, default=0.0)
    load.add_argument("--body", metavar="JSON", help="more fields of every request")
    load.add_argument("--timeout-s", type=float, default=600.0, help="of one request")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="AT:KIND:TARGET[:FOR[:SHARE]]",
        help="kill, stop, slow or drain a group, a router or the controller of a local deployment",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    report = parser.add_argument_group("report")
    report.add_argument("--objective", help="for goodput, e.g. ttft=0.5,tpot=0.05 (seconds)")
    report.add_argument(
        "--profile", action="store_true", help="where the routers' steps spend time"
    )
    report.add_argument("--html", metavar="FILE", help="write a page")
    report.add_argument("--json", action="store_true", help="print only the last line, JSON")


def run_bench(args: argparse.Namespace) -> int:
    """0 when every request was answered in full, 1 when some failed."""
    from raymoe.bench.command import check, measure

    check(args)
    with _deployment(args) as url:
        key = args.api_key or os.environ.get("OPENAI_API_KEY")
        token = os.environ.get("RAYMOE_ADMIN_TOKEN")  # as `raymoe drain` takes it
        try:
            results = asyncio.run(measure(args, url, key, token))
        except KeyboardInterrupt:
            print("raymoe: interrupted, nothing to report", file=sys.stderr)
            return 130
    arguments = {
        name: value for name, value in vars(args).items() if name not in ("run", "api_key")
    }
    if args.html:
        from raymoe.bench.page import as_page

        title = f"raymoe bench: {results['model']}"
        try:
            Path(args.html).write_text(as_page(results, title, arguments), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {args.html}: {error}") from None
    if not args.json:
        from raymoe.bench.report import as_text

        print(as_text(results), flush=True)
    kept = {name: value for name, value in results.items() if name not in ("requests", "series")}
    print(json.dumps({"benchmark": "bench", "arguments": arguments, "results": kept}), flush=True)
    return 1 if results["summary"]["failed"] else 0


@contextmanager
def _deployment(args: argparse.Namespace) -> Iterator[str]:
    """The endpoint's address; with MODEL_DIR that of a `raymoe serve` for the time of the run."""
    if args.model_dir is None:
        yield args.url or "http://127.0.0.1:8000"
        return
    import signal
    import socket
    import subprocess
    import threading

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "raymoe.cli", "serve", args.model_dir, "--port", str(port)]
    for name in ("groups", "routers", "config"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name}", str(value)]
    serve = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert serve.stdout is not None
    try:
        for line in serve.stdout:
            print(line, end="", file=sys.stderr)
            if line.startswith("ready:"):
                break
        else:
            raise ConfigError("raymoe serve ended before it was ready")
        threading.Thread(target=_copy, args=(serve.stdout,), daemon=True).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        if serve.poll() is None:
            serve.send_signal(signal.SIGINT)
            serve.wait(timeout=90)


def _copy(lines: IO[str]) -> None:
    """What the deployment still says; unread it would stop at a full pipe."""
    for line in lines:
        print(line, end="", file=sys.stderr)
