"""A folder or a hub id -> `ModelSpec`; for the CLI and the router, as it imports transformers."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raymoe.checkpoint.families import (
    attention_kind,
    experts_count,
    experts_modules,
    load_config,
    maths_of,
    top_k,
    without_weights,
)
from raymoe.checkpoint.files import WeightFiles, fingerprint, read_config
from raymoe.checkpoint.quantized import quantization_of
from raymoe.checkpoint.sources import layer_sources, stored_parameters
from raymoe.checkpoint.spec import LayerSpec, ModelSpec
from raymoe.errors import CheckpointError

STORED_DTYPES = {
    "": {"F32": "float32", "BF16": "bfloat16", "F16": "float16"},
    "fp8": {"F8_E4M3": "float32"},  # times its float32 scale
    "mxfp4": {"U8": "bfloat16"},  # exact
}
"""What a tensor becomes when it is read, by the step that undoes its format and how its file holds
it."""

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def read_spec(path_or_hub_id: str | Path, *, compute_dtype: str = "float32") -> ModelSpec:
    """Read and check everything but the weights' values.

    Raises CheckpointError, one sentence, when the checkpoint is missing, corrupt, not an MoE, holds
    only pickled weights, needs remote code, is quantised in a way that is not supported (named), or
    is of a family whose experts do not fit (named).
    """
    path = find(path_or_hub_id)
    raw = read_config(path)
    refuse_remote_code(path, raw)
    quantization = quantization_of(path, raw)
    config = load_config(path)
    family = str(config.model_type)
    model = without_weights(config)
    modules = experts_modules(model)
    if not modules:
        raise CheckpointError(f"{path} is not a mixture of experts raymoe can serve ({family!r})")
    files = WeightFiles(path)
    files.check()
    stored = stored_parameters(model, files)
    layers = tuple(
        _layer(name, module, stored[name], files, family) for name, module in modules.items()
    )
    hidden = {layer.sources[0].shape[0] for layer in layers}
    if len(hidden) != 1:
        raise CheckpointError(f"experts of {path} differ in their input width: {sorted(hidden)}")
    return ModelSpec(
        path=str(path),
        family=family,
        fingerprint=fingerprint(path, files.files),
        hidden=hidden.pop(),
        top_k=top_k(config),
        attention=attention_kind(model),
        stored_dtype=_stored_dtype(layers, files),
        compute_dtype=compute_dtype,
        layer_specs=layers,
        quantization=quantization,
    )


def find(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or where the hub's snapshot of that id was put (downloaded if need be)."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path.resolve()
    name = str(path_or_hub_id)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is not a folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises many kinds, all mean the same here
        sentence = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{name} is neither a folder nor a hub checkpoint that can be fetched: {sentence}"
        ) from None


def refuse_remote_code(path: Path, raw: dict[str, Any]) -> None:
    """A family that transformers does not know and that brings its own code."""
    from transformers import CONFIG_MAPPING

    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path} needs code of its own to be run (auto_map), which raymoe never does; "
            f"its family {raw.get('model_type')!r} is not in transformers"
        )


def _layer(
    name: str, module: nn.Module, stored: dict[str, Any], files: WeightFiles, family: str
) -> LayerSpec:
    maths = maths_of(module, family)
    sources = layer_sources(module, stored, files, name)
    (down,) = [source for source in sources if source.tensor == "down"]
    return LayerSpec(
        name=name,
        experts=experts_count(module),
        inner=down.shape[0],
        maths=maths,
        sources=sources,
    )


def _stored_dtype(layers: tuple[LayerSpec, ...], files: WeightFiles) -> str:
    """The narrowest dtype that holds all tensors of all experts as they are stored: some files mix
    dtypes, and nothing may be rounded on the way to a group. 20 ms for 45,000 tensors."""
    found: set[str] = set()
    for layer in layers:
        for source in layer.sources:
            undo = source.steps[0] if source.steps and source.steps[0] in STORED_DTYPES else ""
            readable = STORED_DTYPES[undo]
            weights = source.keys[::2] if undo else source.keys  # between them are their scales
            for key in weights:
                for expert in range(layer.experts if source.pick == "key" else 1):
                    stored = files.dtype(key.format(expert))
                    if stored not in readable:
                        raise CheckpointError(
                            f"{files.path} stores {key.format(expert)} as {stored}, which is not "
                            f"supported here: only {', '.join(readable)}"
                        )
                    found.add(readable[stored])
    dtypes = [getattr(torch, name) for name in sorted(found)]
    return str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")
