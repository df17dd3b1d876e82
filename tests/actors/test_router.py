"""The router actor's class without Ray: a real engine over real groups, asked by a gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import router as module
from actors.router import Router
from actors.router_scaling import REQUESTS
from raymoe.config import parse_config
from raymoe.errors import RaymoeError
from raymoe.gateway import PoolConfig, RouterPool
from raymoe.identity import identity_of
from raymoe.requests import TokenEvent
from raymoe.stream.messages import StreamEndpoint
from tests.engine.support import local_engine, prompt, request
from tests.vllm.group_process import NODE, SECRET
from tests.vllm.groups import Fleet
from tests.zoo import tiny_checkpoint

TOKENS = 12


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model = tiny_checkpoint("qwen3_moe", Path(tmp_path_factory.mktemp("checkpoint")))
    fleet = Fleet(model, {"a": lambda _, e: e % 2 == 0, "b": lambda _, e: e % 2 == 1})
    yield fleet
    fleet.close()


@pytest.fixture
def beats(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the controller hears of the router; the rest of Ray is a stand-in."""
    heard: list[dict[str, Any]] = []
    controller = SimpleNamespace(
        router_beat=SimpleNamespace(remote=heard.append),
        control_address=SimpleNamespace(remote=lambda: fleet.control.address),
    )
    context = SimpleNamespace(get_node_id=lambda: NODE)
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(module.ray, "get", lambda value, timeout: value)
    monkeypatch.setattr(module, "ensure_controller", lambda *_: None)
    monkeypatch.setattr(module, "find_controller", lambda _: controller)
    monkeypatch.setenv("RAYMOE_SECRET", SECRET)
    return heard


def test_a_router_answers_a_gateway_and_says_when_its_engine_is_gone(
    fleet: Fleet, beats: list[dict[str, Any]]
) -> None:
    config = parse_config(
        {
            "model": fleet.spec.path,
            "routers": {"kv_bytes": 1 << 22},
            "logging": {"requests": True},
        },
        source="test",
    )
    router = Router(config.model_dump(mode="json"), fleet.spec.to_json())
    try:
        end = time.monotonic() + 60
        while not beats:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert beats[-1]["state"] == "ready" and beats[-1]["profile"]["kv_blocks"] > 0
        asked = prompt(9)
        endpoint = StreamEndpoint.from_dict(beats[-1]["endpoint"])
        events = asyncio.run(ask(endpoint, config, fleet, asked))
        made = [token for event in events for token in event.token_ids]
        alone = local_engine(Path(fleet.spec.path))
        alone.add(request(prompt_ids=asked, max_tokens=TOKENS))
        right: list[int] = []
        while alone.has_work:
            right += [token for event in alone.step() for token in event.token_ids]
        assert made == right and events[-1].finish == "length"
        router.check_health()
        router._engine.died = "for a test"
        with pytest.raises(RuntimeError, match="died: for a test"):
            router.check_health()
        assert router._info()["state"] == "failed"
        router._engine.died = None
        assert asyncio.run(router.record_autoscaling_stats()) == {REQUESTS: 0}
        ending = router.__del__()  # as Ray Serve ends it
        assert ending is not None
        asyncio.run(ending)
        assert [beat["state"] for beat in beats][-1] == "gone" and router.__del__() is None
        assert "draining" in [beat["state"] for beat in beats]
    finally:
        if not router._stopping.is_set():
            router.close()


async def ask(
    endpoint: StreamEndpoint, config: Any, fleet: Fleet, asked: tuple[int, ...]
) -> list[TokenEvent]:
    """All events of one request."""
    pool = RouterPool(
        lambda: [endpoint],
        identity=identity_of(config, fleet.spec),
        secret=SECRET.encode(),
        node=NODE,
        config=PoolConfig(poll_s=0.05),
    )
    await pool.start()
    ended = asyncio.get_running_loop().create_future()
    events: list[TokenEvent] = []

    def deliver(event: TokenEvent) -> None:
        events.append(event)
        if event.finish is not None:
            ended.set_result(None)

    def fail(error: RaymoeError) -> None:
        ended.set_exception(error)

    try:
        pool.open(request("one", prompt_ids=asked, max_tokens=TOKENS), deliver, fail)
        await asyncio.wait_for(ended, 60)
    finally:
        await pool.close()
    return events
