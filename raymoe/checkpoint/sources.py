"""Where each expert tensor lies on disk: transformers' own conversion mapping, turned into data.

transformers knows how every family's stored names and layouts become its fused 3-D parameters.
Those operations act on whole stacks of experts; here each becomes a step on one expert's tensors,
so that an expert can be read alone (`record.load_expert`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from raymoe.checkpoint.families import experts_count, experts_modules
from raymoe.checkpoint.files import WeightFiles
from raymoe.checkpoint.quantized import scale_key
from raymoe.checkpoint.spec import Pick, Source
from raymoe.errors import CheckpointError

RESIDENT = {
    "gate_up_proj": "up", "up_proj": "up", "down_proj": "down",
    "gate_up_proj_bias": "up_bias", "up_proj_bias": "up_bias", "down_proj_bias": "down_bias",
}  # fmt: skip
"""transformers' parameter names -> resident names."""

BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of an MXFP4 parameter's two tensors."""

Stored = dict[str, dict[str, tuple[Any, dict[str, list[str]]]]]
"""experts module -> parameter -> (converter or None, {source pattern: stored keys})."""


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts experts.10 after experts.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def targets(model: nn.Module, files: WeightFiles) -> Iterator[tuple[str, str, Any, str]]:
    """(stored key, parameter it goes to, converter or None, matched pattern), in natural order.

    Keys that go to no parameter of the model are left out.
    """
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    shapes = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    for key in sorted(files.file_of_key, key=_natural):
        plain = key.removesuffix(BLOCKS)
        target, pattern = rename_source_key(plain, renamings, converters, prefix, shapes)
        if target in shapes:
            yield key, target, converter_of.get(pattern or ""), pattern or key


def stored_parameters(model: nn.Module, files: WeightFiles) -> Stored:
    """Which stored keys make which parameter of which experts module."""
    found: Stored = {name: {} for name in experts_modules(model)}
    for key, target, converter, pattern in targets(model, files):
        owner = next((name for name in _parents(target) if name in found), None)
        if owner is not None:
            of_parameter = found[owner].setdefault(
                target[len(owner) + 1 :], (converter, defaultdict(list))
            )
            of_parameter[1][pattern].append(key)
    return found


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def layer_sources(
    module: nn.Module, stored: dict[str, tuple[Any, dict[str, list[str]]]], files: WeightFiles,
    name: str,
) -> tuple[Source, ...]:  # fmt: skip
    """The sources of every resident tensor of one experts module, sorted up, down, biases."""
    missing = [param for param, _ in module.named_parameters() if param not in stored]
    if missing:
        raise CheckpointError(f"{files.path} lacks {', '.join(missing)} of the experts {name}")
    if "mlp.w1" in stored:
        return _dbrx_sources(module, stored)
    order = list(RESIDENT.values())
    sources = [
        _source(module, param, *stored[param], files=files, name=name)
        for param, _ in module.named_parameters()
    ]
    return tuple(sorted(sources, key=lambda source: order.index(source.tensor)))


def _source(
    module: nn.Module, param: str, converter: Any, keys_of: dict[str, list[str]], *,
    files: WeightFiles, name: str,
) -> Source:  # fmt: skip
    if param not in RESIDENT:
        raise CheckpointError(
            f"{type(module).__name__} has a parameter {param} that is not supported"
        )
    tensor, experts = RESIDENT[param], experts_count(module)
    patterns = converter.source_patterns if converter else list(keys_of)
    steps: list[str] = []
    pick: Pick = "index"
    full = tuple(module.get_parameter(param).shape[1:])
    for operation in converter.operations if converter else ():
        if isinstance(operation, MergeModulelist) and operation.dim == 0:
            pick = "key"
        elif isinstance(operation, Concatenate) and operation.dim == 1:
            steps.append("concat")
        elif isinstance(operation, Transpose) and (operation.dim0, operation.dim1) == (1, 2):
            stored_shape = files.shape(keys_of[patterns[0]][0])[1:]
            if not operation.check_dims or stored_shape != full:
                steps.append("transpose")
        elif isinstance(operation, Interleave) and operation.dim == 1:
            steps.append("deinterleave" if operation.inverse is False else "interleave")
        else:
            raise CheckpointError(f"experts stored by {operation!r} ({name}) are not supported")
    if len(full) == 2 and not getattr(module, "is_transposed", _stored_in_out(module)):
        steps.append("transpose")
        full = full[::-1]
    if tensor.startswith("up") and not getattr(module, "is_concatenated", True):
        steps.append("halves")
    keys = tuple(_template(keys_of[p], experts, pick, files, name) for p in patterns)
    keys, undo = _quantized(keys, files, experts)
    return Source(tensor=tensor, keys=keys, pick=pick, steps=(*undo, *steps), shape=full)


def _quantized(
    keys: tuple[str, ...], files: WeightFiles, experts: int
) -> tuple[tuple[str, ...], list[str]]:
    """The keys with their scales' keys between them, and the steps that undo the format."""
    if keys[0].endswith(BLOCKS):
        steps, pairs = ["mxfp4", "transpose"], [(k, k.removesuffix(BLOCKS) + SCALES) for k in keys]
    elif files.dtype(keys[0].format(0)) == "F8_E4M3":
        steps, pairs = ["fp8"], [(key, scale_key(key)) for key in keys]
    else:
        return keys, []
    for _, scales in pairs:
        for expert in range(experts):
            if scales.format(expert) not in files.file_of_key:
                raise CheckpointError(f"{files.path} lacks the scales {scales.format(expert)}")
    return tuple(key for pair in pairs for key in pair), steps


def _stored_in_out(module: nn.Module) -> bool:
    """Undecorated modules do not say how their weights stand."""
    return type(module).__name__ == "Llama4TextExperts"


def _template(keys: list[str], experts: int, pick: Pick, files: WeightFiles, name: str) -> str:
    """One key with `{}` for the expert, checked against every expert's real key."""
    if pick == "index":
        if len(keys) != 1 or files.shape(keys[0])[0] < experts:
            raise CheckpointError(f"{files.path} lacks experts of {name}: {keys}")
        return keys[0]
    if len(keys) < experts:
        raise CheckpointError(
            f"{files.path} holds {len(keys)} experts of {name}, its config says {experts}"
        )
    for match in re.finditer(r"(?<=\.)0(?=\.)", keys[0]):
        template = keys[0][: match.start()] + "{}" + keys[0][match.end() :]
        if all(template.format(expert) == keys[expert] for expert in range(experts)):
            return template
    raise CheckpointError(f"{files.path} lacks experts of {name} between {keys[0]} and {keys[-1]}")


def _dbrx_sources(
    module: Any, stored: dict[str, tuple[Any, dict[str, list[str]]]]
) -> tuple[Source, ...]:
    """DBRX stacks experts along dim 0 of 2-D tensors: w1 gate, v1 up, w2 already [F, D]."""
    key = {param: next(iter(entry[1].values()))[0] for param, entry in stored.items()}
    inner, hidden = int(module.ffn_hidden_size), int(module.hidden_size)
    return (
        Source(
            tensor="up", keys=(key["mlp.w1"], key["mlp.v1"]), pick="rows", rows=inner,
            steps=("concat", "transpose"), shape=(hidden, 2 * inner),
        ),
        Source(
            tensor="down", keys=(key["mlp.w2"],), pick="rows", rows=inner,
            shape=(inner, hidden),
        ),
    )  # fmt: skip
