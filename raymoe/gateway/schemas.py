"""The bodies clients may send. Strict: no "1" for 1, no unknown field, no silent default.

A few OpenAI fields are accepted and have no effect, because clients send them as a matter of
course and nothing in the answer depends on them: `user`, `metadata`, `store`, `service_tier`,
`safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `prompt_cache_options`, and
`parallel_tool_calls`.
Fields that would change the answer and cannot be honoured are refused by name.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

INT64_MAX = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOP_LOGPROBS = 20
MAX_N = 128

_STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def _stop(value: Any) -> Any:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are allowed, got {len(stops)}")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def _logit_bias(value: Any) -> Any:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids to numbers")
    pairs = []
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12):
            raise ValueError(f"{key!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _prompt(value: Any) -> Any:
    """To a tuple of prompts, each a str or a tuple of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if _is_ids(value):
            return (tuple(value),)
        if all(isinstance(one, list) and one and _is_ids(one) for one in value):
            return tuple(map(tuple, value))
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of them, "
        "and not empty"
    )


def _is_ids(values: list[Any]) -> bool:
    return all(type(one) is int for one in values)


def _refused(reason: str) -> BeforeValidator:
    def refuse(value: Any) -> None:
        if value is not None:
            raise ValueError(f"not supported: {reason}")

    return BeforeValidator(refuse)


def _json_schema(value: Any) -> Any:
    """A schema as an object, or as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be a JSON schema: an object, or its text")
    return value


_STRING_OR_OBJECT = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}
Stops = Annotated[tuple[str, ...], BeforeValidator(_stop), WithJsonSchema(_STRING_OR_STRINGS)]
Ignored = Annotated[Any, Field(description="Accepted, has no effect.")]


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


Schema = Annotated[
    dict[str, Any] | None, BeforeValidator(_json_schema), WithJsonSchema(_STRING_OR_OBJECT)
]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]


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
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        BeforeValidator(_logit_bias),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
    ] = ()
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
    use_beam_search: Annotated[None, _refused("use 'best_of', which draws and ranks")] = None
    length_penalty: Annotated[None, _refused("there is no beam search")] = None
    bad_words: Annotated[None, _refused("use 'logit_bias' or 'guided_regex'")] = None
    allowed_token_ids: Annotated[None, _refused("use 'logit_bias' or 'guided_choice'")] = None
    logits_processors: Annotated[None, _refused("clients cannot bring code")] = None
    prompt_logprobs: Annotated[None, _refused("use 'echo' with 'logprobs' in completions")] = None
    truncate_prompt_tokens: Annotated[None, _refused("prompts are never cut")] = None
    guided_whitespace_pattern: Annotated[None, _refused("it is [ \\n\\t]{0,32}")] = None
    guided_decoding_backend: Annotated[None, _refused("there is one")] = None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[
        tuple[Any, ...],
        BeforeValidator(_prompt),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"type": "string"}},
                    {"type": "array", "minItems": 1, "items": {"type": "integer"}},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "integer"},
                        },
                    },
                ]
            }
        ),
    ]
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: Annotated[None, _refused("this model cannot fill in before a suffix")] = None


class Function(BaseModel):
    """A function's declaration; what else it holds is for the template to use."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


def _content(value: Any) -> Any:
    """Text, or text parts; any other kind of part is refused by its name."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise ValueError(f"a part of the type {kind!r} is not supported, only 'text'")
        if not isinstance(part.get(kind), str):
            raise ValueError(f"a {kind} part needs a string '{kind}'")
    return "".join(part[part["type"]] for part in value)


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
    content: Annotated[
        str | None, BeforeValidator(_content), WithJsonSchema({"type": ["string", "array", "null"]})
    ] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Annotated[None, _refused("only text is")] = None
    function_call: Annotated[None, _refused("use 'tool_calls'")] = None


_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required", None]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}


class NamedChoice(NamedTuple):
    """The function that must be called."""

    name: str


def _tool_choice(value: Any) -> Any:
    if value in (None, "none", "auto", "required"):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be 'none', 'auto', 'required' or an object that names a function")
    kind, function = value.get("type"), value.get("function")
    if kind != "function":
        raise ValueError(f"the type {kind!r} is not supported, only 'function'")
    name = function.get("name") if isinstance(function, dict) and len(function) == 1 else None
    if not isinstance(name, str) or len(value) > 2:
        raise ValueError('must look like {"type": "function", "function": {"name": "..."}}')
    return NamedChoice(name)


def _modalities(value: Any) -> Any:
    if value in (None, ["text"]):
        return None
    raise ValueError("only ['text'] is supported")


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice), WithJsonSchema(_TOOL_CHOICE)] = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Annotated[
        None, BeforeValidator(_modalities), WithJsonSchema({"enum": [["text"], None]})
    ] = None
    audio: Annotated[None, _refused("only text is")] = None
    functions: Annotated[None, _refused("use 'tools'")] = None
    function_call: Annotated[None, _refused("use 'tool_choice'")] = None
    documents: Annotated[None, _refused("put their text into a message")] = None
    chat_template: Annotated[None, _refused("the checkpoint's own is used")] = None
    moderation: Annotated[None, _refused("nothing is moderated here")] = None
    verbosity: Annotated[None, _refused("ask for it in a message")] = None
    prediction: Annotated[None, _refused("predicted outputs are not")] = None
    web_search_options: Annotated[None, _refused("there is no web search")] = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
    skip_special_tokens: bool | None = None
