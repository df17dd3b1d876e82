"""Every family against stock transformers, on tiny random checkpoints; writes docs/families.md.

    python -m benchmarks.families [--family NAME ...] [--tokens 8] [--write docs/families.md]

For each family: a random checkpoint is saved; its experts are read one by one and compared with the
full load, bit for bit; the dense part is loaded without any expert; the experts run in two shards
(even and odd experts) with partial sums; greedy tokens and logits are compared with `generate` of
the stock model. About half a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.report import finish, table
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import CheckpointError
from tests.checkpoint.parity import LOGITS_WITHIN, Parity, compare
from tests.zoo import FAMILIES, REQUIRED, UNUSUAL, tiny_checkpoint

HEADER = (
    "family", "tested in CI", "experts on disk", "their FFN", "experts equal", "greedy tokens",
    "logits differ by", "attention",
)  # fmt: skip

INTRODUCTION = """\
# Model families

Written by `python -m benchmarks.families --write docs/families.md`; transformers {version},
torch {torch}, one thread, float32. Every row is a tiny random checkpoint of that family (hidden 64,
8 experts, 2 to 6 layers), {tokens} greedy tokens of two prompts.

- *experts on disk*: one tensor an expert; all experts of a layer in one tensor ("fused"); or as
  rows of a matrix. Only the bytes of the wanted expert are read.
- *experts equal*: the first, second and last expert of every layer, read alone, are bit-equal to
  the full load.
- *greedy tokens*: the dense part alone plus two shards holding different experts give the tokens
  of stock `generate`. Where the reference's two best logits are nearer than 1e-4 either is right;
  such near-ties are counted.
- *logits differ by*: the largest difference; the tests allow {within}.
- *attention*: "softmax" families keep a KV cache in every layer and fit the packed engine; "other"
  ones have layers with another state (linear attention, Mamba, convolutions, indexed or compressed
  attention).

A family is not looked up in a list. Its experts modules are found in the model that transformers
builds (without weights), where their tensors lie on disk comes from transformers' own conversion
mapping, and the form of the FFN is proved by running the module's own activation on sample numbers.
A family that is not in the table may well work; one whose experts do not fit is refused by name.

"""

REFUSALS = """
## Refused, each with one sentence that says why

- a family whose experts cannot be taken out (above), or whose expert FFN is none of the known forms
- a normalisation inside each expert (muse_spark)
- `quantization_config` other than `mxfp4` (published gpt-oss) and `fp8` in blocks of 128 x 128 or
  with one scale a tensor (published DeepSeek-V3, Qwen3 FP8). Those two are undone while they are
  read: resident experts take the bytes of the compute dtype, not those of the file. Checked on tiny
  checkpoints against transformers' own conversion, not on the published ones
- weights only as pickle files (`.bin`): loading them would run code from them
- a family unknown to transformers that brings code of its own (`auto_map`)
- models with an image or audio part, unless transformers can load their language model alone (it
  can for Llama 4, tested, and Qwen3.5-MoE)
- checkpoints that are corrupt, cut short, or lack files, experts or scales

## Known limits

- Layers may differ in their number of experts and their FFN width, not in the experts' input width.
- jetmoe routes attention too; doge retrieves single neurons. Neither has experts that could be
  placed one by one.
- Not tried: step3p7, muse_spark and other families that exist only with an image part.
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table."""

    family: str
    found: Parity | None
    refused: str = ""

    @property
    def good(self) -> bool:
        found = self.found
        return (
            found is not None
            and found.experts_equal
            and found.tokens_equal
            and found.logits_differ_by <= LOGITS_WITHIN
        )

    def cells(self) -> tuple[str, ...]:
        tested = "yes" if self.family in REQUIRED + UNUSUAL else ""
        if self.found is None:
            return self.family, tested, "", "", "", "refused", "", ""
        found, spec = self.found, self.found.spec
        ties = f", {found.near_ties} near-ties" if found.near_ties else ""
        return (
            self.family,
            tested,
            disk_of(spec),
            ffn_of(spec),
            "yes" if found.experts_equal else "NO",
            ("equal" if found.tokens_equal else "DIFFERENT") + ties,
            f"{found.logits_differ_by:.0e}",
            spec.attention,
        )


def disk_of(spec: ModelSpec) -> str:
    pick = spec.layer_specs[0].sources[0].pick
    return {"key": "one by one", "index": "fused", "rows": "rows"}[pick]


def ffn_of(spec: ModelSpec) -> str:
    layer = spec.layer_specs[0]
    maths, words = layer.maths, []
    words.append(("gated " if maths.gated else "") + maths.activation)
    if maths.limit is not None:
        words.append(f"limit {maths.limit:g}")
    if maths.alpha != 1.0:
        words.append(f"alpha {maths.alpha:g}")
    if maths.bias:
        words.append("biases")
    if "halves" in layer.sources[0].steps:
        words.append("interleaved")
    return ", ".join(words)


def outcome_of(family: str, folder: Path, tokens: int) -> Outcome:
    path = tiny_checkpoint(family, folder)
    try:
        return Outcome(family=family, found=compare(path, tokens=tokens))
    except CheckpointError as error:
        return Outcome(family=family, found=None, refused=str(error).replace(f"{folder}/", ""))


def document(outcomes: list[Outcome], tokens: int) -> str:
    lines = [
        INTRODUCTION.format(
            version=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            tokens=tokens,
            within=f"{LOGITS_WITHIN:g}",
        ),
        "| " + " | ".join(HEADER) + " |\n",
        "|" + "---|" * len(HEADER) + "\n",
        *("| " + " | ".join(outcome.cells()) + " |\n" for outcome in outcomes),
    ]
    refused = [outcome for outcome in outcomes if outcome.refused]
    if refused:
        lines.append("\nRefused of these:\n\n")
        lines.extend(f"- {outcome.family}: {outcome.refused}\n" for outcome in refused)
    return "".join(lines) + REFUSALS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [outcome_of(f, Path(folder), arguments.tokens) for f in arguments.family]
    print(table(HEADER, [outcome.cells() for outcome in outcomes]))
    if arguments.write:
        arguments.write.write_text(document(outcomes, arguments.tokens), encoding="utf-8")
    wrong = [o.family for o in outcomes if not o.good and not o.refused]
    finish(
        "families",
        {"tokens": arguments.tokens, "families": len(outcomes)},
        {
            "equal": sum(outcome.good for outcome in outcomes),
            "refused": [outcome.family for outcome in outcomes if outcome.refused],
            "wrong": wrong,
            "largest_difference": max(o.found.logits_differ_by for o in outcomes if o.found),
        },
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
