"""raymoe::dispatch and raymoe::combine: what torch.compile sees of the experts, and nothing more.

Everything that is decided at run time is decided inside these ops. A branch outside would be traced
once, in vLLM's warm-up run, and stay as it fell then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from raymoe.vllm_plugin.remote import NOTHING, RemoteExperts

NAMES = ("raymoe::dispatch", "raymoe::combine")
AROUND = ("vllm::moe_forward", "vllm::moe_forward_shared")
"""vLLM's own opaque ops, in which ours lie on a GPU."""

# a plain library and not torch.library.custom_op, which costs some 20 us a call
_new_library: Any = torch.library.Library  # its methods carry no types
_LIBRARY = _new_library("raymoe", "DEF")
_LIBRARY.define(
    "dispatch(Tensor x, Tensor expert_ids, Tensor gate_weights, str layer_name) -> Tensor"
)
_LIBRARY.define("combine(Tensor ticket, Tensor x, str layer_name) -> Tensor")


def _remote(layer_name: str) -> tuple[RemoteExperts, int]:
    """Experts and MoE layer of a layer of the model that is running."""
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.remote, layer.moe_layer


def _dispatch(x: Tensor, expert_ids: Tensor, gate_weights: Tensor, layer_name: str) -> Tensor:
    # without attention metadata it is a run that sizes memory or compiles: nothing is sent, so that
    # an engine starts whether or not its experts are there
    if get_forward_context().attn_metadata is None:
        return torch.tensor([NOTHING])
    remote, layer = _remote(layer_name)
    return torch.tensor([remote.dispatch(layer, x, expert_ids, gate_weights)])


def _combine(ticket: Tensor, x: Tensor, layer_name: str) -> Tensor:
    """`x` is that of dispatch: as an input here its memory is kept until its rows were sent."""
    remote, _ = _remote(layer_name)
    return remote.combine(int(ticket), x)


def _dispatch_shape(x: Tensor, expert_ids: Tensor, gate_weights: Tensor, layer_name: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


def _combine_shape(ticket: Tensor, x: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


for _name, _run, _shape in (
    ("dispatch", _dispatch, _dispatch_shape),
    ("combine", _combine, _combine_shape),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"raymoe::{_name}", _shape, lib=_LIBRARY)
