"""Render the demo checkpoint's model card from the evaluation JSON: no figure is typed by hand.

python models/train/card.py models/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FRONT = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# raymoe demo checkpoint

A real, very small Mixture-of-Experts language model, so that raymoe can be tried end to end
without downloading anything: `Qwen3MoeForCausalLM`, {parameters:.2f} M parameters, 6 layers,
hidden size 256, 16 experts per layer of which each token uses 4, vocabulary 4096, bf16.

**It is not fluent and knows nothing.** It was trained for {minutes:.0f} minutes on one CPU thread.
It writes word-like text in the manner of its four training domains (English verse and prose,
Python, Spanish with some other languages, formal mathematics) and loses the thread within a
sentence. A chat message is answered by continuing it, not by following it. Use it to see tokens
stream, experts move and load differ by domain; never use it for its answers.

What is real: the weights are trained, the chat template works, an answer may stop by itself (or
runs to `max_tokens`), and the gate sends different domains to different experts.
"""

USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/demo")
model = AutoModelForCausalLM.from_pretrained("models/demo")
messages = [{"role": "user", "content": "Friends, Romans, countrymen, lend me your ears;"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

Training used windows of 256 and 512 tokens; positions beyond 512 are allowed (up to 2048) but
were never trained. The generation config sets no sampling; the samples below use temperature 0.7.
"""


def table(header: list[str], rows: list[list[object]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *rows])


def data_section(result: dict) -> str:
    """Sources, licences, and sizes by domain."""
    rows = []
    for domain, entry in result["corpus"].items():
        tokens = result["corpus_tokens"][domain]
        for i, (source, licence) in enumerate(entry["sources"]):
            sizes = ["", "", ""]
            if i == 0:
                train, held = entry["chars"]["train"], entry["chars"]["held"]
                sizes = [f"{train / 1e6:.2f}", f"{tokens['train'] / 1e6:.2f}", f"{held / 1e3:.0f}"]
            rows.append([domain if i == 0 else "", source, licence, *sizes])
    header = ["domain", "source", "licence", "M chars", "M tokens", "held out, k chars"]
    return (
        "## Data\n\n"
        + table(header, rows)
        + "\n\nEvery 40th piece of about 6,000 characters is held out; held-out pieces that mostly"
        " repeat training text\n(a work present in two editions) are dropped. About one training"
        " row in eight is a conversation made from\nthe same text: each turn continues the one"
        " before it.\n"
    )


def training_section(result: dict) -> str:
    """What was run, for how long, on how many tokens."""
    run, settings = result["run"], result["settings"]
    return f"""\
## Training

    python models/train/corpus.py && python models/train/tokenizer.py
    OMP_NUM_THREADS=1 python models/train/train.py --minutes {run["elapsed_s"] / 60:.0f}
    OMP_NUM_THREADS=1 python models/train/evaluate.py

{run["tokens"] / 1e6:.2f} M tokens seen in {run["step"]:,} steps of 2,048 tokens and \
{run["elapsed_s"] / 60:.0f} minutes on one CPU thread, restarted once
({run["tokens"] / run["elapsed_s"]:,.0f} tokens/s, on a machine shared with other work). AdamW, \
fp32 master weights, bf16 matrix products, peak learning
rate {settings["peak_lr"]:g} decaying linearly to zero, per-layer balance loss \
{settings["balance"]:g} (the first 1.2 M tokens: transformers' pooled balance loss
at 0.001, which left some experts unused). Files: `models/train/README.md`.
"""


def loss_section(result: dict) -> str:
    """Held-out loss by domain beside the context-free baseline."""
    rows = [
        [
            domain,
            figures["held_out_tokens"],
            figures["nats_per_token"],
            figures["unigram_nats_per_token"],
            figures["bits_per_char"],
            figures["chars_per_token"],
        ]
        for domain, figures in result["domains"].items()
    ]
    header = ["domain", "held-out tokens", "nats/token", "token frequencies alone"]
    header += ["bits/char", "chars/token"]
    return (
        "## Held-out loss\n\nOf the exported bf16 weights, in rows of 256 tokens; an untrained"
        " model has ln 4096 = 8.318 nats/token.\n\n" + table(header, rows) + "\n"
    )


def load_section(result: dict) -> str:
    """Skew by layer and domain, and the similarity of the domains' loads."""
    domains = result["domains"]
    layers = len(next(iter(domains.values()))["load"])
    header = ["domain", *[f"layer {i}" for i in range(layers)]]
    skew = [[d, *f["max_over_mean_by_layer"]] for d, f in domains.items()]
    half = [[d, *f["experts_for_half_of_the_load_by_layer"]] for d, f in domains.items()]
    pairs = [
        [name, *entry["by_layer"], entry["mean"]]
        for name, entry in result["domain_cosines"].items()
    ]
    own = [[f"{d} / itself", *f["cosine_of_two_halves_by_layer"], ""] for d, f in domains.items()]
    return (
        "\n\n".join(
            [
                "## Expert load\n\nLoad of the busiest expert over the mean (1 is even, 4 is the"
                " most that top-4 of 16 allows):",
                table(header, skew),
                "Experts, of 16, that take half of the pairs (8 would be even):",
                table(header, half),
                "Cosine similarity of two domains' load vectors (a domain with itself: the even"
                " against the odd batches,\nthe noise of the measurement):",
                table(["domains", *header[1:], "mean"], pairs + own),
            ]
        )
        + "\n"
    )


def sample_section(result: dict) -> str:
    """The prompts and the outputs, unedited."""
    parts = ["## Samples\n\nTemperature 0.7, top-p 0.95, seed 0, 80 tokens, first try, unedited."]
    for name, sample in result["samples"].items():
        ended = " (stopped by itself)" if sample["ended"] else ""
        shown = f"{sample['prompt']}⟶{sample['output']}".replace("```", "'''")
        parts.append(f"{name}{ended}, the model's part after the arrow:\n\n```text\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


def render(result: dict, model_dir: Path) -> str:
    """Return the whole card as Markdown."""
    front = FRONT.format(
        parameters=result["parameters"] / 1e6, minutes=result["run"]["elapsed_s"] / 60
    )
    size = (model_dir / "model.safetensors").stat().st_size
    sections = [
        front + f"\n`model.safetensors` is {size / 1e6:.1f} MB.\n",
        USE,
        data_section(result),
        training_section(result),
        loss_section(result),
        load_section(result),
        sample_section(result),
    ]
    return "\n".join(sections)


def main() -> None:
    """Render the card again from an existing evaluation JSON."""
    model_dir = Path(sys.argv[1])
    result = json.loads((model_dir / "evaluation.json").read_text("utf-8"))
    (model_dir / "README.md").write_text(render(result, model_dir), "utf-8")


if __name__ == "__main__":
    main()
