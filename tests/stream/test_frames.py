"""Every message survives the wire, and nothing else does."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymoe.errors import FrameError
from raymoe.requests import GenerationRequest, Origin, SamplingParams, TokenEvent, TokenLogprobs
from raymoe.stream.frames import FrameReader, decode, encode
from raymoe.stream.messages import Cancel, Hello, Load, Message, ModelInfo, Submit, Tokens

LOAD = Load(running=3, waiting=2, others=1, accepting=False)
MODEL = ModelInfo(name="m", vocab=4096, context_tokens=512, kv_capacity_tokens=9000, eos_ids=(0, 7))
MESSAGES: list[Message] = [
    Hello(router_id="r", pid=12, model=MODEL, load=LOAD),
    Cancel(request_ids=("a", "b")),
    Submit(
        request=GenerationRequest(
            request_id="a", prompt_ids=(1, 2, 3), sampling=SamplingParams(seed=2**63 - 1)
        )
    ),
    Submit(
        request=GenerationRequest(
            request_id="b",
            prompt_ids=(1,),
            output_ids=(4, 5),
            priority=-3,
            sampling=SamplingParams(
                seed=0,
                choice=2,
                temperature=0.0,
                top_p=0.5,
                top_k=3,
                min_p=0.1,
                typical_p=0.9,
                presence_penalty=1.0,
                frequency_penalty=-1.0,
                repetition_penalty=1.5,
                logit_bias=((3, -100.0), (4, 1.5)),
                max_tokens=9,
                min_tokens=2,
                ignore_eos=True,
                stop_token_ids=(8, 9),
                logprobs=0,
                prompt_logprobs=5,
            ),
        )
    ),
    Submit(
        request=GenerationRequest(
            request_id="c",
            prompt_ids=(1,),
            sampling=SamplingParams(seed=0),
            origin=Origin(request_id="the client's", traceparent=f"00-{'a' * 32}-{'b' * 16}-01"),
        )
    ),
    Tokens(events=(), load=LOAD),
    Tokens(
        events=(
            TokenEvent(request_id="a", token_ids=(1,)),
            TokenEvent(
                request_id="b",
                token_ids=(1, 2),
                logprobs=(TokenLogprobs(token=-0.5, top=((1, -0.5), (2, -1.0))),) * 2,
                prompt_logprobs=(TokenLogprobs(token=float("-inf")),),
                finish="stop",
                cached_prompt_tokens=16,
            ),
            TokenEvent(request_id="c", finish="error", error="no expert"),
            TokenEvent(request_id="c2", finish="error", error="full", error_kind="overloaded"),
            TokenEvent(request_id="d", finish="cancelled"),
            TokenEvent(request_id="e", finish="length"),
        ),
        load=LOAD,
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    (body,) = FrameReader().feed(encode(message))
    assert decode(body) == message


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_frames_are_cut_wherever_the_stream_was(sizes: list[int]) -> None:
    data = b"".join(map(encode, MESSAGES))
    reader, bodies, at = FrameReader(), [], 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        bodies += reader.feed(data[at : at + size])
        at += size
    assert [decode(body) for body in bodies] == MESSAGES


def test_a_length_over_the_limit_is_refused_before_its_bytes_arrive() -> None:
    reader = FrameReader(max_frame_bytes=100)
    with pytest.raises(FrameError, match="101 bytes; at most 100"):
        list(reader.feed((101).to_bytes(4, "little")))


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        [99],
        ["tokens"],
        [1, "r", 1, {"name": "m"}, [0, 0, 0, True]],
        [2, "a", [1], [], 0],
        [2, "a", [1], [], 0, {"seed": 1, "warmth": 2}],
        [2, "a", [1], [], 0, {}],
        [2, "a", ["x"], [], 0, {"seed": 1}],
        [2, "a", [True], [], 0, {"seed": 1}],
        [2, 5, [1], [], 0, {"seed": 1}],
        [2, "a" * 2000, [1], [], 0, {"seed": 1}],
        [3, [1]],
        [4, [0, 0, 0, True], [["a", [1], 9, None, [], [], 0]]],
        [4, [0, 0], []],
        [4, [0, 0, 0, True], [[]]],
    ],
)
def test_what_is_not_a_message_is_refused(value: object) -> None:
    with pytest.raises(FrameError):
        decode(msgpack.packb(value))


@given(st.binary(max_size=64))
def test_bytes_of_any_kind_raise_nothing_but_a_frame_error(body: bytes) -> None:
    try:
        decode(body)
    except FrameError:
        pass


def test_a_newer_routers_additions_are_left_alone() -> None:
    load = [1, 2, 3, True, "new"]
    model = {"name": "m", "vocab": 1, "context_tokens": 2, "kv_capacity_tokens": 3, "eos_ids": []}
    hello = decode(msgpack.packb([1, "r", 1, {**model, "new": 1}, load, "new"]))
    assert isinstance(hello, Hello)
    assert hello.load == Load(running=1, waiting=2, others=3)
    event = ["a", [5], 1, None, [], [], 0, "a new kind", "new"]
    tokens = decode(msgpack.packb([4, load, [event]]))
    assert tokens == Tokens(
        events=(TokenEvent(request_id="a", token_ids=(5,), finish="stop"),), load=hello.load
    )


def test_an_older_routers_error_has_no_kind() -> None:
    tokens = decode(msgpack.packb([4, [0, 0, 0, True], [["a", [], 4, "no expert", [], [], 0]]]))
    assert isinstance(tokens, Tokens)
    assert tokens.events == (TokenEvent(request_id="a", finish="error", error="no expert"),)
