"""`raymoe serve --engine vllm`, as a user starts it: one deployment for everything."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from raymoe.gateway.tokenizer import GatewayTokenizer
from tests.e2e.conftest import DEMO, Deployment, run_raymoe
from tests.e2e.traffic import Client, Wave
from tests.engine.support import local_engine, request

PROMPTS = ["In the", "She said that", "The old man", "One day a small", "When the rain", "It was"]
TOKENS = 48
NEAR_TIE = 1e-4

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """Greedy texts of the embedded engine, of prompts without a near tie."""
    tokenizer = GatewayTokenizer.load(str(DEMO))
    engine = local_engine(DEMO, block_tokens=16, chunk_tokens=64, kv_bytes=1 << 28)
    texts = {}
    for prompt in PROMPTS:
        engine.add(request(prompt, tokenizer.encode(prompt), max_tokens=TOKENS, logprobs=2))
        events = []
        while engine.has_work:
            events += engine.step()
        tops = [one.top for event in events for one in event.logprobs]
        if min(top[0][1] - top[1][1] for top in tops) > NEAR_TIE:
            texts[prompt] = tokenizer.decode([t for e in events for t in e.token_ids])
    assert len(texts) >= 3
    return texts


@pytest.fixture(scope="module", autouse=True)
def before() -> set[str]:
    """What was there before the deployment was."""
    return _traces()


@pytest.fixture(scope="module")
def deployment(before: set[str]) -> Iterator[Deployment]:
    """Started once, as without this folder's settings of vLLM; the last test stops it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VLLM_")]:
            patch.delenv(name)
        running = Deployment(str(DEMO), "--engine", "vllm")
    try:
        running.wait_ready()
        yield running
    finally:
        if running.process.poll() is None:
            tree = running.tree()
            running.process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(tree, timeout=60)
            for process in alive:
                process.kill()


def test_streams_are_those_of_the_embedded_engine(
    deployment: Deployment, reference: dict[str, str]
) -> None:
    client = Client(deployment)
    with Wave(client, list(reference), TOKENS) as wave:
        pass
    assert wave.texts() == list(reference.values())


def test_a_killed_group_changes_no_token(deployment: Deployment, reference: dict[str, str]) -> None:
    """Its experts are away until the controller has restored them; the step waits."""
    client = Client(deployment)
    killed = deployment.get("/status")["groups"][0]
    with Wave(client, list(reference), TOKENS) as wave:
        os.kill(killed["pid"], signal.SIGKILL)
    assert wave.texts() == list(reference.values())


def test_the_same_seed_gives_the_same_text(deployment: Deployment) -> None:
    client = Client(deployment, temperature=1.0, seed=11, frequency_penalty=0.4)
    one, two = client.ask(PROMPTS[0], 24), client.ask(PROMPTS[0], 24)
    assert one == two != client.ask(PROMPTS[0], 24, seed=12)


def test_an_answer_of_an_asked_for_form(deployment: Deployment) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "A number"}],
        "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        "seed": 1,
    }
    asked = urllib.request.Request(
        deployment.url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=120) as answer:
        choice = json.load(answer)["choices"][0]
    assert choice["finish_reason"] in ("stop", "length")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"])["n"], int)


def test_a_stream_that_is_left_ends_in_the_router(deployment: Deployment) -> None:
    client = openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", timeout=120)
    stream = client.completions.create(
        model="demo", prompt="In the", max_tokens=1500, stream=True, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 120
    while _running(deployment):
        assert time.monotonic() < end, "it still runs"
        time.sleep(0.3)


def _running(deployment: Deployment) -> float:
    with urllib.request.urlopen(deployment.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("raymoe_num_requests_running")]
    assert found, "no such metric"
    return sum(float(line.split()[-1]) for line in found)


def test_status(deployment: Deployment) -> None:
    done = run_raymoe("status", "--port", str(deployment.port), "--json")
    (router,) = json.loads(done.stdout)["routers"]
    assert router["state"] == "ready"
    assert router["profile"]["steps"] > 0 and router["profile"]["kv_blocks"] > 0
    assert router["profile"]["batches"] > 0


def test_what_a_killed_router_had_is_removed_by_the_next(
    before: set[str], deployment: Deployment
) -> None:
    """Otherwise it would be some 400 MB of shared memory each time."""
    old = _traces() - before
    assert old, "vLLM's processes have made nothing: is there anything to remove?"
    (killed,) = deployment.get("/status")["routers"]
    os.kill(killed["pid"], signal.SIGKILL)
    end = time.monotonic() + 240
    while not _ready_routers(deployment) - {killed["pid"]}:
        assert time.monotonic() < end, "no other router came"
        time.sleep(0.5)
    assert not old & _traces()
    assert Client(deployment).ask(PROMPTS[0], 4)


def _ready_routers(deployment: Deployment) -> set[int]:
    """Their process ids."""
    try:
        routers = deployment.get("/status")["routers"]
    except OSError:
        return set()
    return {router["pid"] for router in routers if router["state"] == "ready"}


def test_a_clean_end(before: set[str], deployment: Deployment) -> None:
    """The last test: it stops the deployment, which must leave nothing."""
    deployment.stop()
    assert _traces() <= before


def _traces() -> set[str]:
    """What vLLM's processes have on this machine beside memory of their own."""
    found = [*Path("/tmp").glob("vllm_dist_*"), *Path("/dev/shm").glob("psm_*")]
    return {str(path) for path in found}
