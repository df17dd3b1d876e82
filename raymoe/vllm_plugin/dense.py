"""The stored tensors of a checkpoint that are no routed expert's: all that an engine reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from raymoe.checkpoint.files import WeightFiles
from raymoe.checkpoint.spec import ModelSpec


def expert_stems(spec: ModelSpec) -> frozenset[str]:
    """Stored names of every expert tensor without their last part, so that scales and biases
    beside a weight (`...experts.3.up_proj.weight_scale_inv`) count as the expert's too.

    A tensor of all experts of a layer (`...experts.gate_up_proj`) stands under its own name.
    """
    stems: set[str] = set()
    for layer in spec.layer_specs:
        for source in layer.sources:
            for key in source.keys:
                if source.pick == "key":
                    stems.update(key.format(e).rpartition(".")[0] for e in range(layer.experts))
                else:
                    stems.add(key)
    return frozenset(stems)


def is_experts(name: str, stems: frozenset[str]) -> bool:
    """Whether a stored tensor belongs to routed experts."""
    if name in stems or name.rpartition(".")[0] in stems:
        return True
    # beside a tensor of all experts: `gate_up_proj_bias`, `gate_up_proj_scales`, `_scale_inv`
    head, _, _ = name.rpartition("_")
    while head:
        if head in stems:
            return True
        head, _, _ = head.rpartition("_")
    return False


def dense_weights(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of everything else, file by file; experts are not even opened."""
    files = WeightFiles(Path(spec.path))
    stems = expert_stems(spec)
    for name in sorted(files.file_of_key, key=lambda n: (files.file_of_key[n], n)):
        if not is_experts(name, stems):
            yield name, files.tensor(name)
