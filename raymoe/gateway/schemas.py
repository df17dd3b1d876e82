"""The bodies clients may send. Strict: no "1" for 1, no unknown field, no silent default.

A few OpenAI fields are accepted and have no effect, because clients send them as a matter of
course and nothing in the answer depends on them: `user`, `metadata`, `store`, `service_tier`,
`safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `prompt_cache_options`, and
`parallel_tool_calls`.
Fields that would change the answer and cannot be honoured are refused by name. Lists that may be
long end at their first mistake: a million of them would take seconds and a gigabyte to tell.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from raymoe.gateway.fields import (
    INT64_MAX,
    MAX_N,
    MAX_TOP_LOGPROBS,
    Choices,
    Content,
    Ignored,
    LogitBias,
    Modalities,
    Prompts,
    Schema,
    Stops,
    ToolChoice,
    refused,
)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Annotated[bool | None, Field(description="The schema always holds.")] = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's field; at most one of them."""

    json_: Schema = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingBody(Body):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT64_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    logit_bias: LogitBias = ()
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop: Stops = ()
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=256)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    priority: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    use_beam_search: Annotated[None, refused("use 'best_of', which draws and ranks")] = None
    length_penalty: Annotated[None, refused("there is no beam search")] = None
    bad_words: Annotated[None, refused("use 'logit_bias' or 'guided_regex'")] = None
    allowed_token_ids: Annotated[None, refused("use 'logit_bias' or 'guided_choice'")] = None
    logits_processors: Annotated[None, refused("clients cannot bring code")] = None
    prompt_logprobs: Annotated[None, refused("use 'echo' with 'logprobs' in completions")] = None
    truncate_prompt_tokens: Annotated[None, refused("prompts are never cut")] = None
    guided_whitespace_pattern: Annotated[None, refused("it is [ \\n\\t]{0,32}")] = None
    guided_decoding_backend: Annotated[None, refused("there is one")] = None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompts
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: Annotated[None, refused("this model cannot fill in before a suffix")] = None


class Function(BaseModel):
    """A function's declaration; what else it holds is for the template to use."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, fail_fast=True)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Annotated[None, refused("only text is")] = None
    function_call: Annotated[None, refused("use 'tool_calls'")] = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, fail_fast=True)
    tool_choice: ToolChoice = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Modalities = None
    audio: Annotated[None, refused("only text is")] = None
    functions: Annotated[None, refused("use 'tools'")] = None
    function_call: Annotated[None, refused("use 'tool_choice'")] = None
    documents: Annotated[None, refused("put their text into a message")] = None
    chat_template: Annotated[None, refused("the checkpoint's own is used")] = None
    moderation: Annotated[None, refused("nothing is moderated here")] = None
    verbosity: Annotated[None, refused("ask for it in a message")] = None
    prediction: Annotated[None, refused("predicted outputs are not")] = None
    web_search_options: Annotated[None, refused("there is no web search")] = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, fail_fast=True)
    tools: list[Tool] | None = Field(default=None, fail_fast=True)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(fail_fast=True)
    skip_special_tokens: bool | None = None
