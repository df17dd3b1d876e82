"""Each family against stock transformers: same experts, same greedy tokens, same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.families import attention_kind, without_weights
from raymoe.checkpoint.reader import read_spec
from raymoe.errors import CheckpointError
from tests.checkpoint.parity import LOGITS_WITHIN, TwoShards, compare, greedy
from tests.zoo import REQUIRED, UNUSUAL, config_of, tiny_checkpoint


@pytest.mark.parity
@pytest.mark.parametrize("family", [*REQUIRED, *UNUSUAL])
def test_family_gives_the_tokens_of_stock_transformers(family: str, checkpoints: Path) -> None:
    found = compare(tiny_checkpoint(family, checkpoints))
    assert found.spec.family == family
    assert found.experts_equal
    if found.near_ties:
        print(f"{family}: {found.near_ties} near-ties")
    assert found.tokens_equal
    assert found.logits_differ_by <= LOGITS_WITHIN
    experts = sum(layer.experts * layer.parameters for layer in found.spec.layer_specs)
    if family == "longcat_flash":  # stock allots rows, never used, to its 2 identity experts
        experts += sum(2 * 2 * layer.inner * found.spec.hidden for layer in found.spec.layer_specs)
    assert found.dense_parameters + experts == found.total_parameters


@pytest.mark.parity
def test_bfloat16_checkpoint_in_several_files(qwen3: Path) -> None:
    assert (qwen3 / "model.safetensors.index.json").exists()
    found = compare(qwen3)
    assert found.spec.stored_dtype == "bfloat16"
    assert found.experts_equal and found.tokens_equal
    assert found.logits_differ_by <= LOGITS_WITHIN


@pytest.mark.parity
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_rows_mode_gives_the_same_logits_as_partial_sums(family: str, checkpoints: Path) -> None:
    spec = read_spec(tiny_checkpoint(family, checkpoints))
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(5))
    sums, sum_logits = greedy(load_dense(spec, TwoShards(spec)), ids, 4)
    rows, row_logits = greedy(load_dense(spec, TwoShards(spec, rows=True)), ids, 4)
    assert torch.equal(sums, rows)
    torch.testing.assert_close(sum_logits, row_logits, rtol=0, atol=LOGITS_WITHIN)


IMAGE_PART = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


@pytest.mark.parity
def test_language_model_is_cut_out_of_llama4_with_its_image_part(tmp_path: Path) -> None:
    text = config_of("llama4_text").to_dict()
    config = transformers.Llama4Config(text_config=text, vision_config=IMAGE_PART)
    model = transformers.Llama4ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.save_pretrained(tmp_path)
    found = compare(tmp_path, tokens=4)
    assert found.spec.family == "llama4_text"
    assert found.experts_equal and found.tokens_equal
    assert found.logits_differ_by <= LOGITS_WITHIN


def test_family_whose_language_model_cannot_be_cut_out_is_refused(tmp_path: Path) -> None:
    transformers.Qwen3VLMoeConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="qwen3_vl_moe"):
        read_spec(tmp_path)


@pytest.mark.parametrize("family", ["jetmoe", "doge"])
def test_family_without_separable_experts_is_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=family):
        read_spec(tiny_checkpoint(family, tmp_path))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3_moe", "softmax"),
        ("gpt_oss", "softmax"),  # sinks and windows are still softmax over a KV cache
        ("deepseek_v3", "softmax"),
        ("qwen3_next", "other"),
        ("granitemoehybrid", "other"),
        ("lfm2_moe", "other"),
        ("deepseek_v32", "other"),
        ("minimax", "other"),
    ],
)
def test_attention_kind(family: str, kind: str) -> None:
    assert attention_kind(without_weights(config_of(family))) == kind
