"""The gRPC services over fake routers, through a real server and channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from raymoe.errors import ConfigError, RouterUnavailable
from raymoe.gateway import AppConfig, create_app
from raymoe.gateway.bodies import MAX_PARTS
from raymoe.rpc import raymoe_pb2 as pb
from raymoe.rpc.raymoe_pb2_grpc import GenerationStub, PlacementStub
from raymoe.rpc.server import RpcServer
from tests.gateway.conftest import pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
STATUS: dict[str, Any] = {
    "deployment": "d",
    "model": "tiny",
    "ready": True,
    "term": 1,
    "epoch": 9,
    "balancedness": None,
    "groups": [
        {"id": "g0", "kind": "default", "state": "ready", "node": "n", "speed": 0.5}
        | {"memory_bytes": 5 << 40, "resident_bytes": 7, "replicas": 3, "deaths": 1, "pid": 4}
    ],
    "routers": [{"id": "r", "state": "ready", "pid": 3}],
}
REPLICA = {"group": "g0", "share": 0.25, "since": 1e9, "why": "its load grew"}
PLACEMENT: dict[str, Any] = {
    "epoch": 9,
    "layers": [{"layer": 0, "experts": [{"expert": 0, "load": 2.5, "replicas": [REPLICA]}]}],
}


@asynccontextmanager
async def served(
    routers: list[FakeRouter], **settings: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, Any]]:
    """A channel to a gateway over these routers, and its metrics."""
    pool = pool_of(routers)
    app = create_app(pool, TOKENIZER, AppConfig(model_name="tiny", **settings))

    async def status() -> Any:
        if not routers:
            raise RouterUnavailable("the placement controller does not answer")
        return STATUS

    async def placement() -> Any:
        return PLACEMENT

    await pool.start()
    server = RpcServer("127.0.0.1:0", app.state.serving, status, placement, most_bytes=1 << 20)
    running = asyncio.create_task(server.run())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel, app.state.serving.metrics.registry
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await pool.close()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(bounded())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def ids(*tokens: int, **sampling: Any) -> Any:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=tokens), sampling=pb.Sampling(**sampling))


def words(request: Any) -> list[int]:
    """A router's output: of length max_tokens, out of the prompt and the seed."""
    return [40 + (sum(request.prompt_ids) + i) % 60 for i in range(100)]


def test_unary_and_stream_say_the_same_and_what_http_would() -> None:
    async def main() -> None:
        router = FakeRouter(words, step_s=0.01)
        with routers_of(router):
            async with served([router]) as (channel, registry):
                stub = GenerationStub(channel)
                whole = await stub.Generate(ids(1, 2, 3, max_tokens=12, seed=2**40, top_p=0.5))
                assert whole.finish_reason == "length" and whole.model == "tiny"
                assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 12)
                chunks = [c async for c in stub.GenerateStream(ids(1, 2, 3, max_tokens=12))]
                assert "".join(chunk.text for chunk in chunks) == whole.text
                assert [c.finish_reason for c in chunks[:-1]] == [""] * (len(chunks) - 1)
                assert chunks[-1].usage == whole.usage and len(chunks) > 3
                made = router.seen[0].sampling
                assert made.seed == 2**40 and made.top_p == 0.5 and made.max_tokens == 12
                text = await stub.Generate(
                    pb.GenerateRequest(text="Hello world", sampling=pb.Sampling(max_tokens=2))
                )
                assert text.usage.completion_tokens == 2
                message = pb.Message(role="user", content="Hello")
                chat = pb.GenerateRequest(
                    model="tiny",
                    chat=pb.Chat(messages=[message]),
                    sampling=pb.Sampling(max_tokens=3, stop=["zzz"]),
                )
                assert (await stub.Generate(chat)).usage.completion_tokens == 3
                prompt = TOKENIZER.decode(router.seen[-1].prompt_ids, False)
                assert "<|user|>Hello<|end|><|assistant|>" in prompt
                totals = registry.values()
                assert totals["raymoe_generation_tokens_total"] == {(): 12 + 12 + 2 + 3}

    run(main)


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (pb.GenerateRequest(model="other", text="x"), grpc.StatusCode.NOT_FOUND, "other"),
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "text, token_ids or chat"),
        (ids(1, temperature=-1), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (ids(9999), grpc.StatusCode.INVALID_ARGUMENT, "9999"),
        (ids(*range(80)), grpc.StatusCode.INVALID_ARGUMENT, "64"),
        (ids(1, 2, max_tokens=100), grpc.StatusCode.INVALID_ARGUMENT, "64"),
    ],
)
def test_bad_requests_are_refused_as_over_http(request_: Any, code: Any, said: str) -> None:
    async def main() -> None:
        router = FakeRouter(words)
        with routers_of(router):
            async with served([router]) as (channel, _):
                stub = GenerationStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as unary:
                    await stub.Generate(request_)
                with pytest.raises(grpc.aio.AioRpcError) as stream:
                    [chunk async for chunk in stub.GenerateStream(request_)]
        for caught in (unary, stream):
            assert caught.value.code() is code
            assert said in (caught.value.details() or "")
        assert router.seen == []

    run(main)


