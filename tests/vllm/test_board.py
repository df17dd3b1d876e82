"""What router and workers tell each other, and a request's way to vLLM; needs no vLLM."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from raymoe.checkpoint.reader import read_spec
from raymoe.config import parse_config
from raymoe.errors import ConfigError
from raymoe.requests import GenerationRequest, SamplingParams
from raymoe.vllm_plugin.arguments import engine_arguments, environment
from raymoe.vllm_plugin.asking import Asked, asked, ended_already, vllm_params
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.engine import check_installed
from raymoe.vllm_plugin.telling import event_of

EOS = (2,)


def test_a_void_step_is_pending_until_the_router_has_dealt_with_it(tmp_path: Path) -> None:
    router, worker, rank = Board.create(tmp_path), Board(tmp_path), Board(tmp_path)
    assert not worker.pending
    for number in (1, 2):
        worker.void()
        rank.void()  # the same step
        assert router.pending and router.requests() is None
        worker.name_requests({f"b{number}", "a"})
        rank.name_requests({"later"})  # of a step that is void for free
        assert router.requests() == {f"b{number}", "a"}
        router.handle()
        assert not worker.pending and not rank.pending


def test_the_board_says_where_the_controller_is_and_what_the_client_did(tmp_path: Path) -> None:
    board = Board.create(tmp_path)
    board.set_controller("h", 7)
    assert board.controller_file.read_text() == "h:7"
    assert board.client() == {}
    Board(tmp_path).tell_client({"batches": 3})
    assert board.client() == {"batches": 3}


def request(output: tuple[int, ...] = (), **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_ids=(5, 6, 7),
        output_ids=output,
        sampling=SamplingParams(seed=1, **sampling),
    )


def test_what_our_sampler_needs_survives_the_way_through_vllm() -> None:
    plain = asked(request(temperature=0.0), EOS)
    assert plain.sampling is None
    assert asked(request(temperature=0.0, frequency_penalty=0.5), EOS).sampling is not None
    sampled = asked(
        request(output=(8,), stop_token_ids=(9, 4), logit_bias=((3, 1.5),), min_tokens=2), EOS
    )
    assert sampled.ends == (2, 4, 9) and sampled.prompt_tokens == 3
    for one in (plain, sampled):
        extra = msgpack.unpackb(msgpack.packb(one.to_extra()))
        again = Asked.from_extra(extra)
        assert again is not None and again.request_id == "r" and again.sampling == one.sampling
    assert again == sampled
    assert Asked.from_extra(None) is None and Asked.from_extra({"other": 1}) is None


def test_vllm_is_asked_for_what_is_left() -> None:
    params = vllm_params(request(output=(8, 9), max_tokens=10, ignore_eos=True), EOS)
    assert (params["max_tokens"], params["temperature"]) == (8, 0.0)
    assert params["stop_token_ids"] == []
    assert vllm_params(request(max_tokens=0), EOS)["max_tokens"] == 1


@pytest.mark.parametrize(
    ("one", "finish"),
    [
        (request(), None),
        (request(output=(8, 9)), None),
        (request(output=(8, 2)), "stop"),
        (request(output=(8, 2), ignore_eos=True), None),
        (request(output=(8, 9), max_tokens=2), "length"),
        (request(output=(8,) * 7), "length"),  # the context
    ],
)
def test_a_continued_request_may_have_ended(one: GenerationRequest, finish: str | None) -> None:
    assert ended_already(one, EOS, max_context=10) == finish


def logprobs(**by_token: float) -> dict[int, SimpleNamespace]:
    return {int(t[1:]): SimpleNamespace(logprob=p) for t, p in by_token.items()}


def test_outputs_become_events() -> None:
    made = SimpleNamespace(
        token_ids=[4], logprobs=[logprobs(t4=-3.0, t1=-0.5, t2=-1.0)], finish_reason=None
    )
    prompt = [None, logprobs(t6=-2.0, t1=-0.1), logprobs(t7=-0.2)]
    output = SimpleNamespace(outputs=[made], prompt_logprobs=prompt, num_cached_tokens=2)
    event = event_of(request(logprobs=2, prompt_logprobs=1), output, first=True)
    assert event.token_ids == (4,) and event.finish is None and event.cached_prompt_tokens == 2
    assert event.logprobs[0].token == -3.0
    assert event.logprobs[0].top == ((1, -0.5), (2, -1.0))
    assert [one.token for one in event.prompt_logprobs] == [-2.0, -0.2]
    assert event.prompt_logprobs[0].top == ((1, -0.1),)
    later = event_of(request(prompt_logprobs=1), output, first=False)
    assert later.prompt_logprobs == () and later.cached_prompt_tokens == 0
    made.finish_reason = "length"
    only_prompt = event_of(request(max_tokens=0), output, first=True)
    assert only_prompt.token_ids == () and only_prompt.finish == "length"
    made.finish_reason = "error"
    assert event_of(request(), output, first=True).finish == "error"


def arguments(**config: Any) -> dict[str, Any]:
    parsed = parse_config({"model": "m", "engine": "vllm", **config}, source="test")
    return engine_arguments(parsed, "/m", {}, drawing="d", device="cpu", context=2048)


def test_settings_become_arguments_of_vllm() -> None:
    made = arguments(routers={"max_context_tokens": 512, "chunk_tokens": 32})
    assert made["max_model_len"] == 512 and made["dtype"] == "float32"
    assert made["max_num_batched_tokens"] == made["max_num_seqs"] == 64
    assert made["distributed_executor_backend"] == "uni"
    more = arguments(vllm={"engine_args": {"dtype": "bfloat16", "tensor_parallel_size": 2}})
    assert more["dtype"] == "bfloat16" and more["distributed_executor_backend"] == "mp"
    with pytest.raises(ConfigError, match=r"vllm\.engine_args: load_format is raymoe's"):
        arguments(vllm={"engine_args": {"load_format": "auto"}})


def test_without_vllm_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(Path("models/demo"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM, which this Python does not have: pip install"):
        check_installed(spec)
    with pytest.raises(ConfigError, match="'dbrx'"):
        check_installed(replace(spec, family="dbrx"))


def test_settings_of_the_other_engine_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine_args: only with engine: vllm"):
        arguments(engine="embedded", vllm={"engine_args": {"dtype": "auto"}})
    with pytest.raises(ConfigError, match=r"vllm\.engine_args\.block_size"):
        arguments(routers={"block_tokens": 32})
    with pytest.raises(ConfigError, match=r"routers\.device: vLLM runs where"):
        arguments(routers={"device": "cuda"})
    with pytest.raises(ConfigError, match=r"routers\.microbatch_tokens: vLLM runs"):
        arguments(routers={"microbatch_tokens": 64})


def test_vllm_waits_longer_for_a_step_than_a_step_for_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = parse_config({"model": "m", "data_plane": {"stall_limit_s": 500}}, source="test")
    monkeypatch.delenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", raising=False)
    assert environment(config)["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "560"
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "900")
    assert "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS" not in environment(config)


def test_only_vllm_on_cpus_is_given_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in every process of a local Ray
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    values: dict[str, Any] = {"model": "m", "engine": "vllm", "vllm": {"threads": 3}}
    given = environment(parse_config(values, source="test"))
    assert (given["OMP_NUM_THREADS"], given["OMP_WAIT_POLICY"]) == ("3", "passive")
    on_gpus = {**values, "routers": {"num_gpus": 1}}
    assert "OMP_NUM_THREADS" not in environment(parse_config(on_gpus, source="test"))
    with pytest.raises(ConfigError, match=r"vllm\.threads: only with"):
        parse_config({"model": "m", "vllm": {"threads": 2}}, source="test")
