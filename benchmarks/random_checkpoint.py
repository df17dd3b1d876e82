"""A larger random checkpoint to measure with: Qwen3-MoE's shape, the demo model's tokenizer.

    python -m benchmarks.random_checkpoint DIR [--hidden 1024] [--experts 32] [--top-k 4]

The defaults are 1.3 GiB in float32. Its gate is as random as its text: experts are chosen about
evenly, which is the worst case for a group (every message wakes every expert).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512, help="of one expert")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    torch.manual_seed(0)
    config: Any = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        head_dim=64,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.inner,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, args.dtype))
    model.save_pretrained(args.folder)
    demo = Path(__file__).parent.parent / "models" / "demo"
    for name in _TOKENIZER:
        shutil.copy(demo / name, args.folder / name)
    total = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(f"{args.folder}: {total / (1 << 30):.2f} GiB in {args.dtype}")


if __name__ == "__main__":
    main()
