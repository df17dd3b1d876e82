"""What a model's configs say of its use: the ids that end a text, the longest context."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any


def eos_ids(model: Any) -> frozenset[int]:
    """Ids that end a text: the generation config's, else the model config's."""
    for source in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def longest_context(model: Any) -> int:
    """Tokens of prompt and output together that the model can be used with.

    Two kinds of rotary embedding ("dynamic", "longrope") change their frequencies for the whole
    batch as soon as one position passes the length trained with, so that a long request would
    change the tokens of every other one. They are used up to that length only.
    """
    config = model.config.get_text_config()
    own = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            own.append(rope.get("original_max_position_embeddings"))
            own.append(getattr(config, "original_max_position_embeddings", None))
    return min(limit for limit in (*own, sys.maxsize) if limit is not None)


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The one set of rotary parameters, or those of each layer type."""
    if isinstance(parameters, Mapping):
        yield parameters
        for each in parameters.values():
            yield from _ropes(each)
