"""What does not run with remote experts, or has never been tried: refused, one sentence each."""

from __future__ import annotations

from typing import Any

from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import ConfigError

FAMILIES = frozenset({"qwen3_moe", "qwen2_moe", "mixtral", "olmoe"})
"""Whose tokens are compared with stock vLLM's by tests/vllm."""

OWN_EXPERTS_CLASSES = frozenset(
    {
        "GptOssRoutedExperts",
        "DbrxExperts",
        "TransformersRoutedExperts",
        "DeepseekV4HeterogeneousSharedRoutedExperts",
        "MuseSparkConsolidatedRoutedExperts",
        "SubstitutedRoutedExperts",  # constant stand-ins for pruned experts
    }
)
"""vLLM's subclasses of RoutedExperts, which our layer does not replace; none is in FAMILIES."""


def check_config(config: Any, stall_limit_s: float, step_timeout_s: float) -> None:
    """`config`: a VllmConfig. Raises ConfigError for the first thing that does not fit."""
    parallel, model = config.parallel_config, config.model_config
    wrong: list[tuple[Any, str]] = [
        (
            parallel.data_parallel_size > 1,
            "data_parallel_size > 1: data-parallel ranks wait for each other, raymoe's routers do "
            "not have to; start that many engines instead",
        ),
        (
            getattr(parallel, "enable_eplb", False),
            "enable_eplb: raymoe's controller places and replicates the experts; leave it off",
        ),
        (
            parallel.enable_expert_parallel,
            "enable_expert_parallel: the engine holds no expert to spread; leave it off",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size > 1 has not been tried"),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
            or getattr(parallel, "decode_context_parallel_size", 1) > 1,
            "context parallel has not been tried",
        ),
        (getattr(parallel, "enable_dbo", False), "enable_dbo has not been tried"),
        (
            config.lora_config is not None,
            "LoRA: vLLM applies it to expert weights too, which are not in the engine",
        ),
        (
            config.speculative_config is not None,
            "speculative decoding has not been tried",
        ),
        (
            model.quantization is not None,
            f"quantised weights ({model.quantization}) have not been tried: vLLM would read the "
            "dense part quantised",
        ),
        (
            model.revision is not None,
            "revision: raymoe reads the checkpoint's folder or the hub's main revision; "
            "download the revision and give its folder",
        ),
        (
            config.compilation_config.cudagraph_mode is not None
            and config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
            "full CUDA graphs: a graph cannot wait for experts elsewhere; set "
            "compilation_config={'cudagraph_mode': 'PIECEWISE'}",
        ),
        (
            stall_limit_s >= step_timeout_s,
            f"stall_limit_s of {stall_limit_s:g} s: vLLM ends a step after {step_timeout_s:g} s "
            "(VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS), the limit must be shorter",
        ),
    ]
    for refused, sentence in wrong:
        if refused:
            raise ConfigError(f"load_format='raymoe' does not go with {sentence}")


def check_version(version: tuple[int, int], device: str) -> None:
    """Raises ConfigError for a vLLM that can run the plugin on a GPU only."""
    if device == "cpu" and version < (0, 31):
        raise ConfigError(
            f"load_format='raymoe' on a CPU needs vLLM 0.31 or newer, this is {version[0]}."
            f"{version[1]}: it cannot choose experts there without computing them"
        )


def check_family(spec: ModelSpec) -> None:
    """Raises ConfigError for a family that no test has compared with stock vLLM."""
    if spec.family not in FAMILIES:
        raise ConfigError(
            f"load_format='raymoe' has not been tried with family {spec.family!r}, only with "
            f"{', '.join(sorted(FAMILIES))}; raymoe's own engine serves more (docs/families.md)"
        )
