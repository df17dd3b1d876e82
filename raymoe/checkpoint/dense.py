"""The dense part of a model alone: attention, gate, embeddings, shared experts; no routed experts.

The model is transformers' own. Before its weights are read, while it is still shapes on the meta
device, the routed experts' parameters are taken out; `from_pretrained` then never reads them. Each
MoE layer calls `experts` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from raymoe.checkpoint.families import (
    experts_count,
    experts_modules,
    is_decorated,
    load_config,
    model_class,
)
from raymoe.checkpoint.files import WeightFiles
from raymoe.checkpoint.overlap import Beside, move_beside
from raymoe.checkpoint.quantized import from_fp8, scale_key
from raymoe.checkpoint.sources import targets
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import CheckpointError

IMPLEMENTATION = "raymoe"
"""Our name in transformers' registry of experts functions."""

LARGEST_TURNED = 1 << 20
"""Numbers of the largest weight that is stored [in, out]."""


class Experts(Protocol):
    """Where the routed experts are (`raymoe.engine.seam`): in this process, or in groups."""

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Any:
        """hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K] -> something pending."""

    def combine(self, pending: Any) -> Tensor:
        """-> [T, D], in hidden's dtype."""


def load_dense(
    spec: ModelSpec,
    experts: Experts,
    *,
    dtype: str = "float32",
    attention: str | None = None,
    device: str = "cpu",
) -> nn.Module:
    """The model in eval mode on `device`, with `experts` called at every MoE layer.

    `attention` is a name registered with transformers; None leaves the family's default.
    Raises CheckpointError when a dense weight is missing.
    """
    config = load_config(Path(spec.path))
    base: Any = model_class(config)

    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _take_out_experts(self)

    # The class keeps its base's name and module: transformers looks up conversions by the name, and
    # the module's source to see whether the experts implementation can be set.
    dense: Any = type(
        base.__name__,
        (base,),
        {
            "__init__": construct,
            "__module__": base.__module__,
            # Experts, and perhaps an image part; what the dense part needs shows in missing_keys.
            "_keys_to_ignore_on_load_unexpected": ["."],
        },
    )
    extra = {} if attention is None else {"attn_implementation": attention}
    try:
        with _no_progress_bar():
            model, info = dense.from_pretrained(
                spec.path,
                config=config,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                use_safetensors=True,
                **extra,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the dense part of {spec.path} does not load: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{spec.path} lacks {len(missing)} weights of its dense part, such as {missing[0]}"
        )
    if spec.quantization == "fp8":
        _apply_scales(model, WeightFiles(Path(spec.path)))
    model.to(device)
    bind(model, spec, experts)
    lay_out(model)
    evaluated: nn.Module = model.eval()
    return evaluated


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers' bar would count tensors; the CLI shows progress of its own."""
    progress: Any = logging  # its functions carry no types
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            progress.enable_progress_bar()


def _take_out_experts(model: nn.Module) -> None:
    for module in experts_modules(model).values():
        for name, _ in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            delattr(holder, leaf)
            holder.register_parameter(leaf, None)
        for part in module.modules():
            part._is_hf_initialized = True  # type: ignore[assignment]  # or it is drawn anew


@torch.no_grad()
def _apply_scales(model: nn.Module, files: WeightFiles) -> None:
    """Multiply each dense weight that was read from FP8 by its scales."""
    parameters = dict(model.named_parameters())
    for key, target, _, _ in targets(model, files):
        if files.dtype(key) == "F8_E4M3" and target in parameters:
            weight = from_fp8(files.tensor(key), files.tensor(scale_key(key)))
            parameters[target].copy_(weight)


@torch.no_grad()
def lay_out(model: nn.Module) -> None:
    """Store small weights of linear layers [in, out] on CPUs; they look as before.

    4 to 32 rows take 0.5 to 0.9 of the time then, other counts the same (2 rows: 1.2). Matrices of
    2048 x 2048 lose from 16 rows on and stay. A weight shared with an embedding, which reads rows,
    is copied.
    """
    embedded = {
        module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)
    }
    for module in model.modules():
        if type(module) is not nn.Linear or module.weight.device.type != "cpu":
            continue
        weight = module.weight
        if weight.dtype is not torch.float32 or weight.numel() > LARGEST_TURNED:
            continue
        turned = weight.t().contiguous().t()  # [out, in], strides (1, out)
        if weight.data_ptr() in embedded:
            module.weight = nn.Parameter(turned, requires_grad=False)
        else:
            weight.data = turned


