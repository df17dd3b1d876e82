"""Outputs of an asked-for form from real routers, and `raymoe bench` on a real deployment."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.conftest import Deployment, run_raymoe

pytestmark = pytest.mark.ray
USER: Any = [{"role": "user", "content": "Describe an animal."}]


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=99)
    name: str = Field(max_length=20)


TOOLS: Any = [openai.pydantic_function_tool(Animal, name="note")]


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=deployment.url + "/v1", api_key="none", max_retries=0)


def test_whatever_the_model_would_say_it_keeps_to_the_form(client: openai.OpenAI) -> None:
    """The demo model has never seen a schema; hot sampling on top."""
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model="demo", messages=USER, response_format=Animal, temperature=1.5, seed=seed,
            max_tokens=1500,
        )  # fmt: skip
        assert isinstance(parsed.choices[0].message.parsed, Animal)
    chosen = client.completions.create(
        model="demo", prompt="Yes or no? ", extra_body={"guided_choice": ["yes", "no"]}
    )
    assert chosen.choices[0].text in ("yes", "no")
    assert chosen.choices[0].finish_reason == "stop"


def test_a_forced_call_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=USER, tools=TOOLS, tool_choice="required", seed=1, max_tokens=1500
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Animal)
    assert choice.finish_reason == "tool_calls"


def test_bench_and_its_profile(deployment: Deployment) -> None:
    done = run_raymoe(
        "bench", "--url", deployment.url, "--streams", "2", "--requests", "6", "--warmup", "1",
        "--output-tokens", "6", "--ignore-eos", "--profile", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["results"]
    assert found["summary"]["output_tokens"] == 36
    profile = found["profile"]
    assert profile["decode_tokens"] == 6 * 5  # a request's first token comes with its prompt
    assert [one["layer"] for one in profile["layers"]] == list(range(6))
    assert all(one["batches"] >= 6 for one in profile["layers"])
    groups = {group["id"] for group in deployment.get("/status")["groups"]}
    assert {one["group"] for one in profile["groups"]} <= groups
    tokens = profile["decode_tokens"] + profile["prefill_tokens"]
    assert sum(one["pairs"] for one in profile["groups"]) == 6 * 4 * tokens  # layers, top-4