def test_cancelled_calls_and_deadlines_end_the_work_at_the_router() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [70] * 60, step_s=0.05)
        with routers_of(router):
            async with served([router]) as (channel, _):
                stub = GenerationStub(channel)
                stream = stub.GenerateStream(ids(1))
                await anext(aiter(stream))
                router.pause(True)
                stream.cancel()
                await until(lambda: len(router.cancelled) == 1)
                await until(lambda: router.running == 0)
                call = stub.Generate(ids(2), timeout=0.3)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                await until(lambda: len(router.cancelled) == 2)
                assert router.running == 0

    run(main)


def test_the_endpoints_own_limit_holds_without_a_deadline() -> None:
    async def main() -> None:
        router = FakeRouter(words)
        with routers_of(router):
            async with served([router], request_timeout_s=0.2) as (channel, _):
                router.pause(True)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await GenerationStub(channel).Generate(ids(2))
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                await until(lambda: router.cancelled)

    run(main)


def test_placement_and_its_errors() -> None:
    async def main() -> None:
        router = FakeRouter(words)
        with routers_of(router):
            async with served([router]) as (channel, _):
                stub = PlacementStub(channel)
                status = await stub.GetStatus(pb.GetStatusRequest())
                assert status.epoch == 9 and not status.HasField("balancedness")
                assert status.groups[0].memory_bytes == 5 << 40 and status.groups[0].deaths == 1
                layer = await stub.GetLayer(pb.GetLayerRequest(layer=0))
                (replica,) = layer.experts[0].replicas
                assert (replica.group, replica.share, replica.why) == ("g0", 0.25, "its load grew")
                with pytest.raises(grpc.aio.AioRpcError, match="no MoE layer 1"):
                    await stub.GetLayer(pb.GetLayerRequest(layer=1))
        async with served([]) as (channel, _):
            with pytest.raises(grpc.aio.AioRpcError, match="does not answer") as caught:
                await PlacementStub(channel).GetStatus(pb.GetStatusRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(main)


def test_health_follows_the_routers_and_reflection_lists_the_services() -> None:
    async def main() -> None:
        router = FakeRouter(words)
        with routers_of(router):
            async with served([router]) as (channel, _):
                stub = health_pb2_grpc.HealthStub(channel)

                async def well(service: str) -> bool:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

                assert await well("raymoe.v1.Placement")
                while not await well("raymoe.v1.Generation"):
                    await asyncio.sleep(0.02)
                asked = reflection_pb2.ServerReflectionRequest(list_services="")
                found = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                    iter([asked])
                )
                names = {s.name for s in (await anext(aiter(found))).list_services_response.service}
                assert {"raymoe.v1.Generation", "raymoe.v1.Placement"} <= names
                assert "grpc.health.v1.Health" in names
                router.close()
                while await well("raymoe.v1.Generation"):
                    await asyncio.sleep(0.02)
                assert await well("raymoe.v1.Placement")

    run(main)


def test_a_port_in_use_is_a_clear_error() -> None:
    import socket

    async def main() -> None:
        app = create_app(pool_of([]), TOKENIZER, AppConfig(model_name="tiny"))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ConfigError, match=r"gateway\.grpc_port"):
                RpcServer(address, app.state.serving, _none, _none, most_bytes=1 << 20)

    run(main)


async def _none() -> Any:
    return {}


def test_the_generated_code_is_of_this_proto() -> None:
    """Messages, fields and methods of the .proto and of the generated descriptor are the same."""
    import re

    proto = (Path(pb.__file__).parent / "raymoe.proto").read_text()
    proto = re.sub(r"//.*", "", proto)
    made = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(made)
    messages = dict(re.findall(r"message (\w+) {(.*?)\n?}\n", proto.replace("  }\n", ""), re.S))
    assert set(messages) == {m.name for m in made.message_type}
    for message in made.message_type:
        fields = set(re.findall(r"(\w+) = (\d+);", messages[message.name]))
        assert fields == {(f.name, str(f.number)) for f in message.field}, message.name
    methods = set(re.findall(r"rpc (\w+)\((\w+)\) returns \((?:stream )?(\w+)\)", proto))
    assert methods == {
        (m.name, m.input_type.rpartition(".")[2], m.output_type.rpartition(".")[2])
        for service in made.service
        for m in service.method
    }


def test_very_many_messages_are_refused_as_over_http() -> None:
    async def main() -> None:
        router = FakeRouter(words)
        with routers_of(router):
            async with served([router]) as (channel, _):
                messages = [pb.Message(role="user", content="a")] * (MAX_PARTS // 3 + 1)
                chat = pb.GenerateRequest(chat=pb.Chat(messages=messages))
                with pytest.raises(grpc.aio.AioRpcError) as found:
                    await GenerationStub(channel).Generate(chat)
                assert found.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "65536 objects" in str(found.value.details())
        assert not router.seen

    run(main)
