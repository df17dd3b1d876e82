"""What /openapi.json says of bodies and answers. Bodies are read by hand, to answer errors our
way, so FastAPI cannot describe them; every status that a route can answer with is listed."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from raymoe.gateway.admin_bodies import DrainBody, DryRunBody, PinBody, ScaleBody
from raymoe.gateway.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

Schema = dict[str, Any]
_SCHEMAS = "#/components/schemas/"
_BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody)
_ADMIN_BODIES = (ScaleBody, DrainBody, PinBody, DryRunBody)
_SAYS = {
    400: "A field has a value that cannot be served; `param` names it",
    401: "The admin token is missing or wrong: Authorization: Bearer TOKEN",
    404: "No such model or path",
    409: "It cannot be done; the sentence says why",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Too many requests are in flight; Retry-After says when to try again",
    503: "No router can be reached, or the generation failed",
    504: "The request took longer than allowed",
}
_GENERATES = (400, 404, 413, 429, 503, 504)
_ADMIN = (400, 401, 409, 413, 415, 503)
_CHANGES = ("scale", "drain", "pin", "evict")


def body_of(model: type[BaseModel]) -> Schema:
    """A route's `openapi_extra`: the body it reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _named(model.__name__)}},
        }
    }


def describe(app: FastAPI) -> None:
    """Completes the application's schema, once every route is there."""
    plain = app.openapi

    def described() -> Schema:
        schema = plain()
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        if "Error" not in components:
            _complete(schema, components)
        return schema

    app.openapi = described  # type: ignore[method-assign]


def _complete(schema: Schema, components: Schema) -> None:
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (one, "validation") for one in (*_BODIES, *_ADMIN_BODIES)
    ]
    _, definitions = models_json_schema(models, ref_template=_SCHEMAS + "{model}")
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, never given
        components.pop(unused, None)
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    components.update(definitions["$defs"])
    components.update(_ANSWERS)
    for path, (answer, statuses) in _ROUTES.items():
        for operation in schema["paths"].get(path, {}).values():
            responses = operation["responses"]
            if answer is None:
                responses.pop("200", None)
            else:
                responses["200"] = {"description": "The answer", "content": answer}
            for status in statuses:
                responses[str(status)] = {
                    "description": _SAYS[status],
                    "content": {"application/json": {"schema": _named("Error")}},
                }


def _named(name: str) -> Schema:
    return {"$ref": _SCHEMAS + name}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _streamed(name: str) -> Schema:
    return {**_json(_named(name)), "text/event-stream": {"schema": {"type": "string"}}}


def _object(properties: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_STRING, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_MAYBE: Schema = {"type": ["string", "null"]}
_MAYBE_OBJECT = {"type": ["object", "null"]}
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_CALL = _object(
    {
        "id": _STRING,
        "type": {"const": "function"},
        "function": _object({"name": _STRING, "arguments": _STRING}),
    }
)
_MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": _MAYBE, "refusal": _MAYBE},
    {"tool_calls": _list(_CALL)},
)
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)


def _answer(kind: str, output: Schema) -> Schema:
    output = {"index": _COUNT, "logprobs": _MAYBE_OBJECT, "finish_reason": _FINISH, **output}
    return _object(
        {
            "id": _STRING,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _STRING,
            "choices": _list(_object(output)),
            "usage": _named("Usage"),
        }
    )


_MODEL = _object(
    {
        "id": _STRING,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _STRING,
        "max_model_len": {"type": ["integer", "null"]},
    }
)
_AMOUNT = {"type": "number"}
_MAYBE_AMOUNT: Schema = {"type": ["number", "null"]}
_CELL: Schema = {"layer": _COUNT, "expert": _COUNT, "group": _STRING}
_INTENT = _object(
    {
        "members": _list(_object({"id": _STRING, "kind": _STRING, "draining": _STRING})),
        "pins": _list(_object({**_CELL, "keep": {"type": "boolean"}})),
    }
)
_MOVE = {"kind": {"enum": ["add", "replace", "move", "swap"]}, "layer": _COUNT, "expert": _COUNT}
_MOVE |= {"source": _STRING, "target": _STRING, "bytes": _COUNT}
_MOVE |= {"gain_s": _AMOUNT, "price_s": _AMOUNT}
_DRY_RUN = _object(
    {
        "helps": {"type": "boolean"},
        "answer": _STRING,
        "measured": {"type": "boolean"},
        "mode": {"enum": ["full", "delta", "keep"]},
        "time_before": _MAYBE_AMOUNT,
        "time_after": _MAYBE_AMOUNT,
        "gain": _MAYBE_AMOUNT,
        "loads": _COUNT,
        "drops": _COUNT,
        "loaded_bytes": _COUNT,
        "loading_s": _AMOUNT,
        "owed": _COUNT,
        "actions": _list(_object(_MOVE)),
        "reasons": _list(_STRING),
        "horizon_s": _AMOUNT,
        "margin": _AMOUNT,
        "without": _list(_STRING),
    }
)
_ERROR = {"message": _STRING, "type": _STRING, "param": _MAYBE, "code": _MAYBE}
_ANSWERS: Schema = {
    "Error": _object({"error": _object(_ERROR)}),
    "Usage": _USAGE,
    "Completion": _answer("text_completion", {"text": _STRING}),
    "ChatCompletion": _answer("chat.completion", {"message": _MESSAGE}),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_named("Model"))}),
    "Tokens": _object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": _list(_COUNT)},
        {"token_strs": _list(_STRING)},
    ),
    "Text": _object({"prompt": _STRING}),
    "Intent": _INTENT,
    "DryRun": _DRY_RUN,
}
_ROUTES: dict[str, tuple[Schema | None, tuple[int, ...]]] = {
    "/v1/completions": (_streamed("Completion"), _GENERATES),
    "/v1/chat/completions": (_streamed("ChatCompletion"), _GENERATES),
    "/v1/embeddings": (None, (400,)),
    "/v1/models": (_json(_named("Models")), ()),
    "/v1/models/{model_id}": (_json(_named("Model")), (404,)),
    "/tokenize": (_json(_named("Tokens")), (400, 404, 413, 429, 503)),
    "/detokenize": (_json(_named("Text")), (400, 404, 413, 429, 503)),
    "/health": (_json(_object({"status": _STRING, "routers": _COUNT})), (503,)),
    "/metrics": ({"text/plain": {"schema": _STRING}}, (503,)),
    "/placement": (_json({"type": "object"}), (404, 503)),
    "/placement/dry-run": (_json(_named("DryRun")), (400, 409, 413, 415, 503)),
    "/placement/history": (_json({"type": "object"}), (503,)),
    "/status": (_json({"type": "object"}), (503,)),
    **{f"/{name}": (_json(_named("Intent")), _ADMIN) for name in _CHANGES},
}
"""Path -> (what a 200 holds, None when there is none; the errors)."""
