"""What the plugin relies on in vLLM, read from its source files, so that an upgrade fails by name.

    python -m tests.vllm.contract FOLDER_OF_VLLM

needs no vLLM that can be imported: an unpacked wheel of another version will do.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from raymoe.vllm_plugin.supported import OWN_EXPERTS_CLASSES

MOE = "model_executor/layers/fused_moe"
LOADERS = "model_executor/model_loader"

CALLED = {  # file, function or class.method -> its parameters, "..." for any more
    (f"{MOE}/routed_experts.py", "RoutedExperts.__init__"): (
        "self layer_name params_dtype moe_config quant_config expert_map_manager ..."
    ),
    (f"{MOE}/routed_experts.py", "RoutedExperts._get_quant_method"): (
        "self prefix quant_config moe_config"
    ),
    (f"{MOE}/routed_experts.py", "RoutedExperts.forward_modular"): (
        "self x topk_weights topk_ids shared_experts shared_experts_input"
    ),
    (f"{MOE}/routed_experts.py", "RoutedExperts.load_weights"): "self weights",
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.apply"): (
        "self layer x topk_weights topk_ids shared_experts shared_experts_input"
    ),
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.create_weights"): (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype"
    ),
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.maybe_roundup_sizes"): (
        "self hidden_size intermediate_size_per_partition act_dtype moe_parallel_config"
    ),
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.get_fused_moe_quant_config"): (
        "self layer"
    ),
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.supports_internal_mk"): "self",
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.mk_can_overlap_shared_experts"): (
        "self"
    ),
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.is_monolithic"): "self",
    (f"{MOE}/fused_moe_method_base.py", "FusedMoEMethodBase.supports_eplb"): "self",
    (f"{MOE}/runner/shared_experts.py", "SharedExperts.forward"): (
        "self shared_experts_input order"
    ),
    ("model_executor/custom_op.py", "PluggableLayer.register_oot"): (
        "cls _decorated_layer_cls name"
    ),
    (f"{LOADERS}/__init__.py", "register_model_loader"): "load_format",
    (f"{LOADERS}/base_loader.py", "BaseModelLoader.load_model"): (
        "self vllm_config model_config prefix"
    ),
    (f"{LOADERS}/default_loader.py", "DefaultModelLoader.__init__"): "self load_config",
    (f"{LOADERS}/default_loader.py", "DefaultModelLoader.get_all_weights"): (
        "self model_config model"
    ),
    ("forward_context.py", "get_forward_context"): "",
    ("distributed/parallel_state.py", "get_tensor_model_parallel_rank"): "",
    ("distributed/parallel_state.py", "get_tensor_model_parallel_world_size"): "",
    ("config/compilation.py", "CUDAGraphMode.has_full_cudagraphs"): "self",
    # the engine of a router
    ("v1/engine/async_llm.py", "AsyncLLM.from_vllm_config"): (
        "cls vllm_config start_engine_loop usage_context stat_loggers enable_log_requests "
        "aggregate_engine_logging disable_log_stats ..."
    ),
    ("engine/arg_utils.py", "EngineArgs.create_engine_config"): "self ...",
    ("v1/engine/async_llm.py", "AsyncLLM.generate"): "self prompt sampling_params request_id ...",
    ("v1/engine/async_llm.py", "AsyncLLM.reset_prefix_cache"): "self ...",
    ("v1/engine/async_llm.py", "AsyncLLM.shutdown"): "self timeout",
    ("v1/engine/async_llm.py", "AsyncLLM.errored"): "self",
    ("v1/metrics/loggers.py", "StatLoggerBase.record"): "self scheduler_stats iteration_stats ...",
    ("v1/sample/logits_processor/interface.py", "LogitsProcessor.__init__"): (
        "self vllm_config device is_pin_memory"
    ),
    ("v1/sample/logits_processor/interface.py", "LogitsProcessor.apply"): "self logits",
    ("v1/sample/logits_processor/interface.py", "LogitsProcessor.update_state"): (
        "self batch_update"
    ),
    ("v1/sample/logits_processor/builtin.py", "process_dict_updates"): (
        "req_entries batch_update new_state"
    ),
    ("transformers_utils/config.py", "get_config"): "model trust_remote_code ...",
}

NAMED = {  # file, class ("" for the module) -> names it must define
    (f"{MOE}/runner/shared_experts.py", "SharedExpertsOrder"): {"MK_INTERNAL_OVERLAPPED"},
    ("model_executor/custom_op.py", ""): {"op_registry_oot"},
    ("forward_context.py", "ForwardContext"): {"no_compile_layers", "attn_metadata"},
    ("config/parallel.py", "ParallelConfig"): {
        "data_parallel_size", "enable_expert_parallel", "enable_eplb", "enable_dbo",
        "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
    },
    ("config/model.py", "ModelConfig"): {"model", "revision", "quantization"},
    ("config/vllm.py", "VllmConfig"): {
        "additional_config", "lora_config", "speculative_config", "compilation_config",
    },
    ("config/compilation.py", "CompilationConfig"): {"cudagraph_mode", "splitting_ops"},
    ("config/load.py", "LoadConfig"): {"load_format", "model_loader_extra_config"},
    ("envs.py", ""): {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_USE_V2_MODEL_RUNNER"},
    ("engine/arg_utils.py", "EngineArgs"): {
        "additional_config", "compilation_config", "disable_log_stats", "dtype",
        "enable_prefix_caching", "enforce_eager", "kv_cache_memory_bytes", "load_format",
        "logits_processors", "max_logprobs", "max_model_len", "max_num_batched_tokens",
        "max_num_seqs", "model", "scheduling_policy", "skip_tokenizer_init",
    },
    ("sampling_params.py", "SamplingParams"): {
        "temperature", "max_tokens", "ignore_eos", "stop_token_ids", "logprobs", "prompt_logprobs",
        "detokenize", "extra_args", "output_kind",
    },
    ("sampling_params.py", "RequestOutputKind"): {"DELTA"},
    ("v1/metrics/stats.py", "SchedulerStats"): {
        "num_running_reqs", "kv_cache_usage", "prefix_cache_stats",
    },
}  # fmt: skip

WRITTEN = {  # file -> what must stand in it, spaces apart
    f"{MOE}/runner/moe_runner.py": (
        "self.routed_experts.forward_modular(",
        "self.routed_experts = routed_experts",
    ),
    f"{MOE}/routed_experts.py": (
        '@PluggableLayer.register("routed_experts")',
        "self.layer_name = layer_name",
        "self.quant_method = self._get_quant_method(",
    ),
    "v1/sample/sampler.py": (  # before greedy; log probabilities of what was before
        "for processor in sampling_metadata.logitsprocs.non_argmax_invariant:",
    ),
    "v1/metrics/stats.py": (
        "self.num_generation_tokens =",
        "self.num_prompt_tokens",
        "self.num_preempted_reqs =",
    ),
    "plugins/__init__.py": ('"vllm.general_plugins"',),
}


def broken(root: Path) -> list[str]:
    """Every way in which the vLLM in `root` is not what the plugin was written for."""
    return [*_signatures(root), *_names(root), *_texts(root), *_subclasses(root)]


def _tree(root: Path, file: str) -> ast.Module:
    path = root / file
    return ast.parse(path.read_text()) if path.exists() else ast.Module(body=[], type_ignores=[])


def _body(tree: ast.Module, kind: str) -> list[ast.stmt]:
    if not kind:
        return tree.body
    classes = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind)
    return next((c.body for c in classes), [])


def _signatures(root: Path) -> Iterator[str]:
    for (file, name), expected in CALLED.items():
        kind, _, function = name.rpartition(".")
        found = [
            n for n in _body(_tree(root, file), kind)
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == function
        ]  # fmt: skip
        if not found:
            yield f"{file}: {name} is gone"
            continue
        arguments = found[-1].args
        have = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        want = expected.removesuffix(" ...").split()
        if have[: len(want)] != want or (not expected.endswith("...") and len(have) != len(want)):
            yield f"{file}: {name} takes ({', '.join(have)}), not ({', '.join(want)})"


def _names(root: Path) -> Iterator[str]:
    for (file, kind), names in NAMED.items():
        have = set()
        for node in _body(_tree(root, file), kind):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            have |= {t.id for t in targets if isinstance(t, ast.Name)}
            if isinstance(node, ast.If):  # envs.py declares for type checkers
                have |= {
                    n.target.id
                    for n in node.body
                    if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
        for name in sorted(names - have):
            yield f"{file}: {kind or 'the module'} has no {name}"


def _texts(root: Path) -> Iterator[str]:
    for file, texts in WRITTEN.items():
        path = root / file
        source = "".join(path.read_text().split()) if path.exists() else ""
        for text in texts:
            if "".join(text.split()) not in source:
                yield f"{file}: no {text!r}"


def _subclasses(root: Path) -> Iterator[str]:
    """Layers under a name of their own are not replaced: each must be known, and refused."""
    found = set()
    for path in root.rglob("*.py"):
        source = path.read_text()
        if "RoutedExperts" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                bases = {getattr(b, "id", getattr(b, "attr", "")) for b in node.bases}
                found |= {node.name} if "RoutedExperts" in bases else set()
    for name in sorted(found - OWN_EXPERTS_CLASSES):
        yield f"{name} is a new subclass of RoutedExperts"


if __name__ == "__main__":
    wrong = broken(Path(sys.argv[1]))
    print("\n".join(wrong) or "nothing is broken")
    sys.exit(bool(wrong))
