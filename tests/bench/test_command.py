"""`raymoe bench` as users call it, against a gateway over a fake router."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from raymoe.bench.load import Planned
from raymoe.bench.run import Record, Run, RunConfig
from raymoe.cli import main
from raymoe.errors import Overloaded
from tests.bench.test_sse import server
from tests.gateway.conftest import Served, routers_of, served, wait_for
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = list(TOKENIZER.encode("a b c d e f g h i j"))


@pytest.fixture(scope="module")
def router() -> Iterator[FakeRouter]:
    fake = FakeRouter(lambda request: WORDS * 20, vocab=355, context_tokens=4000)
    with routers_of(fake) as (router,):
        yield router


@pytest.fixture(scope="module")
def gateway(router: FakeRouter) -> Iterator[Served]:
    with served([router], TOKENIZER, max_in_flight=4) as running:
        yield running


def bench(capsys: pytest.CaptureFixture[str], url: str, *more: str) -> tuple[int, dict[str, Any]]:
    code = main(["bench", "--url", url, *more])
    lines = capsys.readouterr().out.splitlines()
    if "--json" in more:
        assert len(lines) == 1
    return code, json.loads(lines[-1])["results"]


def test_a_closed_loop(
    capsys: pytest.CaptureFixture[str], gateway: Served, router: FakeRouter, tmp_path: Path
) -> None:
    router.seen.clear()
    page = tmp_path / "report.html"
    code, found = bench(
        capsys, gateway.url, "--streams", "3", "--requests", "12", "--warmup", "0",
        "--output-tokens", "5", "--mix", "code=1", "--html", str(page), "--objective", "e2e=60",
    )  # fmt: skip
    figures = found["summary"]
    assert code == 0
    assert (figures["requests"], figures["failed"], figures["output_tokens"]) == (12, 0, 60)
    assert figures["chunks_per_token"] == 1.0
    assert figures["objective_met"] == 12
    assert figures["prompt_tokens"] == sum(len(one.prompt_ids) for one in router.seen)
    assert set(found["domains"]) == {"code"}
    _check_page(page.read_text())


def _check_page(text: str) -> None:
    """Well-formed, whole, and nothing in it is loaded from elsewhere."""
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "line", "circle", "polyline"):
                opened.append(tag)
            assert tag not in ("script", "link", "img", "iframe")

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "circle", "polyline"):
                assert opened.pop() == tag

    Reader().feed(text)
    assert opened == []
    assert text.count("<svg") == 3 and text.count('class="dot"') == 12
    assert not re.search(r"(src|href)=|url\(|@import|NaN|nan", text)


def test_an_open_loop_counts_refused_requests_as_failed(
    capsys: pytest.CaptureFixture[str], gateway: Served, router: FakeRouter
) -> None:
    """The gateway takes four at once, and the router makes no token before it has refused one."""
    router.pause(True)

    def one_was_refused() -> bool:
        return 'status="429"' in httpx.get(gateway.url + "/metrics").text

    free = threading.Thread(target=lambda: (wait_for(one_was_refused), router.pause(False)))
    free.start()
    code, found = bench(
        capsys, gateway.url, "--rate", "1000", "--requests", "10", "--warmup", "0",
        "--output-tokens", "3", "--chat", "--json",
    )  # fmt: skip
    free.join()
    figures = found["summary"]
    assert code == 1
    assert figures["requests"] == 10
    assert 1 <= figures["failed"] == sum(figures["errors"].values()) <= 6
    assert all("status 429" in error for error in figures["errors"])
    assert figures["output_tokens"] == 3 * (10 - figures["failed"])


def test_a_trace_and_a_stream_that_breaks_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"at_s": 0.01 * n, "max_tokens": 4, "prompt": f"p{n}"} for n in range(5)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    failing = FakeRouter(lambda request: WORDS, vocab=355, context_tokens=4000)
    with routers_of(failing), served([failing], TOKENIZER) as running:
        code, found = bench(capsys, running.url, "--trace", str(trace), "--warmup", "0", "--json")
        assert (code, found["summary"]["output_tokens"]) == (0, 20)
        sent = [TOKENIZER.decode(request.prompt_ids) for request in failing.seen]
        assert sorted(sent) == [f"p{n}" for n in range(5)]
        failing.refuse = Overloaded("no")
        code, found = bench(capsys, running.url, "--trace", str(trace), "--warmup", "0", "--json")
        assert (code, found["summary"]["failed"]) == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--streams", "2", "--rate", "1"], "exclude each other"),
        (["--streams", "0"], "--streams must be above 0"),
        (["--prompt-words", "9", "3"], "--prompt-words"),
        (["--body", "["], "--body"),
        (["--objective", "x=1"], "--objective"),
        (["--fault", "1:eat:group"], "--fault"),
        (["--profile"], "--profile needs a raymoe deployment"),
        (["--fault", "1:kill:group"], "no raymoe deployment"),
        (["--model", "other"], "does not serve these requests: status 404"),
        (["--groups", "2"], "need MODEL_DIR"),
        (["--trace", "/nowhere"], "/nowhere"),
        (["--mix", "poetry=1"], "poetry"),
    ],
)
def test_bad_arguments_say_what_to_do(
    capsys: pytest.CaptureFixture[str], gateway: Served, arguments: list[str], said: str
) -> None:
    assert main(["bench", "--url", gateway.url, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_no_endpoint_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:9"]) == 2
    assert "no OpenAI endpoint answers" in capsys.readouterr().err


class Twice:
    """The same request two times."""

    def __init__(self, planned: Planned) -> None:
        self.left = [planned] * 2

    def next(self, now_s: float) -> Planned | None:
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("event", ["{", "[]", '{"usage": {}}', '{"choices": [1]}', '"x"'])
def test_a_server_that_talks_nonsense_fails_requests_not_the_run(event: str) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    answer += b"data: " + event.encode() + b"\n\n"

    async def main_() -> list[Record]:
        async with server(answer) as endpoint:
            planned = Planned(at_s=None, domain="a", prompt="x", max_tokens=1)
            source = Twice(planned)
            return await Run(endpoint, RunConfig(model="m", streams=1), source, lambda: None).run()

    found = asyncio.run(main_())
    assert len(found) == 2
    assert all(one.error is not None for one in found)
