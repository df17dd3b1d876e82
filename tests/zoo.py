"""Tiny random checkpoints, one a family: a few layers, hidden 64, 8 experts; a few hundred KiB.

    folder = tiny_checkpoint("qwen3_moe", tmp_path)

The weights are random but not symmetric: what a family initialises to zeros or ones (biases, norms,
correction biases of the gate, attention sinks) is disturbed, or a wrong layout would go unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

VOCAB = 512

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08, "tie_word_embeddings": False,
}  # fmt: skip

# Experts, by the names the families give them.
LOCAL = {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}
EXPERTS = {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}
INNER = {
    "intermediate_size": 128, "moe_intermediate_size": 48, "num_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
SHARED = {**INNER, "shared_expert_intermediate_size": 64}
ROUTED = {
    "intermediate_size": 128, "moe_intermediate_size": 48, "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}  # fmt: skip
GROUPED = {
    **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.5,
}  # fmt: skip
# Attention and state.
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
INDEXED = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 64}
DELTA = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_expand": 2,
}  # fmt: skip


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


FAMILIES: dict[str, dict[str, Any]] = {
    # the families every release is tested with
    "mixtral": LOCAL,
    "qwen2_moe": {**SHARED, "decoder_sparse_step": 1},
    "qwen3_moe": {**INNER, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "olmoe": EXPERTS,
    "deepseek_v2": {
        **_without(GROUPED, "norm_topk_prob"), **LATENT, "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**GROUPED, **LATENT},
    "glm4_moe": GROUPED,
    "gpt_oss": {**LOCAL, "sliding_window": 32},
    "phimoe": {**LOCAL, "sliding_window": None},
    "granitemoe": LOCAL,
    "ernie4_5_moe": {
        "intermediate_size": 128, "moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 2,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "minimax_m2": LOCAL,
    "hunyuan_v1_moe": {"intermediate_size": 48, "num_experts": 8, "moe_topk": 2},
    "dots1": GROUPED,
    "llama4_text": {**LOCAL, "intermediate_size_mlp": 128, "num_experts_per_tok": 1},
    "dbrx": {},  # its config nests, see `config_of`
    # softmax attention
    "flex_olmo": EXPERTS,
    "glm4_moe_lite": {**GROUPED, **LATENT},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 64},
    "granitemoe_swa": LOCAL,
    "hy_v3": INNER,
    "afmoe": {**INNER, "num_shared_experts": 1, "num_dense_layers": 1},
    "exaone_moe": {**INNER, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "solar_open": GROUPED,
    "mimo_v2_flash": {**ROUTED, "head_dim": 24, "v_head_dim": 16, "sliding_window": 32},
    "laguna": {**SHARED, "sliding_window": 32},
    "mellum": {**INNER, "sliding_window": 32},
    "cohere2_moe": {
        **EXPERTS, "num_hidden_layers": 4, "num_shared_experts": 1, "sliding_window": 32,
        "prefix_dense_intermediate_size": 128,
    },
    "axk1": {**_without(GROUPED, "first_k_dense_replace"), **LATENT},
    "flint": {**SHARED, "sliding_window": 33},
    "mistral4": {**GROUPED, "n_group": 1, **LATENT, "head_dim": 32},
    "aria_text": {
        "intermediate_size": 48, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1,
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "intermediate_size": 64, "moe_intermediate_size": 48,
        "num_experts": 8, "top_k_experts": 2, "enable_moe_block": True,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 32, "global_head_dim": 16,
    },
    "beam": {
        **INNER, "mlp_layer_types": ["dense", "sparse", "sparse"], "n_group": 2, "topk_group": 1,
        "sliding_window": 32,
    },
    "kolibri1": {**_without(SHARED, "intermediate_size"), "sliding_window": 33},
    "longcat_flash": {
        "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 48, "n_routed_experts": 8, "zero_expert_num": 2, "moe_topk": 3,
        **LATENT,
    },
    # other state than a KV cache
    "qwen3_next": {**SHARED, **DELTA, "decoder_sparse_step": 1},
    "qwen3_5_moe_text": {**_without(SHARED, "intermediate_size"), **DELTA},
    "deepseek_v32": {**GROUPED, **LATENT, **INDEXED},
    "deepseek_v4": {
        "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 32, "q_lora_rank": 32,
        "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "hc_mult": 2, "o_groups": 2, "o_lora_rank": 16, **INDEXED, "index_topk": 16,
        "sliding_window": 32, "num_nextn_predict_layers": 0, "partial_rotary_factor": 0.5,
    },
    "glm_moe_dsa": {**GROUPED, **LATENT, **INDEXED},
    "granitemoehybrid": {
        **LOCAL, **MAMBA2, "num_hidden_layers": 4, "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "minimax": {**LOCAL, "num_hidden_layers": 4, "block_size": 32},
    "jamba": {
        **EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
        "mamba_d_state": 8, "mamba_dt_rank": 8,
    },
    "lfm2_moe": {
        **INNER, "num_hidden_layers": 4, "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "nemotron_h": {
        **ROUTED, "num_hidden_layers": 4, "num_experts_per_tok": 2,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
    },
    "kimi_linear": {
        **_without(INNER, "num_experts"), "num_local_experts": 8, "num_hidden_layers": 4,
        **_without(LATENT, "q_lora_rank"), "linear_head_dim": 16, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "bailing_hybrid": {
        **_without(INNER, "num_experts"), "num_local_experts": 8, "num_hidden_layers": 6,
        "n_group": 2, "topk_group": 1, **LATENT, "num_mtp_layers": 0,
    },
    "zaya": {
        "num_hidden_layers": 4, "moe_intermediate_size": 48, "num_experts": 8,
        "num_experts_per_tok": 1, "router_hidden_size": 32,
    },
    # not served: experts inside attention, retrieval of single neurons
    "jetmoe": {**LOCAL, "kv_channels": 16},
    "doge": {
        "intermediate_size": 64, "is_moe": True, "num_experts": 64, "num_experts_per_tok": 4,
    },
}  # fmt: skip

REQUIRED = tuple(FAMILIES)[: tuple(FAMILIES).index("dbrx") + 1]
"""The families promised; each has a parity test."""


UNUSUAL = (
    "nemotron_h",  # no gate projection, relu squared
    "deepseek_v4",  # limited gate and up
    "gemma4_text",  # gelu
    "longcat_flash",  # identity experts
    "aria_text",  # stored [in, out]
    "mistral4",  # fused on disk; not in transformers' auto map
    "qwen3_next",  # layers with a recurrent state
)
"""Besides the promised families: those whose experts or layers differ from all of them."""


def config_of(family: str, **changes: Any) -> Any:
    """The family's tiny config."""
    kind: Any = transformers.CONFIG_MAPPING[family]
    if family != "dbrx":
        return kind(**{**COMMON, **FAMILIES[family], **changes})
    return kind(
        vocab_size=VOCAB, d_model=64, n_heads=4, n_layers=3, max_seq_len=512, pad_token_id=0,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        ffn_config={
            "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64,
            "ffn_act_fn": {"name": "silu"},
        },
    )  # fmt: skip


def tiny_model(family: str, **changes: Any) -> nn.Module:
    """The stock model with random float32 weights, without symmetries, in eval mode."""
    config = config_of(family, **changes)
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None) or getattr(
        transformers, type(config).__name__.replace("Config", "ForCausalLM")
    )
    model: nn.Module = kind._from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(torch.rand(buffer.shape, generator=draw) * 0.1)
    return model


def tiny_checkpoint(
    family: str,
    folder: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """`tiny_model(family)` as safetensors in `folder`/family; `changes` go to its config."""
    path = folder / family
    if not path.exists():
        model: Any = tiny_model(family, **changes).to(getattr(torch, dtype))
        model.save_pretrained(path, max_shard_size=max_shard_size)
    return path
