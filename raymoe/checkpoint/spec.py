"""What every process must know about a checkpoint, as plain data.

A `ModelSpec` is made once (`reader.read_spec`, which needs transformers), shipped as JSON, and is
all a group needs to read and run single experts with torch and safetensors alone.

Resident layout of one expert, whatever its layout on disk (D hidden, F expert hidden):

    up      [D, 2F]  gate columns first, then up columns ([D, F] for a family without a gate)
    down    [F, D]
    up_bias [2F], down_bias [D]  only where the family has biases

Weights stand as `[in, out]`, so `x @ up`: faster than `F.linear` at a few tokens an expert.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

FORMAT = 1
"""Of the JSON; a reader refuses any other."""

Pick = Literal["key", "index", "rows"]
"""How an expert is found in a stored tensor: its own key, row e of dim 0, or rows e*n..(e+1)*n."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ExpertMaths:
    """The family's own expert FFN: down(join(up(x))), where join is

    gated:     g, u = halves;  act(min(g, limit)) * (clamp(u, -limit, limit) + up_shift)
               (with `limit_after`, the activated gate is limited instead of its input)
    not gated: act(u)

    `activation` is one of `raymoe.experts.activations.ACTIVATIONS`; "silu" is g * sigmoid(alpha g).
    """

    activation: str
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    limit_after: bool = False
    alpha: float = 1.0
    up_shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which stored tensors make one resident tensor of every expert of a layer.

    keys: stored names, `{}` standing for the expert's number where pick is "key"
    pick: how an expert's part of a stored tensor is found
    rows: with pick "rows", how many rows of dim 0 an expert has
    steps: what is done to the picked parts, in order (`record.STEPS`), until one tensor is left
    shape: of the resident tensor
    """

    tensor: str
    keys: tuple[str, ...]
    pick: Pick
    rows: int = 0
    steps: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One MoE layer: its experts' maths, and where their tensors lie."""

    name: str
    experts: int
    inner: int  # F
    maths: ExpertMaths
    sources: tuple[Source, ...]

    @property
    def parameters(self) -> int:
        """Numbers in one expert of this layer."""
        total = 0
        for source in self.sources:
            count = 1
            for extent in source.shape:
                count *= extent
            total += count
        return total


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A checkpoint's MoE layers, numbered 0..L-1 in execution order, and its identity.

    path: folder of the checkpoint on this machine
    family: `model_type` of its config
    fingerprint: hex; differs when the config, the index, or any weight file's size, header or
        sampled contents differ
    attention: "softmax" where each layer's state is a KV cache of softmax attention; "other" for
        linear attention, Mamba, convolutions, indexed or compressed attention
    """

    path: str
    family: str
    fingerprint: str
    hidden: int  # D
    top_k: int
    attention: Literal["softmax", "other"]
    # of experts' records: the widest of the checkpoint's, or what a quantised format becomes
    stored_dtype: str
    compute_dtype: str
    layer_specs: tuple[LayerSpec, ...]
    quantization: str | None = None  # of the files: "mxfp4", "fp8"

    @property
    def layers(self) -> int:
        return len(self.layer_specs)

    @property
    def experts(self) -> int:
        """Largest number of experts of a layer: the E of every [L, E] array."""
        return max(self.experts_of_layer)

    @property
    def experts_of_layer(self) -> tuple[int, ...]:
        return tuple(layer.experts for layer in self.layer_specs)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Module path of each MoE layer's experts, in execution order."""
        return tuple(layer.name for layer in self.layer_specs)

    @property
    def expert_bytes(self) -> tuple[int, ...]:
        """Bytes of one resident replica, per layer, in the compute dtype."""
        return self.resident_bytes(self.compute_dtype)

    def resident_bytes(self, dtype: str) -> tuple[int, ...]:
        """Bytes of one resident replica, per layer, held in `dtype`."""
        return tuple(layer.parameters * DTYPE_BYTES[dtype] for layer in self.layer_specs)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Raises ValueError for another format, TypeError for unknown or missing fields."""
        fields: dict[str, Any] = json.loads(text)
        if fields.pop("format", None) != FORMAT:
            raise ValueError(f"a model spec of another format than {FORMAT}")
        layers = tuple(_layer(layer) for layer in fields.pop("layer_specs"))
        return cls(**fields, layer_specs=layers)


def _layer(fields: dict[str, Any]) -> LayerSpec:
    return LayerSpec(
        maths=ExpertMaths(**fields.pop("maths")),
        sources=tuple(_source(source) for source in fields.pop("sources")),
        **fields,
    )


def _source(fields: dict[str, Any]) -> Source:
    lists: dict[str, Any] = {name: tuple(fields.pop(name)) for name in ("keys", "steps", "shape")}
    return Source(**fields, **lists)
