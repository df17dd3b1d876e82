"""raymoe's experts under vLLM: attention, KV cache, gate and sampling stay vLLM's.

    settings.py   additional_config["raymoe"], checked
    supported.py  what cannot run with remote experts, refused with one sentence each
    dense.py      the stored tensors of a checkpoint that are no expert's
    remote.py     RemoteExperts: client, control connection, tensor-parallel slices
    ops.py        raymoe::dispatch and raymoe::combine, opaque to torch.compile
    layers.py     the layer that stands where vLLM's RoutedExperts stood
    loader.py     load_format="raymoe"

and for a router of `raymoe serve --engine vllm`

    engine.py     VllmEngine: AsyncLLM as the engine of a router
    making.py     an AsyncLLM, from a deployment's settings
    running.py    the requests that have not ended, also beyond a void step
    arguments.py  a deployment's settings as vLLM's arguments and environment
    asking.py     a request as vLLM takes it;  telling.py  vLLM's outputs as a router's events
    drawing.py    raymoe's sampler as a logits processor
    board.py      what router and workers tell each other: void steps, the controller's address

`register` is the entry point `vllm.general_plugins`: vLLM calls it in every process of its own.
Without load_format="raymoe" nothing changes. Only layers, loader, ops and drawing import vLLM, and
making and running where they use it.
"""

from __future__ import annotations

from raymoe.vllm_plugin.entry_point import register

__all__ = ["register"]