def bind(model: Any, spec: ModelSpec, experts: Experts) -> None:
    """Let every MoE layer of `model` call `experts` with its layer number."""
    modules = experts_modules(model)
    assert tuple(modules) == spec.layer_names
    calls: dict[str, _Call] = {}
    for layer, (name, module) in enumerate(modules.items()):
        kind = _IdentityCall if type(module).__name__ == "LongcatFlashExperts" else _Call
        call = calls[name] = kind(experts, layer, experts_count(module))
        if is_decorated(module):
            object.__setattr__(module, "_raymoe_call", call)
        elif type(module).__name__ == "Llama4TextExperts":
            block = model.get_submodule(name.rpartition(".")[0])
            block.forward = _Llama4Forward(block, call)
        else:
            module.forward = call
    if any(map(is_decorated, modules.values())):
        model.set_experts_implementation(IMPLEMENTATION)
    for name, call in calls.items():
        overlap_shared(model.get_submodule(name.rpartition(".")[0]), call, spec.hidden)


def overlap_shared(block: nn.Module, call: _Call, width: int) -> None:
    """Let a block's shared experts, if it has any, be computed while the routed ones are."""
    experts = call.experts

    def use(beside: Beside | None) -> None:
        call.beside = beside

    call.experts = _Silent()
    try:
        move_beside(block, use, width)
    finally:
        call.experts = experts


class _Silent:
    """Experts whose every sum is the token itself."""

    def dispatch(
        self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Tensor:
        return hidden

    def combine(self, pending: Tensor) -> Tensor:
        return pending


class _Call:
    """One MoE layer's way to its experts."""

    def __init__(self, experts: Experts, layer: int, count: int) -> None:
        self.experts = experts
        self._layer = layer
        self._count = count
        self.beside: Beside | None = None  # computed while the experts are

    def __call__(self, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Tensor:
        """[..., D], [T, K], [T, K] -> [..., D]; ids past the routed experts mean identity."""
        flat = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
        pending = self.experts.dispatch(self._layer, flat, expert_ids, gate_weights)
        if self.beside is not None:
            self.beside(flat)
        return self.experts.combine(pending).view(hidden.shape)


class _IdentityCall(_Call):
    """longcat: ids from `count` on are identity experts, which stay in the router."""

    def __call__(self, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Tensor:
        identity = expert_ids >= self._count  # [T, K]
        kept = (gate_weights * identity).sum(-1, keepdim=True)  # [T, 1]
        routed = super().__call__(
            hidden, expert_ids.masked_fill(identity, 0), gate_weights.masked_fill(identity, 0.0)
        )
        return routed + (hidden.view(-1, hidden.shape[-1]) * kept).view(hidden.shape).to(
            hidden.dtype
        )


class _Llama4Forward:
    """Llama 4 multiplies the experts' input, not their output, by the gate's score."""

    def __init__(self, block: Any, call: _Call) -> None:
        self._block = block
        self._call = call

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        block = self._block
        hidden = hidden.reshape(-1, block.hidden_dim)  # [T, D]
        scores, logits = block.router(hidden)  # [T, E] each, zero score where not chosen
        ids = torch.topk(logits, block.top_k, dim=1).indices  # [T, K]
        chosen = scores.gather(1, ids)
        scaled = (hidden.unsqueeze(1) * chosen.unsqueeze(-1)).flatten(0, 1)  # [T*K, D]
        ones = torch.ones(scaled.shape[0], 1, dtype=hidden.dtype, device=hidden.device)
        made: list[Tensor] = []
        self._call.beside = lambda _: made.append(block.shared_expert(hidden))
        routed = self._call(scaled, ids.reshape(-1, 1), ones)
        (shared,) = made
        return shared + routed.view(-1, block.top_k, block.hidden_dim).sum(1), logits


def _experts_function(
    module: Any, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
) -> Tensor:
    result: Tensor = module._raymoe_call(hidden, expert_ids, gate_weights)
    return result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_function)
