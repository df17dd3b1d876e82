"""The entry point: puts our layer and our loader where vLLM looks for them."""

from __future__ import annotations

import logging

OLDEST, NEWEST = (0, 29), (0, 33)
"""vLLM's minor versions whose signatures the contract tests have been held against."""

log = logging.getLogger(__name__)


def register() -> None:
    """Called by vLLM in each of its processes, perhaps more than once.

    Never fails: a vLLM that this plugin does not fit must go on serving without raymoe; there
    load_format="raymoe" stays unknown, and vLLM says so.
    """
    import vllm

    version = tuple(vllm.__version_tuple__[:2])
    if not OLDEST <= version <= NEWEST:
        log.warning(
            "raymoe's plugin is for vLLM %d.%d to %d.%d, this is %s: load_format='raymoe' is off",
            *OLDEST, *NEWEST, vllm.__version__,
        )  # fmt: skip
        return
    try:
        from raymoe.vllm_plugin.layers import install as install_layer
        from raymoe.vllm_plugin.loader import install as install_loader
    except ImportError:
        log.exception("raymoe's plugin does not fit this vLLM: load_format='raymoe' is off")
        return
    install_layer()
    install_loader()
