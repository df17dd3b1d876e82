"""A random Qwen3-MoE checkpoint in which the experts are nearly everything.

    python -m benchmarks.big_model FOLDER [--layers 4] [--experts 128] [--inner 768]

The defaults hold 4.5 GiB of experts as resident float32 (half of that on disk, bfloat16) behind a
dense part of some 30 MB, with the demo's tokenizer. No training: what a real model has and random
weights lack is built in, so that traffic means something to a planner.

- Tokens fall into four domains (by id). Greedy text from a prompt of one domain is a walk over all
  readable tokens of that domain, never a loop of one token: each token's output row is the
  embedding of the one before it in the walk.
- Embeddings have a part that a domain's tokens share. Each expert's gate row likes domains
  differently (`--skew`), so some experts are hot in one domain and cold in the next, and the shift
  of the traffic is a shift of the experts. The rest of the gate row looks at the token itself.

`FOLDER/prompts.json` gives prompts (token ids) by domain; `benchmarks.live` uses them when there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

_DEMO = Path("models/demo")
_DOMAINS = ("scripture", "code", "proofs", "plays")
_FIRST = 8  # ids below are the tokenizer's special tokens
_SHARED = 0.7  # the part of an embedding that its domain's tokens share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--skew", type=float, default=0.7, help="0: every domain likes all alike")
    parser.add_argument("--max-position", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(_DEMO / name, args.folder / name)
    demo = json.loads((_DEMO / "config.json").read_text())
    config = demo | {
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "max_position_embeddings": args.max_position,
        "moe_intermediate_size": args.inner,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "num_hidden_layers": args.layers,
        "num_local_experts": args.experts,
        "tie_word_embeddings": False,
    }
    (args.folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(args.seed)
    vocabulary = int(config["vocab_size"])
    shared = torch.randn(len(_DOMAINS), args.hidden, generator=generator)  # a domain's direction
    index: dict[str, str] = {}  # tensor -> file
    dense = _ends(shared, vocabulary, generator)
    for layer in range(args.layers):
        dense |= _layer(layer, config, shared, args.skew, generator)
        experts = _experts(layer, args, generator)
        shard = f"experts-{layer}.safetensors"
        save_file(experts, args.folder / shard)
        index |= dict.fromkeys(experts, shard)
    save_file(dense, args.folder / "dense.safetensors")
    index |= dict.fromkeys(dense, "dense.safetensors")
    stored = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    whole = {"metadata": {"total_size": stored}, "weight_map": index}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    prompts = {
        domain: _walk(at, vocabulary, torch.Generator().manual_seed(at))[:512].tolist()
        for at, domain in enumerate(_DOMAINS)
    }
    (args.folder / "prompts.json").write_text(json.dumps(prompts))
    resident = args.layers * args.experts * 3 * args.hidden * args.inner * 4
    print(f"{args.folder}: {resident / (1 << 30):.2f} GiB of experts as float32")


def _ends(
    shared: torch.Tensor, vocabulary: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Embedding, output head, last norm."""
    hidden = shared.shape[1]
    domain_of = torch.arange(vocabulary) % len(_DOMAINS)
    own = torch.randn(vocabulary, hidden, generator=generator)
    embedding = _SHARED**0.5 * shared[domain_of] + (1 - _SHARED) ** 0.5 * own
    head = torch.zeros(vocabulary, hidden)
    for at in range(len(_DOMAINS)):
        walk = _walk(at, vocabulary, generator)
        head[walk.roll(-1)] = embedding[walk]
    return {
        "model.embed_tokens.weight": embedding.bfloat16(),
        "lm_head.weight": (head * hidden**-0.5).bfloat16(),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def _walk(domain: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """All ids of a domain that are whole characters, in a random order."""
    tokenizer = Tokenizer.from_file(str(_DEMO / "tokenizer.json"))
    ids = [
        i
        for i in range(_FIRST, vocabulary)
        if i % len(_DOMAINS) == domain and tokenizer.decode([i]).isprintable()
        if "\ufffd" not in tokenizer.decode([i])
    ]
    return torch.tensor(ids)[torch.randperm(len(ids), generator=generator)]


def _layer(
    layer: int,
    config: dict[str, int],
    shared: torch.Tensor,
    skew: float,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Attention, norms and gate of one layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    experts = config["num_experts"]
    liking = torch.randn(experts, len(shared), generator=generator) * skew
    gate = torch.randn(experts, hidden, generator=generator) * (hidden * (1 - _SHARED)) ** -0.5
    axes = torch.linalg.qr(shared.T).Q  # of what the domains share: no matter of the token's
    gate -= gate @ axes @ axes.T
    gate += liking @ shared / (hidden * _SHARED**0.5)
    name = f"model.layers.{layer}"
    sizes = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
    }
    tensors = {
        f"{name}.self_attn.{key}.weight": torch.randn(shape, generator=generator) * 0.02
        for key, shape in sizes.items()
    }
    tensors |= {f"{name}.self_attn.{key}.weight": torch.ones(head_dim) for key in _HEAD_NORMS}
    tensors |= {f"{name}.{key}.weight": torch.ones(hidden) for key in _NORMS}
    tensors[f"{name}.mlp.gate.weight"] = gate
    return {key: tensor.bfloat16() for key, tensor in tensors.items()}


_HEAD_NORMS = ("q_norm", "k_norm")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _experts(
    layer: int, args: argparse.Namespace, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    name = f"model.layers.{layer}.mlp.experts"
    shapes = {
        "gate_proj": (args.inner, args.hidden),
        "up_proj": (args.inner, args.hidden),
        "down_proj": (args.hidden, args.inner),
    }
    return {
        f"{name}.{expert}.{key}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for expert in range(args.experts)
        for key, shape in shapes.items()
    }


if __name__ == "__main__":
    main()
