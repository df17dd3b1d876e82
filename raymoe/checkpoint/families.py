"""What transformers says of a family: its model class, its experts modules and their maths.

A family is not looked up in a table: the experts modules of a model built without weights show
their parameters, and `ExpertMaths` is proved by running the module's own gate on sample numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from raymoe.checkpoint.spec import ExpertMaths
from raymoe.errors import CheckpointError
from raymoe.experts.activations import ACTIVATIONS, join

NOT_DECORATED = ("DbrxExperts", "Llama4TextExperts", "LongcatFlashExperts", "Step3p7Experts")
"""Experts modules outside transformers' experts interface that dense.py binds by hand."""

NOT_SOFTMAX = (
    "Mamba", "DeltaNet", "DeltaAttention", "Lightning", "ShortConv", "Indexer", "Compressor",
    "LinearAttention", "ZayaCCA", "SSM", "Recurrent", "Retention",
)  # fmt: skip
"""In a module's class name: its state is not a KV cache of softmax attention."""


def load_config(path: Path) -> Any:
    """The transformers config. Raises CheckpointError for families it does not know."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        sentence = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"the config of {path} cannot be used: {sentence}") from None
    config = _text_config(config)
    if hasattr(config, "quantization_config"):  # undone by us, expert by expert (`quantized`)
        del config.quantization_config
    return config


def _text_config(config: Any) -> Any:
    """The language model's part of a config with an image part, where transformers can cut it out.

    Published Llama 4 checkpoints, for one, have such a part. Raises CheckpointError where not.
    """
    text = config.get_text_config()
    if text is config or getattr(model_class(config), "config_class", None) is type(config):
        part = next((n for n in ("vision_config", "audio_config") if hasattr(config, n)), None)
        if part and getattr(config, part) is not None:
            raise CheckpointError(
                f"family {config.model_type!r} has an image or audio part that its language model "
                "cannot be cut from"
            )
        return config
    return text


def model_class(config: Any) -> type[nn.Module]:
    """The family's causal language model. Raises CheckpointError when there is none."""
    found: Any
    try:
        found = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:  # a text config that the auto map does not list, e.g. mistral4
        name = type(config).__name__.replace("Config", "ForCausalLM")
        found = getattr(transformers, name, None)
        if found is None:
            raise CheckpointError(
                f"family {config.model_type!r} has no causal language model in transformers "
                f"{transformers.__version__}"
            ) from None
    # Some entries of the map are pairs of classes; the first is the default.
    chosen: type[nn.Module] = found[0] if isinstance(found, tuple) else found
    return chosen


def without_weights(config: Any) -> nn.Module:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        model: nn.Module = model_class(config)._from_config(config)  # type: ignore[attr-defined]
    return model


def is_decorated(module: nn.Module) -> bool:
    """Whether the module speaks transformers' experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules by module path, in execution order."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_decorated(module) or type(module).__name__ in NOT_DECORATED
    }


def attention_kind(model: nn.Module) -> Literal["softmax", "other"]:
    """Whether every layer's state is a KV cache of softmax attention."""
    for module in model.modules():
        if any(word in type(module).__name__ for word in NOT_SOFTMAX):
            return "other"
    return "softmax"


def experts_count(module: nn.Module) -> int:
    """Routed experts of a module (identity experts, which have no weights, not counted)."""
    count: Any = getattr(module, "num_routed_experts", None) or getattr(module, "num_experts", 0)
    return int(count)


def top_k(config: Any) -> int:
    """Experts a token, the largest over layers. Raises CheckpointError when nothing says it."""
    names = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
    for holder in (config, getattr(config, "ffn_config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, (list, tuple)):
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    raise CheckpointError(f"family {config.model_type!r} does not say how many experts a token has")


def maths_of(module: nn.Module, family: str) -> ExpertMaths:
    """The module's maths as data, proved on sample numbers.

    Raises CheckpointError naming the family when no known form gives the module's own numbers.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise CheckpointError(
            f"family {family!r} normalises inside each expert, which is not supported"
        )
    gated = bool(getattr(module, "has_gate", True))
    sample = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 12
    interleaved = not getattr(module, "is_concatenated", True)
    stored = sample.view(64, 2, 16).transpose(1, 2).reshape(64, 32) if interleaved else sample
    truth = _own_join(module, stored, gated)
    for maths in _candidates(module, gated):
        *gate, up = sample.clone().chunk(2 if gated else 1, dim=-1)
        ours = join(maths, gate[0] if gate else None, up, torch.empty_like(truth))
        if torch.allclose(ours, truth, rtol=1e-5, atol=1e-6):
            return replace(maths, bias=bool(getattr(module, "has_bias", False)))
    raise CheckpointError(
        f"the expert FFN of family {family!r} ({type(module).__name__}) is not one that "
        "raymoe can compute"
    )


@torch.no_grad()
def _own_join(module: Any, stored: torch.Tensor, gated: bool) -> torch.Tensor:
    """The family's own activation of the first product, by its own code."""
    result: torch.Tensor
    if hasattr(module, "_apply_gate") and gated:
        result = module._apply_gate(stored)
    else:
        own = getattr(module, "act_fn", None) or module.mlp.activation_fn  # DBRX keeps it deeper
        gate, up = stored.chunk(2, dim=-1)
        result = own(gate) * up if gated else own(stored)
    return result


def _candidates(module: nn.Module, gated: bool) -> Iterator[ExpertMaths]:
    """Forms to try: plain activations first, then the limited ones with the module's constants."""
    for activation in ACTIVATIONS:
        yield ExpertMaths(activation=activation, gated=gated)
    limit = getattr(module, "limit", None) or getattr(module, "swiglu_limit", None)
    alpha = getattr(module, "alpha", None) or getattr(module, "swiglu_alpha", None) or 1.0
    if gated and isinstance(limit, (int, float)):
        limited = ExpertMaths(activation="silu", limit=float(limit))
        yield limited
        yield replace(limited, alpha=float(alpha), up_shift=1.0)
        yield replace(limited, limit_after=True)
