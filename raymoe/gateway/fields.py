"""Types of fields that clients give in several forms: checked here, each brought into one form."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import from_json

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


def refused(reason: str) -> BeforeValidator:
    """For a field that is known and may not be given, with the reason."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise ValueError(f"not supported: {reason}")

    return BeforeValidator(refuse)


def read_json(text: str) -> Any:
    """JSON inside a string, under the rules of the body around it: not too deep, no NaN, no half
    of a character. ValueError."""
    return from_json(text, allow_inf_nan=False)


def _json_schema(value: Any) -> Any:
    """A schema as an object, or as the text of one."""
    if isinstance(value, str):
        try:
            value = read_json(value)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be a JSON schema: an object, or its text")
    return value


_STRING_OR_OBJECT = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}
Stops = Annotated[tuple[str, ...], BeforeValidator(_stop), WithJsonSchema(_STRING_OR_STRINGS)]
Ignored = Annotated[Any, Field(description="Accepted, has no effect.")]


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


Schema = Annotated[
    dict[str, Any] | None, BeforeValidator(_json_schema), WithJsonSchema(_STRING_OR_OBJECT)
]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]
LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(_logit_bias),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
Content = Annotated[
    str | None, BeforeValidator(_content), WithJsonSchema({"type": ["string", "array", "null"]})
]
ToolChoice = Annotated[Any, BeforeValidator(_tool_choice), WithJsonSchema(_TOOL_CHOICE)]
Modalities = Annotated[
    None, BeforeValidator(_modalities), WithJsonSchema({"enum": [["text"], None]})
]
Prompts = Annotated[
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
