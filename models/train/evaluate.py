"""Measure the exported checkpoint and write its evaluation JSON and model card.

    OMP_NUM_THREADS=1 python models/train/evaluate.py --out build/demo --model models/demo

Held-out loss, the load of every expert by domain, and sample outputs come from the bf16
weights as exported (computed in fp32). ``card.py`` turns the JSON into the README.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import card
import numpy as np
import torch
from corpus import DOMAINS
from tokenizer import read_pieces
from torch.nn import functional as F
from train import BALANCE, PEAK_LR
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

SEQUENCE = 256
BATCH = 8
SAMPLE_TOKENS = 80
PROMPTS = {
    "prose": "KING.\nMy noble lords, the",
    "code": "def read_file(path):\n    ",
    "languages": "Y dijo Jehová á Moisés: ",
    "math": "$( Theorem: the union of two classes",
}
CHAT_PROMPT = "Friends, Romans, countrymen, lend me your ears;"


def held_out_batches(path: Path) -> torch.Tensor:
    """Return the held-out ids as rows of shape [N, S]; the last incomplete row is dropped."""
    ids = np.load(path).astype(np.int64)
    rows = len(ids) // SEQUENCE
    return torch.from_numpy(ids[: rows * SEQUENCE]).view(rows, SEQUENCE)


@torch.no_grad()
def loss_and_load(model: PreTrainedModel, rows: torch.Tensor) -> tuple[float, np.ndarray]:
    """Mean nats per predicted token of rows [N, S], and chosen-pair counts [2, L, E].

    Counts come apart for the even and the odd batches: two samples of the same domain.
    """
    config = model.config
    nats, counts = 0.0, np.zeros((2, config.num_hidden_layers, config.num_experts))
    for i, batch in enumerate(rows.split(BATCH)):
        output = model(input_ids=batch, use_cache=False, output_router_logits=True)
        logits = output.logits[:, :-1].reshape(-1, config.vocab_size).float()
        nats += F.cross_entropy(logits, batch[:, 1:].reshape(-1), reduction="sum").item()
        for layer, scores in enumerate(output.router_logits):  # each [T, E]
            chosen = scores.topk(config.num_experts_per_tok).indices.reshape(-1)
            counts[i % 2, layer] += torch.bincount(chosen, minlength=config.num_experts).numpy()
    return nats / (rows.numel() - len(rows)), counts


def unigram_loss(train: np.ndarray, held: np.ndarray, vocab: int) -> float:
    """Nats per token of the best context-free guess: the domain's own token frequencies."""
    frequency = np.bincount(train, minlength=vocab) + 1.0
    return float(-np.log(frequency / frequency.sum())[held].mean())


def cosine(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Cosine similarity of two load matrices [L, E], layer by layer."""
    dots = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return [round(float(x), 3) for x in dots]


def domain_figures(model: PreTrainedModel, out: Path, domain: str) -> tuple[dict, np.ndarray]:
    """Measure one domain: its figures, and its load counts [2, L, E]."""
    rows = held_out_batches(out / f"{domain}.held.npy")
    nats, counts = loss_and_load(model, rows)
    held = np.load(out / f"{domain}.held.npy")
    chars = sum(map(len, read_pieces(out / f"{domain}.held.jsonl")))
    load = counts.sum(0)  # [L, E]
    figures = {
        "held_out_tokens": int(rows.numel()),
        "chars_per_token": round(chars / len(held), 3),
        "nats_per_token": round(nats, 3),
        "bits_per_char": round(nats / math.log(2) * len(held) / chars, 3),
        "unigram_nats_per_token": round(
            unigram_loss(np.load(out / f"{domain}.train.npy"), held, model.config.vocab_size), 3
        ),
        "max_over_mean_by_layer": [round(float(x), 2) for x in load.max(-1) / load.mean(-1)],
        "experts_for_half_of_the_load_by_layer": half_load_experts(load),
        "cosine_of_two_halves_by_layer": cosine(counts[0], counts[1]),
        "load": load.astype(int).tolist(),
    }
    return figures, counts


def half_load_experts(load: np.ndarray) -> list[int]:
    """How few experts take at least half of the pairs, by layer; load is [L, E]."""
    ranked = -np.sort(-load, axis=-1)
    share = ranked.cumsum(-1) / ranked.sum(-1, keepdims=True)
    return [int(x) + 1 for x in (share >= 0.5).argmax(-1)]


def domain_cosines(counts: dict[str, np.ndarray]) -> dict[str, dict]:
    """Cosine of the load of every two domains: by layer, and their mean."""
    pairs = {}
    for i, a in enumerate(DOMAINS):
        for b in DOMAINS[i + 1 :]:
            by_layer = cosine(counts[a].sum(0), counts[b].sum(0))
            mean = round(float(np.mean(by_layer)), 3)
            pairs[f"{a} / {b}"] = {"by_layer": by_layer, "mean": mean}
    return pairs


@torch.no_grad()
def samples(model: PreTrainedModel, tokenizer: object) -> dict[str, dict[str, str]]:
    """One sampled continuation per domain and one chat answer (temperature 0.7, seed 0)."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT_PROMPT}], add_generation_prompt=True, tokenize=False
    )
    answers = {}
    for name, prompt in {**PROMPTS, "chat": chat}.items():
        torch.manual_seed(0)
        text = prompt if name == "chat" else tokenizer.bos_token + prompt
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
        )[0, inputs["input_ids"].shape[1] :]
        shown = CHAT_PROMPT if name == "chat" else prompt
        answers[name] = {
            "prompt": shown,
            "output": tokenizer.decode(ids, skip_special_tokens=True),
            "ended": bool(len(ids) < SAMPLE_TOKENS),
        }
    return answers


def evaluate(model_dir: Path, out: Path) -> dict:
    """Return every figure that the model card quotes."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    results = {domain: domain_figures(model, out, domain) for domain in DOMAINS}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "run": json.loads((out / "run.json").read_text()),
        "settings": {"peak_lr": PEAK_LR, "balance": BALANCE},
        "corpus": json.loads((out / "corpus.json").read_text()),
        "corpus_tokens": json.loads((out / "tokens.json").read_text()),
        "domains": {domain: figures for domain, (figures, _) in results.items()},
        "domain_cosines": domain_cosines({d: counts for d, (_, counts) in results.items()}),
        "samples": samples(model, tokenizer),
    }


def main() -> None:
    """Evaluate, write ``evaluation.json`` and ``README.md`` beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = evaluate(args.model, args.out)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (args.model / "evaluation.json").write_text(text, "utf-8")
    (args.model / "README.md").write_text(card.render(result, args.model), "utf-8")
    for domain, figures in result["domains"].items():
        print(
            domain, figures["nats_per_token"], "nats/token", figures["bits_per_char"], "bits/char"
        )


if __name__ == "__main__":
    main()
