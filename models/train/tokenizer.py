"""Train the byte-level BPE tokenizer and encode the corpus into flat token arrays.

    python models/train/tokenizer.py --out build/demo

Writes ``<out>/tokenizer/`` (a Hugging Face fast tokenizer with a chat template) and, for
each domain, ``.train.npy``, ``.held.npy`` and ``.chat.npy``: uint16 token ids of shape [N].
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from corpus import DOMAINS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL = [PAD, BOS, EOS, IM_START, IM_END]
TRAINER_CHARS_PER_DOMAIN = 2_000_000
CHAT_SHARE = 0.2  # of each domain's training pieces, also rendered as conversations
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_pieces(path: Path) -> list[str]:
    """Read the JSON lines that ``corpus.py`` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def sample_text(out: Path, seed: int = 0) -> Iterator[str]:
    """Yield about the same number of characters of every domain."""
    rng = random.Random(seed)
    for domain in DOMAINS:
        texts = read_pieces(out / f"{domain}.train.jsonl")
        rng.shuffle(texts)
        chars = 0
        for text in texts:
            chars += len(text)
            if chars > TRAINER_CHARS_PER_DOMAIN:
                break
            yield text


def train_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with ``VOCAB_SIZE`` entries, special tokens first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample_text(out), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def cut_passage(text: str, lengths: list[int]) -> list[str]:
    """Cut consecutive parts of about the given character lengths, at white space."""
    parts, start = [], 0
    for length in lengths:
        end = start + length
        while end < len(text) and not text[end].isspace():
            end += 1
        parts.append(text[start:end].strip())
        start = end
    return parts


def conversation(text: str, rng: random.Random) -> list[dict[str, str]]:
    """Turn a passage into user and assistant turns: each turn continues the one before."""
    rounds = rng.choice([1, 1, 2])
    lengths = [rng.randint(*span) for _ in range(rounds) for span in ((30, 300), (80, 500))]
    roles = ["user", "assistant"] * rounds
    parts = cut_passage(text[rng.randrange(max(1, len(text) - sum(lengths))) :], lengths)
    return [{"role": r, "content": p} for r, p in zip(roles, parts, strict=True) if p]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Encode texts one after another into ids of shape [N]; special tokens are in the text."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.fromiter((i for ids in encoded for i in ids), dtype=np.uint16)


def encode_domain(tokenizer: PreTrainedTokenizerFast, out: Path, domain: str) -> dict[str, int]:
    """Write the three token arrays of one domain and return their lengths in tokens."""
    rng = random.Random(domain)
    train = read_pieces(out / f"{domain}.train.jsonl")
    rng.shuffle(train)
    chats = [
        tokenizer.apply_chat_template(conversation(text, rng), tokenize=False) + EOS
        for text in train
        for _ in range(4)
        if rng.random() < CHAT_SHARE
    ]
    arrays = {
        "train": [BOS + text + EOS for text in train],
        "held": [BOS + text + EOS for text in read_pieces(out / f"{domain}.held.jsonl")],
        "chat": chats,
    }
    sizes = {}
    for name, texts in arrays.items():
        ids = encode(tokenizer, texts)
        np.save(out / f"{domain}.{name}.npy", ids)
        sizes[name] = len(ids)
    return sizes


def main() -> None:
    """Train the tokenizer, save it, and encode every domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    out = parser.parse_args().out
    tokenizer = train_tokenizer(out)
    tokenizer.save_pretrained(out / "tokenizer")
    sizes = {domain: encode_domain(tokenizer, out, domain) for domain in DOMAINS}
    (out / "tokens.json").write_text(json.dumps(sizes, indent=2))
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
