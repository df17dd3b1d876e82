"""The command line: `raymoe serve`, what operators ask of it, and `plan`, `simulate`, `bench`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from placement.errors import PlacementError
from raymoe import __version__
from raymoe.errors import RaymoeError

MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 when it did what was asked, 2 with one sentence when it could not."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["serve"]:
        _on_signals(_leave_at_once)  # before the slow imports, which begin with the parser
    args = _parser().parse_args(words)
    try:
        return int(args.run(args))
    except (RaymoeError, PlacementError) as e:
        print(f"raymoe: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    from raymoe.cli_admin import add_admin_parsers
    from raymoe.cli_bench import add_bench_parser
    from raymoe.cli_explain import add_explain_parser
    from raymoe.cli_plan import add_plan_parser
    from raymoe.cli_record import add_record_parser
    from raymoe.cli_simulate import add_simulate_parser
    from raymoe.cli_top import add_top_parser

    parser = argparse.ArgumentParser(
        prog="raymoe", description="Elastic serving of Mixture-of-Experts models on Ray."
    )
    parser.add_argument("--version", action="version", version=f"raymoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_status(commands)
    add_top_parser(commands)
    add_explain_parser(commands)
    add_admin_parsers(commands)
    add_record_parser(commands)
    add_plan_parser(commands)
    add_simulate_parser(commands)
    add_bench_parser(commands)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="serve a checkpoint on an OpenAI-compatible endpoint")
    serve.add_argument(
        "model", nargs="?", metavar="MODEL_DIR", help="checkpoint folder or Hugging Face id"
    )
    serve.add_argument("--config", metavar="FILE", help="settings, YAML or JSON (flags win)")
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000)")
    serve.add_argument("--groups", type=int, help="expert groups (default 2)")
    serve.add_argument("--routers", type=int, help="routers that share the groups (default 1)")
    serve.add_argument(
        "--engine", help="what runs the dense part: embedded (default) or vllm (docs/vllm.md)"
    )
    serve.add_argument("--name", help="deployment name (default raymoe)")
    serve.add_argument("--model-name", help="name in /v1/models (default: the folder's name)")
    serve.add_argument("--address", help="Ray cluster to join (default: start Ray here)")
    serve.add_argument("--log-format", choices=("text", "json"), help="of our processes' logs")
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    serve.add_argument(
        "--log-requests", action="store_const", const=True, help="log each request's way"
    )
    serve.add_argument("--log-folder", metavar="DIR", help="write a log file a process there")
    serve.set_defaults(run=_serve)


def _add_status(commands: Any) -> None:
    status = commands.add_parser("status", help="show a running deployment")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.add_argument("--host", default="127.0.0.1", help="address of the endpoint")
    status.add_argument("--port", type=int, default=8000, help="port of the endpoint")
    status.set_defaults(run=_status)


def _serve(args: argparse.Namespace) -> int:
    from raymoe.config import load_config

    flags = {
        "model": args.model,
        "gateway.host": args.host,
        "gateway.port": args.port,
        "groups": args.groups,
        "routers.count": args.routers,
        "engine": args.engine,
        "name": args.name,
        "gateway.model_name": args.model_name,
        "ray.address": args.address,
        "logging.format": args.log_format,
        "logging.level": args.log_level,
        "logging.requests": args.log_requests,
        "logging.folder": args.log_folder and os.path.abspath(args.log_folder),
    }
    config = load_config(args.config, {k: v for k, v in flags.items() if v is not None})

    from raymoe.budget import check_budgets
    from raymoe.checkpoint.reader import read_spec
    from raymoe.gateway.tokenizer import GatewayTokenizer

    spec = read_spec(config.model, compute_dtype=config.experts_dtype)
    check_budgets(config, spec)
    GatewayTokenizer.load(spec.path)  # said here in a sentence, and not by a replica of Ray Serve
    if config.engine == "vllm" and config.ray.address is None:
        from raymoe.vllm_plugin.engine import check_installed

        check_installed(spec)
    total = sum(b * e for b, e in zip(spec.expert_bytes, spec.experts_of_layer, strict=True))
    summary = (
        f"{config.served_model_name} ({spec.family}): {spec.layers} MoE layers x {spec.experts} "
        f"experts, top-{spec.top_k}, {total / MIB:.1f} MiB of experts"
    )
    # The composition root is above everything; only the command line may reach up to it.
    import serve_app
    from actors.launch import launch

    stop = threading.Event()
    _on_signals(stop.set)  # from here on there is something to take down
    return launch(config, spec.to_json(), summary, serve_app.application, stop)


def _on_signals(act: Callable[[], None]) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: act())


def _leave_at_once() -> None:
    """While modules are imported and the checkpoint is read nothing runs that is to be ended.

    An exception would come up anywhere inside these imports, and be swallowed by some.
    """
    os._exit(0)


def _status(args: argparse.Namespace) -> int:
    from raymoe.http_get import get_json

    status = get_json(f"http://{args.host}:{args.port}/status")
    if args.json:
        print(json.dumps(status))
        return 0
    print(
        f"{status['model']} ({status['family']})  deployment {status['deployment']}  "
        f"epoch {status['epoch']}  balancedness {_shown(status['balancedness'])}"
    )
    if status.get("problem"):
        print(f"PROBLEM: {status['problem']}")
    print(
        f"{'group':12} {'state':9} {'pid':>8} {'speed':>6} {'replicas':>8} {'resident':>10}  node"
    )
    for g in status["groups"]:
        print(
            f"{g['id']:12} {g['state']:9} {g['pid']:8} {g['speed']:6.2f} {g['replicas']:8} "
            f"{g['resident_bytes'] / MIB:6.1f} MiB  {g['node'][:12]}"
        )
        if g["last_error"]:
            print(f"{'':12} {g['last_error']}")
    for r in status["routers"]:
        print(f"{r['id']:12} {r['state']:9} {r['pid']:8}  router")
    print(f"{'controller':12} {status['controller']['state']:9} {status['controller']['pid']:8}")
    return 0


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
