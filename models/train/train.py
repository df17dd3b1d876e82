"""Train the demo checkpoint for a fixed time, and export it.

    OMP_NUM_THREADS=1 python models/train/train.py --minutes 85

The learning rate follows the share of ``--minutes`` that has passed, so the run always ends
fully decayed. ``<out>/checkpoint.pt`` is rewritten every few minutes; starting the same
command again resumes from it. ``--minutes 0`` exports random weights of the same shape.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import padded_experts
import torch
from corpus import DOMAINS
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SEQUENCE = 256
LONG_EVERY = 4  # every fourth step uses half as many rows of twice the length
ROWS_PER_DOMAIN = 2
CHAT_SHARE = 0.12
PEAK_LR = 2.5e-3
WARMUP_STEPS = 150
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
BALANCE = 5e-3
SAVE_EVERY_S = 240.0
LOG_EVERY = 25


def demo_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Return the shape of the demo model: 11.7 M parameters, 16 experts, top-4, 6 layers."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,  # unused: every layer is sparse
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Build the model with random fp32 weights."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(demo_config(tokenizer))


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    """Write bf16 weights, configs and tokenizer files that ``from_pretrained`` can load."""
    copy = Qwen3MoeForCausalLM(demo_config(tokenizer))
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    copy.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    # transformers 5 renames this field; other readers of the family know the first name only.
    config_path = target / "config.json"
    config = json.loads(config_path.read_text())
    config["num_experts"] = config["num_local_experts"]
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (target / "model.safetensors").chmod(0o644)


def windows(ids: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Yield start positions of windows: every epoch is a new shuffle with a new phase."""
    while True:
        phase = int(rng.integers(SEQUENCE))
        starts = np.arange(phase, len(ids) - 2 * SEQUENCE, SEQUENCE)
        yield from rng.permutation(starts).tolist()


@dataclass
class Corpus:
    """The encoded training text: batches take equal shares of every domain."""

    out: Path
    seed: int
    ids: dict[str, np.ndarray] = field(init=False)
    starts: dict[str, Iterator[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        names = [f"{d}.{kind}" for d in DOMAINS for kind in ("train", "chat")]
        self.ids = {name: np.load(self.out / f"{name}.npy") for name in names}
        self.starts = {name: windows(ids, self.rng) for name, ids in self.ids.items()}

    def batch(self, step: int) -> torch.Tensor:
        """Return ids of shape [B, S]; B x S is the same at every step."""
        long = step % LONG_EVERY == 0
        length, rows = (2 * SEQUENCE, 1) if long else (SEQUENCE, ROWS_PER_DOMAIN)
        picked = []
        for domain in DOMAINS * rows:
            kind = "chat" if self.rng.random() < CHAT_SHARE else "train"
            start = next(self.starts[f"{domain}.{kind}"])
            picked.append(self.ids[f"{domain}.{kind}"][start : start + length])
        return torch.from_numpy(np.stack(picked).astype(np.int64))


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up in steps, then linear decay to zero in elapsed time."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - progress)


def new_optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.AdamW:
    """AdamW; norm weights are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of logits [B, S, V] on ids [B, S]."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, ids[:, 1:].reshape(-1))


def balance_loss(scores_of_layer: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of E x sum(share of pairs x mean probability); 1 when even.

    Each entry is the gate's scores [T, E] (Switch Transformer, section 2.2). It is taken per
    layer (transformers' own pools the layers, so one layer may hide another's collapse) and over
    the whole batch, so a domain may still prefer its own experts.
    """
    losses = []
    for scores in scores_of_layer:
        probabilities = scores.float().softmax(-1)  # [T, E]
        chosen = probabilities.topk(top_k).indices.reshape(-1)
        experts = scores.shape[-1]
        share = torch.bincount(chosen, minlength=experts) / chosen.numel()  # [E]
        losses.append(experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, out: Path, rows: int = 12) -> dict[str, float]:
    """Mean nats per token on the first windows of each domain's held-out text."""
    losses = {}
    for domain in DOMAINS:
        ids = np.load(out / f"{domain}.held.npy")[: rows * SEQUENCE].astype(np.int64)
        batch = torch.from_numpy(ids).view(rows, SEQUENCE)
        loss = next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)
        losses[domain] = round(loss.item(), 3)
    return losses


@dataclass
class Run:
    """Everything that a resumed run must remember."""

    model: Qwen3MoeForCausalLM
    optimizer: torch.optim.AdamW
    path: Path
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def save(self) -> None:
        """Replace the checkpoint in one rename, so that a crash leaves the old one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counters": (self.step, self.tokens, self.elapsed_s),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def load(self) -> None:
        """Continue from the checkpoint when there is one."""
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens, self.elapsed_s = state["counters"]

    def train_step(self, batch: torch.Tensor, lr: float) -> float:
        """One update on ids [B, S]; returns its cross-entropy in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(input_ids=batch, use_cache=False, output_router_logits=True)
        loss = next_token_loss(output.logits, batch)
        top_k = self.model.config.num_experts_per_tok
        (loss + BALANCE * balance_loss(output.router_logits, top_k)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.numel()
        return loss.item()


def train(run: Run, corpus: Corpus, minutes: float, on_save: Callable[[], None]) -> None:
    """Train until ``minutes`` of running time are spent, saving on the way."""
    began = time.monotonic() - run.elapsed_s
    saved_at, smooth = run.elapsed_s - SAVE_EVERY_S / 2, math.nan
    while (elapsed := time.monotonic() - began) < minutes * 60:
        lr = learning_rate(run.step, elapsed / (minutes * 60))
        loss = run.train_step(corpus.batch(run.step), lr)
        smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
        run.elapsed_s = time.monotonic() - began
        if run.step % LOG_EVERY == 0:
            rate = run.tokens / run.elapsed_s
            print(
                f"step {run.step} tokens {run.tokens} elapsed_s {run.elapsed_s:.0f} "
                f"lr {lr:.2e} loss {smooth:.3f} tokens_per_s {rate:.0f}",
                flush=True,
            )
        if run.elapsed_s - saved_at > SAVE_EVERY_S:
            saved_at = run.elapsed_s
            run.save()
            on_save()


def main() -> None:
    """Train (or resume) for ``--minutes`` and export to ``--export``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--export", type=Path, default=Path("models/demo"))
    parser.add_argument("--minutes", type=float, default=85.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    model = new_model(tokenizer, args.seed)
    if args.minutes > 0:
        padded_experts.register()
        model.set_experts_implementation("padded_bf16")
        model.set_attn_implementation("causal_fp32")
        run = Run(model, new_optimizer(model), args.out / "checkpoint.pt")
        run.load()
        corpus = Corpus(args.out, seed=args.seed + run.step)

        def on_save() -> None:
            print("held-out", json.dumps(held_out_loss(model, args.out)), flush=True)
            if not (args.export / "model.safetensors").exists():
                export(model, tokenizer, args.export)

        train(run, corpus, args.minutes, on_save)
        run.save()
        on_save()
        counters = {"step": run.step, "tokens": run.tokens, "elapsed_s": run.elapsed_s}
        (args.out / "run.json").write_text(json.dumps(counters))
    export(model, tokenizer, args.export)


if __name__ == "__main__":
    main()
