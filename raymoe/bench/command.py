"""One run of `raymoe bench`, from its arguments to its results."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from raymoe.bench.faults import Faults, parse_fault
from raymoe.bench.load import Load, Trace, parse_mix, parse_shifts
from raymoe.bench.measure import by_second, parse_objective, summary, ttft
from raymoe.bench.profile import profile
from raymoe.bench.prompts import Prompts, read_prompts
from raymoe.bench.run import Record, Run, RunConfig, Source
from raymoe.bench.sse import BadAnswer, Endpoint, get_json
from raymoe.errors import ConfigError

_PROGRESS_S = 1.0
_BEAT_S = 1.5  # routers report to /status once a second
_BEATS = 4


def check(args: argparse.Namespace) -> None:
    """What depends on several arguments. Raises ConfigError saying what to do."""
    if sum(value is not None for value in (args.streams, args.rate, args.trace)) > 1:
        raise ConfigError("--streams, --rate and --trace exclude each other")
    if args.model_dir is not None and args.url is not None:
        raise ConfigError("give either MODEL_DIR or --url")
    if args.model_dir is None and any((args.groups, args.routers, args.config)):
        raise ConfigError("--groups, --routers and --config need MODEL_DIR")
    for name in ("streams", "rate", "seconds", "requests", "speed", "timeout_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name in ("prompt_words", "output_tokens"):
        low, high = _range(getattr(args, name), name)
        if not 1 <= low <= high:
            raise ConfigError(f"--{name.replace('_', '-')} must be N or LEAST MOST, from 1 on")
    if args.warmup < 0 or args.shared_words < 0:
        raise ConfigError("--warmup and --shared-words must be 0 or more")
    _fields(args)
    for text in args.fault:
        parse_fault(text)
    if args.objective:
        parse_objective(args.objective)


async def measure(
    args: argparse.Namespace, url: str, api_key: str | None, admin_token: str | None
) -> dict[str, Any]:
    """Warms up, runs, and returns everything a report needs. Raises ConfigError."""
    endpoint = Endpoint.of(url, api_key)
    objective = parse_objective(args.objective) if args.objective else None
    source = _source(args)
    model = args.model or await _first_model(endpoint)
    config = _config(args, model)
    planned = [parse_fault(text) for text in args.fault]
    faults = Faults(endpoint, planned, _say, admin_token)
    await faults.check()
    await _warm_up(args, endpoint, config)
    before = await _standing(endpoint) if args.profile else None
    run, records = await _run(endpoint, config, source, faults, quiet=args.json)
    found = {
        "model": model,
        "url": endpoint.url,
        "summary": summary(records, run.seconds, objective),
        "domains": {
            domain: _short(summary([one for one in records if one.domain == domain], run.seconds))
            for domain in sorted({one.domain for one in records})
        },
        "faults": faults.done,
        "series": by_second(records, run.seconds),
        "requests": [_request(one) for one in records],
    }
    if before is not None:
        found["profile"] = profile(before, await _standing(endpoint))
    return found


async def _run(
    endpoint: Endpoint, config: RunConfig, source: Source, faults: Faults, quiet: bool
) -> tuple[Run, Sequence[Record]]:
    tasks: list[asyncio.Task[None]] = []

    def begin() -> None:
        tasks.append(asyncio.create_task(faults.run(lambda: run.now_s)))
        if not quiet:
            tasks.append(asyncio.create_task(_progress(run)))

    run = Run(endpoint, config, source, begin)
    try:
        records = await run.run()
    finally:
        for task in tasks:
            task.cancel()
        failed = await asyncio.gather(*tasks, return_exceptions=True)
    for one in failed:
        if isinstance(one, Exception):
            raise one
    return run, records


async def _progress(run: Run) -> None:
    """A line a second to stderr; over itself on a terminal."""
    seen, end = 0, "\r" if sys.stderr.isatty() else "\n"
    while True:
        await asyncio.sleep(_PROGRESS_S)
        chunks = sum(len(one.chunk_s) for one in run.records)
        failed = sum(one.error is not None for one in run.records)
        done = len(run.records) - run.running
        print(
            f"{run.now_s:6.0f} s  {run.running:4} under way  {done:6} done  {failed:4} failed  "
            f"{(chunks - seen) / _PROGRESS_S:8.0f} chunks/s",
            end=end,
            file=sys.stderr,
            flush=True,
        )
        seen = chunks


def _source(args: argparse.Namespace) -> Source:
    given = read_prompts(args.prompts) if args.prompts else None
    words = _range(args.prompt_words, "prompt_words")
    prompts = Prompts(args.seed, words, args.shared_words, given)
    if args.trace is not None:
        return Trace(args.trace, prompts, args.speed)
    first = parse_mix(args.mix, prompts.domains)
    mix = parse_shifts(first, args.shift, prompts.domains)
    output = _range(args.output_tokens, "output_tokens")
    return Load(prompts, mix, output, args.seed, args.rate)


def _config(args: argparse.Namespace, model: str) -> RunConfig:
    closed = args.rate is None and args.trace is None
    seconds = args.seconds
    if seconds is None and args.requests is None and args.trace is None:
        seconds = 30.0
    return RunConfig(
        model=model,
        chat=args.chat,
        streams=(args.streams or 8) if closed else None,
        duration_s=seconds,
        requests=args.requests,
        timeout_s=args.timeout_s,
        fields=_fields(args),
    )


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    fields: dict[str, Any] = {"temperature": args.temperature}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    if args.body:
        try:
            fields.update(json.loads(args.body))
        except (ValueError, TypeError):
            raise ConfigError(f"--body is not a JSON object: {args.body}") from None
    return fields


def _range(values: list[int], name: str) -> tuple[int, int]:
    if len(values) > 2:
        raise ConfigError(f"--{name.replace('_', '-')} takes one or two numbers")
    return values[0], values[-1]


async def _first_model(endpoint: Endpoint) -> str:
    try:
        return str((await get_json(endpoint, "/v1/models"))["data"][0]["id"])
    except (BadAnswer, OSError, LookupError, TypeError) as error:
        raise ConfigError(f"no OpenAI endpoint answers at {endpoint.url}: {error}") from None


async def _warm_up(args: argparse.Namespace, endpoint: Endpoint, config: RunConfig) -> None:
    """Raises ConfigError when the endpoint refuses what is going to be sent."""
    prompts = Prompts(args.seed + 1, _range(args.prompt_words, "prompt_words"))
    mix = parse_shifts(parse_mix(None, prompts.domains), [], prompts.domains)
    load = Load(prompts, mix, _range(args.output_tokens, "output_tokens"), args.seed)
    if not args.warmup:
        return
    changed = {"streams": min(args.warmup, 8), "requests": args.warmup, "duration_s": None}
    run = Run(endpoint, RunConfig(**{**vars(config), **changed}), load, lambda: None)
    wrong = next((one.error for one in await run.run() if one.error), None)
    if wrong is not None:
        raise ConfigError(f"{endpoint.url} does not serve these requests: {wrong}")


async def _standing(endpoint: Endpoint) -> dict[str, Any]:
    """The routers' totals once they no longer change, as far as others let them stand still."""
    status = await _profile_status(endpoint)
    for _ in range(_BEATS):
        await asyncio.sleep(_BEAT_S)
        last, status = status, await _profile_status(endpoint)
        if _steps(status) == _steps(last):
            break
    return status


def _steps(status: dict[str, Any]) -> dict[str, int]:
    return {one["id"]: one["profile"]["steps"] for one in status["routers"]}


async def _profile_status(endpoint: Endpoint) -> dict[str, Any]:
    try:
        status = await get_json(endpoint, "/status")
        if all("profile" in one for one in status["routers"]):
            return dict(status)
    except (BadAnswer, OSError, LookupError, TypeError):
        pass
    raise ConfigError(f"--profile needs a raymoe deployment, and {endpoint.url} is none")


def _short(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: found[name] for name in ("requests", "failed", "output_tokens", "ttft_s", "tpot_s")
    }


def _request(record: Record) -> dict[str, Any]:
    return {
        "sent_s": record.sent_s,
        "ttft_s": ttft(record) if record.chunk_s else None,
        "failed": record.error is not None,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
