"""raymoe's experts under vLLM: attention, KV cache, gate and sampling stay vLLM's.

    settings.py   additional_config["raymoe"], checked
    supported.py  what cannot run with remote experts, refused with one sentence each
    dense.py      the stored tensors of a checkpoint that are no expert's
    remote.py     RemoteExperts: client, control connection, tensor-parallel slices
    ops.py        raymoe::dispatch and raymoe::combine, opaque to torch.compile
    layers.py     the layer that stands where vLLM's RoutedExperts stood
    loader.py     load_format="raymoe"

`register` is the entry point `vllm.general_plugins`: vLLM calls it in every process of its own.
Without load_format="raymoe" nothing changes. Only layers, loader and ops import vLLM.
"""

from __future__ import annotations

from raymoe.vllm_plugin.entry_point import register

__all__ = ["register"]
