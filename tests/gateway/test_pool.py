"""Several routers: who gets a request, and what happens when one dies."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from raymoe.errors import LinkError, Overloaded, RaymoeError, RequestError, RouterUnavailable
from raymoe.gateway import RouterPool
from raymoe.requests import GenerationRequest, SamplingParams, TokenEvent
from raymoe.stream import StreamConfig, StreamEndpoint
from tests.gateway.conftest import in_process, pool_of, routers_of, served, wait_for
from tests.gateway.fakes import IDENTITY, SECRET, FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def by_position(request: GenerationRequest) -> list[int]:
    """An output that depends on the prompt, the seed and the position: as a model's would."""
    start = sum(request.prompt_ids) + request.sampling.seed + request.sampling.choice
    return [5 + (start * 31 + at * at) % 340 for at in range(request.sampling.max_tokens)]


def fake(router_id: str, **settings: Any) -> FakeRouter:
    settings = {"step_s": 0.004, "context_tokens": 4096, "vocab": 355, **settings}
    return FakeRouter(by_position, router_id=router_id, **settings)


class Reader:
    """Takes one generation's events."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.error: RaymoeError | None = None
        self.events = 0
        self.ended = asyncio.Event()

    def deliver(self, event: TokenEvent) -> None:
        self.events += 1
        self.tokens += event.token_ids
        self.finish = event.finish
        if event.finish is not None:
            self.ended.set()

    def fail(self, error: RaymoeError) -> None:
        self.error = error
        self.ended.set()


def request(name: str, max_tokens: int = 100, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(seed=len(name), max_tokens=max_tokens, **sampling),
    )


async def until(condition: Any, within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


async def start(pool: RouterPool, routers: int) -> None:
    await pool.start()
    await until(lambda: len(pool.routers()) == routers)


def test_a_request_goes_on_at_another_router_without_a_gap() -> None:
    async def main() -> None:
        routers = [fake("r0"), fake("r1")]
        with routers_of(*routers):
            pool = pool_of(routers)
            await start(pool, 2)
            readers = [Reader() for _ in range(8)]
            asked = [request(f"{'x' * at}", 60) for at in range(8)]
            for one, reader in zip(asked, readers, strict=True):
                pool.open(one, reader.deliver, reader.fail)
            assert [len(connection.own) for connection in pool._connections.values()] == [4, 4]
            await until(lambda: min(len(reader.tokens) for reader in readers) >= 10)
            await asyncio.to_thread(routers[0].close)
            await asyncio.gather(*(reader.ended.wait() for reader in readers))
            for one, reader in zip(asked, readers, strict=True):
                assert reader.tokens == by_position(one)
                assert reader.finish == "length"
            assert pool.resubmitted == 4
            moved = [one for one in routers[1].seen if one.output_ids]
            assert len(moved) == 4
            assert all(len(one.output_ids) >= 10 for one in moved)
            assert pool.in_flight == 0
            await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("kill_after", [1, 7, 19])
def test_a_streamed_answer_survives_its_router(kill_after: int) -> None:
    routers = [fake("r0", step_s=0.01)]
    body = {"prompt": "Hello", "max_tokens": 24, "seed": 3, "stream": True, "ignore_eos": True}
    ids = TOKENIZER.encode("Hello")
    expected = TOKENIZER.decode(
        by_position(
            GenerationRequest(
                request_id="", prompt_ids=ids, sampling=SamplingParams(seed=3, max_tokens=24)
            )
        )
    )
    with routers_of(*routers), served(routers, TOKENIZER) as running:
        text, usage = "", {}
        with httpx.stream(
            "POST",
            running.url + "/v1/completions",
            json={**body, "stream_options": {"include_usage": True}},
            timeout=20,
        ) as answer:
            count = 0
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                usage = chunk["usage"] or usage
                text += "".join(choice["text"] for choice in chunk["choices"])
                count += 1
                if count == kill_after:
                    dying = routers[0]
                    routers[0] = fake("r1").start()  # the only one left, and not known yet
                    dying.close()
        assert text == expected
        assert usage["completion_tokens"] == 24
        assert running.pool.resubmitted == 1
        routers[0].close()


def test_the_same_router_takes_a_request_again_after_a_broken_connection() -> None:
    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers)
            await start(pool, 1)
            reader, asked = Reader(), request("a", 50)
            pool.open(asked, reader.deliver, reader.fail)
            await until(lambda: len(reader.tokens) > 5)
            (connection,) = pool._connections.values()
            assert connection._client is not None
            assert connection._client._transport is not None
            connection._client._transport.abort()
            await reader.ended.wait()
            assert reader.tokens == by_position(asked)
            assert routers[0].cancelled == ["a.1"]
            await pool.close()

    asyncio.run(main())


def test_a_frozen_router_is_left_behind() -> None:
    async def main() -> None:
        frozen = fake("r0", config=StreamConfig(heartbeat_s=60))
        with routers_of(frozen, fake("r1")) as routers:
            pool = pool_of(routers, silence_s=0.6)
            await start(pool, 2)
            readers = [Reader(), Reader()]
            for at, reader in enumerate(readers):
                pool.open(request("a" * at, 30), reader.deliver, reader.fail)
            frozen.pause(True)
            await asyncio.gather(*(reader.ended.wait() for reader in readers))
            assert [reader.tokens for reader in readers] == [
                by_position(request("a" * at, 30)) for at in range(2)
            ]
            await pool.close()

    asyncio.run(main())


def test_a_router_that_drains_gets_nothing_new_and_its_work_goes_on() -> None:
    async def main() -> None:
        with routers_of(fake("r0"), fake("r1")) as routers:
            pool = pool_of(routers)
            await start(pool, 2)
            first = Reader()
            pool.open(request("a", 40), first.deliver, first.fail)
            await until(lambda: routers[0].running + routers[1].running == 1)
            draining, other = routers if routers[0].running else routers[::-1]
            draining.server.set_accepting(False)
            await until(lambda: sum(c.usable for c in pool._connections.values()) == 1)
            more = [Reader() for _ in range(4)]
            for at, reader in enumerate(more):
                pool.open(request("b" * at, 5), reader.deliver, reader.fail)
            await asyncio.gather(*(reader.ended.wait() for reader in [first, *more]))
            assert len(draining.seen) == 1
            assert len(other.seen) == 4
            assert first.tokens == by_position(request("a", 40))
            await pool.close()

    asyncio.run(main())


def test_work_given_away_goes_on_elsewhere() -> None:
    async def main() -> None:
        with routers_of(fake("r0"), fake("r1")) as routers:
            pool = pool_of(routers)
            await start(pool, 2)
            reader = Reader()
            pool.open(request("a", 30), reader.deliver, reader.fail)
            await until(lambda: len(reader.tokens) > 3)
            giving = routers[0] if routers[0].running else routers[1]
            giving._cancel(("a.1",))
            giving.server.publish([TokenEvent(request_id="a.1", finish="cancelled")])
            await reader.ended.wait()
            assert reader.tokens == by_position(request("a", 30))
            await pool.close()

    asyncio.run(main())


def test_any_number_of_routers_may_leave_under_a_request() -> None:
    """Each gives it away with the tokens so far; that is not what `max_resubmits` limits."""

    async def main() -> None:
        everyone = [fake(f"r{at}") for at in range(4)]
        with routers_of(*everyone):
            for router in everyone:
                router.pause(True)
            there = everyone[:1]
            pool = pool_of(there, max_resubmits=0)
            await start(pool, 1)
            reader, asked = Reader(), request("a", 20)
            pool.open(asked, reader.deliver, reader.fail)
            for at, leaving in enumerate(everyone[:3]):
                await until(lambda leaving=leaving: leaving.running == 1)
                for _ in range(5):
                    leaving.step()
                there[:] = [everyone[at + 1]]
                await until(lambda: sum(c.usable for c in pool._connections.values()) == 2)
                leaving.server.give_away()
                await until(lambda at=at: everyone[at + 1].running == 1)
                leaving.close()
                await until(lambda: len(pool._connections) == 1)
            everyone[3].pause(False)
            await reader.ended.wait()
            assert reader.tokens == by_position(asked) and reader.error is None
            assert [len(router.seen[0].output_ids) for router in everyone] == [0, 5, 10, 15]
            assert pool.resubmitted == 3
            await pool.close()

    asyncio.run(main())


def test_a_request_that_ended_with_its_router_is_not_made_longer() -> None:
    """The last token came, the end did not."""

    async def main() -> None:
        with routers_of(fake("r0", eos_ids=(7,)), fake("r1", eos_ids=(7,))) as routers:
            for router in routers:
                router.pause(True)
            for tokens, sampling, finish in (
                ((9, 7), {}, "stop"),
                ((9, 8), {"stop_token_ids": (8,)}, "stop"),
                ((9, 9, 9, 9), {}, "length"),
            ):
                pool = pool_of(routers)
                await start(pool, 2)
                reader = Reader()
                opened = pool.open(request("a", 4, **sampling), reader.deliver, reader.fail)
                assert opened.connection is not None
                owner = opened.connection
                await until(lambda: any(router.running for router in routers))
                server = next(r.server for r in routers if r.running)
                server.publish([TokenEvent(request_id=opened.wire_id, token_ids=tokens)])
                await until(lambda reader=reader: reader.tokens)
                assert owner._client is not None
                assert owner._client._transport is not None
                owner._client._transport.abort()
                await reader.ended.wait()
                assert (tuple(reader.tokens), reader.finish) == (tokens, finish)
                await pool.close()
                await until(lambda: not any(router.running for router in routers))

    asyncio.run(main())


def cut(opened: Any) -> None:
    """The connection to its router breaks."""
    assert opened.connection is not None
    assert opened.connection._client is not None
    assert opened.connection._client._transport is not None
    opened.connection._client._transport.abort()


def test_a_request_that_kills_routers_is_given_up() -> None:
    """Three times one is lost without having made a token."""

    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers, max_resubmits=2)
            await start(pool, 1)
            reader = Reader()
            opened = pool.open(request("a", 1000), reader.deliver, reader.fail)
            await until(lambda: len(reader.tokens) > 3)
            routers[0].pause(True)
            for attempt in (1, 2, 3):
                await until(
                    lambda attempt=attempt: opened.attempts == attempt and opened.connection
                )
                cut(opened)
            await reader.ended.wait()
            assert isinstance(reader.error, RouterUnavailable)
            assert "3 attempts" in str(reader.error)
            routers[0].pause(False)
            await pool.close()

    asyncio.run(main())


def test_a_request_that_gets_on_may_lose_any_number_of_routers() -> None:
    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers, max_resubmits=2)
            await start(pool, 1)
            reader = Reader()
            asked = request("a", 400)
            opened = pool.open(asked, reader.deliver, reader.fail)
            for attempt in range(1, 7):
                before = len(reader.tokens)
                await until(lambda attempt=attempt: opened.attempts == attempt)
                await until(lambda before=before: len(reader.tokens) > before)
                cut(opened)
            await reader.ended.wait()
            assert (reader.error, reader.tokens) == (None, by_position(asked))
            assert pool.resubmitted == 6
            await pool.close()

    asyncio.run(main())


def test_a_request_that_was_let_in_is_not_refused_when_its_router_is_lost() -> None:
    """The other router is full: it waits for a place there, with a token or without."""

    async def main() -> None:
        with routers_of(fake("r0")) as routers, routers_of(fake("r1")) as others:
            pool = pool_of(routers, retry_after_s=0.05)
            await start(pool, 1)
            readers = [Reader(), Reader()]
            asked = [request("a", 400), request("bb", 5)]
            opened = [pool.open(asked[0], readers[0].deliver, readers[0].fail)]
            await until(lambda: readers[0].tokens)
            routers[0].pause(True)
            opened.append(pool.open(asked[1], readers[1].deliver, readers[1].fail))
            await until(lambda: routers[0].running == 2)
            others[0].refuse = Overloaded("the engine is full")
            routers.append(others[0])
            await until(lambda: len(pool.routers()) == 2)
            lost = routers.pop(0)
            await asyncio.to_thread(lost.close)
            await until(lambda: others[0].asked >= 4)
            assert not any(reader.ended.is_set() for reader in readers)
            assert pool.in_flight == 2
            fresh = Reader()
            pool.open(request("ccc", 5), fresh.deliver, fresh.fail)
            await fresh.ended.wait()
            assert fresh.finish == "error", "who was not let in is refused"
            others[0].refuse = None
            await asyncio.gather(*(reader.ended.wait() for reader in readers))
            for one, reader in zip(asked, readers, strict=True):
                assert reader.tokens == by_position(one)
            assert pool.in_flight == 0
            await pool.close()

    asyncio.run(main())


def test_requests_wait_for_a_router_and_not_for_ever() -> None:
    async def main() -> None:
        routers: list[FakeRouter] = []
        late = fake("r0")
        pool = pool_of(routers, router_wait_s=0.8)
        await pool.start()
        assert not pool.ready
        async with in_process(pool, TOKENIZER) as http:
            health = await http.get("/health")
            assert health.status_code == 503
            answer = await http.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "router_unavailable"
            assert answer.headers["retry-after"]
            waiting = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}))
            await asyncio.sleep(0.05)
            routers.append(late.start())
            assert (await waiting).status_code == 200
            assert (await http.get("/health")).status_code == 200
            await asyncio.to_thread(late.close)
            await until(lambda: not pool.ready)
            assert (await http.get("/health")).status_code == 503
            answer = await http.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 503

    asyncio.run(main())


def test_a_queue_that_is_full_answers_429() -> None:
    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers, max_in_flight=3, retry_after_s=7)
            async with in_process(pool, TOKENIZER) as http:
                await pool.model_info()
                routers[0].pause(True)
                body = {"prompt": "a", "n": 2, "max_tokens": 2}
                first = asyncio.create_task(http.post("/v1/completions", json=body))
                await until(lambda: pool.in_flight == 2)
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "7"
                assert answer.json()["error"]["type"] == "rate_limit_error"
                assert pool.in_flight == 2
                answer = await http.post("/v1/completions", json={**body, "n": 4})
                assert answer.status_code == 400  # it never could be taken
                assert answer.json()["error"]["param"] == "n"
                with pytest.raises(Overloaded):
                    pool.admit(2)
                routers[0].pause(False)
                assert (await first).status_code == 200
                assert (await http.post("/v1/completions", json=body)).status_code == 200
            assert pool.in_flight == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("the engine is full"), 429, "queue_full"),
        (RequestError("the prompt is too long", "prompt"), 400, "invalid_value"),
        (RouterUnavailable("it is stopping"), 503, "generation_failed"),
        (LinkError("of any other kind"), 503, "generation_failed"),
    ],
)
def test_an_engines_error_reaches_the_client(error: RaymoeError, status: int, code: str) -> None:
    async def main() -> None:
        router = fake("r0", refuse=error)
        with routers_of(router):
            async with in_process(pool_of([router]), TOKENIZER) as http:
                for stream in (False, True):
                    answer = await http.post(
                        "/v1/completions", json={"prompt": "a", "stream": stream}
                    )
                    assert answer.status_code == status
                    assert answer.json()["error"]["message"] == str(error)
                    assert answer.json()["error"]["code"] == code
                    assert ("retry-after" in answer.headers) == (status != 400)

    asyncio.run(main())


@pytest.mark.parametrize("full", [1, 2, 3])
def test_an_overloaded_routers_request_goes_to_another_one(full: int) -> None:
    async def main() -> None:
        refusal = Overloaded("the engine is full")
        with (
            routers_of(*(fake(f"r{at}", refuse=refusal) for at in range(full))) as refusing,
            routers_of(*(fake(f"r{at}") for at in range(full, 3))) as taking,
        ):
            pool = pool_of([*refusing, *taking], max_resubmits=1)
            await start(pool, 3)
            readers = [Reader() for _ in range(6)]
            for at, reader in enumerate(readers):
                pool.open(request("a" * at, 5), reader.deliver, reader.fail)
            await asyncio.gather(*(reader.ended.wait() for reader in readers))
            for at, reader in enumerate(readers):
                if taking:
                    assert reader.tokens == by_position(request("a" * at, 5))
                else:
                    assert (reader.finish, reader.tokens, reader.events) == ("error", [], 1)
            if not taking:  # each was asked, none of them twice
                assert [router.asked for router in refusing] == [6, 6, 6]
            assert all(router.asked <= 6 for router in refusing)
            assert sum(router.asked for router in taking) == (6 if taking else 0)
            assert pool.in_flight == pool.resubmitted == 0
            assert not any(connection.own for connection in pool._connections.values())
            await pool.close()

    asyncio.run(main())


def test_an_error_in_mid_stream_is_an_event() -> None:
    router = fake("r0")
    with routers_of(router), served([router], TOKENIZER) as running:
        wait_for(lambda: running.pool.ready)
        body = {"prompt": "a", "stream": True, "max_tokens": 1000}
        with httpx.stream("POST", running.url + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            (wire_id,) = router._running
            router._cancel((wire_id,))
            router.server.publish(
                [TokenEvent(request_id=wire_id, finish="error", error="no expert answered")]
            )
            *_, error, done = [line for line in lines if line]
        assert json.loads(error[6:])["error"]["message"] == "no expert answered"
        assert done == "data: [DONE]"


def test_a_request_that_takes_too_long_ends() -> None:
    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers)
            async with in_process(pool, TOKENIZER, request_timeout_s=0.2) as http:
                await pool.model_info()
                answer = await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 999})
                assert answer.status_code == 504
                assert answer.json()["error"]["code"] == "request_timeout"
                await until(lambda: routers[0].running == 0)

    asyncio.run(main())


def test_a_list_that_fails_changes_nothing_and_a_router_off_the_list_retires() -> None:
    async def main() -> None:
        with routers_of(fake("r0"), fake("r1")) as routers:
            listed: list[FakeRouter] | None = list(routers)

            async def discover() -> list[StreamEndpoint]:
                if listed is None:
                    raise RuntimeError("the controller restarts")
                return [router.server.endpoint for router in listed]

            pool = RouterPool(discover, identity=IDENTITY, secret=SECRET, node="elsewhere")
            pool.config = pool_of([]).config
            await start(pool, 2)
            listed = None
            await asyncio.sleep(0.15)
            assert len(pool.routers()) == 2
            reader = Reader()
            opened = pool.open(request("a", 60), reader.deliver, reader.fail)
            await until(lambda: reader.tokens)
            owner = routers[0] if routers[0].running else routers[1]
            listed = [router for router in routers if router is not owner]
            await asyncio.sleep(0.15)
            assert opened.connection is not None  # still there
            more = [Reader() for _ in range(3)]
            for at, other in enumerate(more):  # to the listed router, busier though it gets
                pool.open(request("b" * at, 3), other.deliver, other.fail)
            await asyncio.gather(*(other.ended.wait() for other in more))
            assert len(owner.seen) == 1
            await reader.ended.wait()
            assert reader.tokens == by_position(request("a", 60))
            await asyncio.to_thread(owner.close)
            await until(lambda: len(pool._connections) == 1)
            await pool.close()

    asyncio.run(main())


def test_a_controller_that_lists_nobody_changes_nothing() -> None:
    """It has just restarted: the routers have yet to tell it that they are there."""

    async def main() -> None:
        with routers_of(fake("r0"), fake("r1")) as routers:
            listed = list(routers)
            pool = pool_of(listed)
            async with in_process(pool, TOKENIZER) as http:
                await until(lambda: len(pool.routers()) == 2)
                listed.clear()
                before = tuple(pool._connections.values())
                await until(lambda: all(connection.retired for connection in before))
                assert tuple(pool._connections.values()) == before
                assert (await http.get("/health")).json() == {"status": "ok", "routers": 2}
                body = {"prompt": "a", "max_tokens": 3}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
                listed.extend(routers)
                await until(lambda: not any(connection.retired for connection in before))
                assert tuple(pool._connections.values()) == before
                listed.clear()
                for router in routers:  # not listed and gone: forgotten
                    await asyncio.to_thread(router.close)
                await until(lambda: not pool._connections)
                assert (await http.get("/health")).status_code == 503

    asyncio.run(main())


def test_a_router_of_another_model_is_never_used() -> None:
    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers, router_wait_s=0.2)
            pool.identity = type(IDENTITY)(deployment="test", fingerprint="beef")
            await pool.start()
            with pytest.raises(RouterUnavailable):
                await pool.model_info()
            await pool.close()

    asyncio.run(main())


def test_closing_ends_what_is_open() -> None:
    async def main() -> None:
        with routers_of(fake("r0")) as routers:
            pool = pool_of(routers)
            await start(pool, 1)
            reader = Reader()
            pool.open(request("a", 1000), reader.deliver, reader.fail)
            await until(lambda: reader.tokens)
            await pool.close()
            assert isinstance(reader.error, RouterUnavailable)
            await until(lambda: routers[0].running == 0)

    asyncio.run(main())


def test_a_request_larger_than_a_frame_is_the_clients_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bodies are smaller than frames, but text may become five bytes a token."""
    monkeypatch.setattr("raymoe.stream.frames.MAX_FRAME_BYTES", 2048)

    async def main() -> None:
        router = fake("r0")
        with routers_of(router):
            pool = pool_of([router])
            async with in_process(pool, TOKENIZER) as http:
                large = {"prompt": [5] * 2500, "max_tokens": 4}
                for body in (large, {**large, "stream": True}, {**large, "n": 3}):
                    answer = await http.post("/v1/completions", json=body)
                    assert answer.status_code == 400, answer.text
                    said = answer.json()["error"]
                    assert said["code"] == "invalid_value"
                    assert "too large for a router" in said["message"]
                assert pool.in_flight == 0 and not router.seen
                small = await http.post("/v1/completions", json={**large, "prompt": [5] * 500})
                assert small.json()["usage"]["completion_tokens"] == 4

    asyncio.run(main())


def test_a_request_that_has_grown_larger_than_a_frame_ends_alone_when_its_router_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        routers = [fake("r0", step_s=0.01)]
        with routers_of(routers[0]):
            pool = pool_of(routers)
            await start(pool, 1)
            long, short = Reader(), Reader()
            long_one, short_one = request("long", 2000), request("short", 80)
            long_one = replace(long_one, prompt_ids=(5,) * 700)
            pool.open(long_one, long.deliver, long.fail)  # the first to be sent elsewhere
            pool.open(short_one, short.deliver, short.fail)
            await until(lambda: len(long.tokens) >= 20 and len(short.tokens) >= 20)
            monkeypatch.setattr("raymoe.stream.frames.MAX_FRAME_BYTES", 700)
            dying = routers[0]
            routers[0] = fake("r1").start()
            await asyncio.to_thread(dying.close)
            async with asyncio.timeout(60):
                await asyncio.gather(long.ended.wait(), short.ended.wait())
            assert isinstance(long.error, RequestError)
            assert short.error is None and short.tokens == by_position(short_one)
            assert pool.in_flight == 0
            await pool.close()
            routers[0].close()

    asyncio.run(main())
