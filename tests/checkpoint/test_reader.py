"""What a checkpoint that cannot be served is told, in one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import check_files, close_files, load_expert
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import CheckpointError
from raymoe.experts.shard import ExpertShard

INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(qwen3: Path, tmp_path: Path) -> Path:
    """A checkpoint to be spoiled."""
    return Path(shutil.copytree(qwen3, tmp_path / "copy"))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def a_shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[1]


def test_spec_says_what_the_config_says(qwen3_spec: ModelSpec) -> None:
    assert (qwen3_spec.layers, qwen3_spec.experts, qwen3_spec.top_k) == (3, 8, 2)
    assert (qwen3_spec.hidden, qwen3_spec.layer_specs[0].inner) == (64, 48)
    assert qwen3_spec.layer_names[2] == "model.layers.2.mlp.experts"
    assert qwen3_spec.expert_bytes == (3 * 64 * 48 * 4,) * 3
    assert qwen3_spec.resident_bytes("bfloat16") == (3 * 64 * 48 * 2,) * 3


def test_spec_survives_json(qwen3_spec: ModelSpec) -> None:
    assert ModelSpec.from_json(qwen3_spec.to_json()) == qwen3_spec
    with pytest.raises(ValueError, match="format"):
        ModelSpec.from_json(qwen3_spec.to_json().replace('"format":1', '"format":0'))


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        read_spec(tmp_path / "nowhere")


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="neither a folder nor a hub checkpoint"):
        read_spec("nobody/no-such-model")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_spec(tmp_path)


def test_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_spec(copy)


def test_unknown_family(copy: Path) -> None:
    edit_config(copy, model_type="martian_moe")
    with pytest.raises(CheckpointError, match="martian_moe"):
        read_spec(copy)


def test_family_with_code_of_its_own(copy: Path) -> None:
    edit_config(copy, model_type="martian_moe", auto_map={"AutoModelForCausalLM": "martian.Model"})
    with pytest.raises(CheckpointError, match="code of its own"):
        read_spec(copy)


def test_known_family_may_carry_code_that_is_not_run(copy: Path) -> None:
    edit_config(copy, auto_map={"AutoModelForCausalLM": "martian.Model"})
    assert read_spec(copy).family == "qwen3_moe"


def test_not_a_mixture_of_experts(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a mixture of experts.*llama"):
        read_spec(tmp_path)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes"])
def test_quantized_weights_are_refused_by_name(copy: Path, method: str) -> None:
    edit_config(copy, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=method):
        read_spec(copy)


def test_pickled_weights_only(copy: Path) -> None:
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        read_spec(copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle files \(\.bin\) only"):
        read_spec(copy)


def test_missing_weight_file(copy: Path) -> None:
    a_shard(copy).unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weight file model-00002"):
        read_spec(copy)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_weight_file_cut_short(copy: Path, keep: int) -> None:
    shard = a_shard(copy)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002.*corrupt or cut short"):
        read_spec(copy)


def test_weight_file_with_a_broken_header(copy: Path) -> None:
    shard = a_shard(copy)
    data = bytearray(shard.read_bytes())
    data[8:40] = b"#" * 32
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        read_spec(copy)


def test_index_that_promises_what_its_file_lacks(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.experts.0.up_proj.weight"] = a_shard(copy).name
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers\.9.*index promises"):
        read_spec(copy)


def test_index_without_metadata(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    del index["metadata"]  # the Serve application would fail with KeyError: 'metadata'
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r'index\.json has no "metadata": add'):
        read_spec(copy)


def test_index_that_is_not_json(copy: Path) -> None:
    (copy / INDEX).write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        read_spec(copy)


@pytest.mark.parametrize("expert", [0, 3, 7])
def test_checkpoint_that_lacks_an_expert(copy: Path, expert: int) -> None:
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"][f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"experts.*layers\.1"):
        read_spec(copy)


def test_config_with_more_experts_than_the_weights(copy: Path) -> None:
    edit_config(copy, num_experts=9, num_local_experts=9)
    with pytest.raises(CheckpointError, match=r"8 experts.*says 9"):
        read_spec(copy)


def test_fingerprint_is_the_same_for_a_copy(copy: Path, qwen3_spec: ModelSpec) -> None:
    assert read_spec(copy).fingerprint == qwen3_spec.fingerprint


def test_fingerprint_changes_with_a_swapped_weight_file(copy: Path, qwen3_spec: ModelSpec) -> None:
    shard = a_shard(copy)
    size = shard.stat().st_size
    tensors = {name: tensor.flip(0).clone() for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    assert shard.stat().st_size == size  # same names, shapes and size: only numbers differ
    assert read_spec(copy).fingerprint != qwen3_spec.fingerprint
    with pytest.raises(CheckpointError, match="differs from the checkpoint that is served"):
        check_files(dataclasses.replace(qwen3_spec, path=str(copy)))


def test_files_on_another_machine_are_checked(copy: Path, qwen3_spec: ModelSpec) -> None:
    there = dataclasses.replace(qwen3_spec, path=str(copy))
    check_files(there)
    a_shard(copy).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_files(there)
    with pytest.raises(CheckpointError, match="not a folder"):
        check_files(dataclasses.replace(qwen3_spec, path="nowhere"))


def test_closed_files_are_opened_again(qwen3_spec: ModelSpec) -> None:
    before = load_expert(qwen3_spec, 0, 0)
    close_files()
    assert load_expert(qwen3_spec, 0, 0).checksum == before.checksum


def test_fingerprint_changes_with_the_config(copy: Path, qwen3_spec: ModelSpec) -> None:
    edit_config(copy, rms_norm_eps=1e-4)
    assert read_spec(copy).fingerprint != qwen3_spec.fingerprint


def stored_otherwise(path: Path, key: str, dtype: torch.dtype) -> None:
    """Stores one tensor of the checkpoint in another dtype, its numbers changed in bits that only
    a wider one has."""
    index = json.loads((path / INDEX).read_text())
    file = path / index["weight_map"][key]
    tensors = load_file(file)
    tensors[key] = (tensors[key].float() * 1.001).to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("matrix", ["gate_proj", "down_proj"])
@pytest.mark.parametrize(
    ("dtype", "records"),
    [
        (torch.float32, "float32"),
        (torch.float16, "float32"),  # neither holds the other's numbers
        (torch.bfloat16, "bfloat16"),
    ],
)
def test_mixed_dtypes_are_read_without_rounding(
    copy: Path, matrix: str, dtype: torch.dtype, records: str
) -> None:
    """One matrix of one expert is not stored as all the others are."""
    name = f"model.layers.1.mlp.experts.5.{matrix}.weight"
    stored_otherwise(copy, name, dtype)
    spec = read_spec(copy)
    assert spec.stored_dtype == records
    shard = ExpertShard(spec, budget_bytes=1 << 30)
    file = copy / json.loads((copy / INDEX).read_text())["weight_map"][name]
    truth = load_file(file)[name].T  # [in, out]
    for expert in (4, 5):  # as all, and the one
        loaded = load_expert(spec, 1, expert)
        assert {t.dtype for t in loaded.tensors.values()} == {getattr(torch, records)}
        shard.add(1, expert, loaded)
        copied = shard.record(1, expert)
        assert copied is not None and copied.checksum == loaded.checksum
    held = copied.tensors["down"] if matrix == "down_proj" else copied.tensors["up"][:, :48]
    assert torch.equal(held.double(), truth.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.uint8])
def test_tensor_of_a_dtype_that_is_not_read_is_named(copy: Path, dtype: torch.dtype) -> None:
    """Not only that of the first expert: an FP8 weight would go without its scales."""
    stored_otherwise(copy, "model.layers.2.mlp.experts.6.up_proj.weight", dtype)
    named = r"experts\.6\.up_proj\.weight as \w+\d, which is not"
    with pytest.raises(CheckpointError, match=named):
        read_spec(copy)


def test_missing_dense_weight_is_told_when_the_dense_part_is_loaded(copy: Path) -> None:
    from raymoe.checkpoint.dense import load_dense
    from tests.checkpoint.parity import TwoShards

    index = json.loads((copy / INDEX).read_text())
    name = index["weight_map"].pop("model.norm.weight")
    tensors = load_file(copy / name)
    del tensors["model.norm.weight"]
    save_file(tensors, copy / name, metadata={"format": "pt"})
    (copy / INDEX).write_text(json.dumps(index))
    spec = read_spec(copy)
    with pytest.raises(CheckpointError, match=r"dense part, such as model\.norm\.weight"):
        load_dense(spec, TwoShards(spec))


def test_dense_weight_of_another_shape(copy: Path) -> None:
    from raymoe.checkpoint.dense import load_dense
    from tests.checkpoint.parity import TwoShards

    index = json.loads((copy / INDEX).read_text())
    name = index["weight_map"]["model.norm.weight"]
    tensors = load_file(copy / name)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, copy / name, metadata={"format": "pt"})
    spec = read_spec(copy)
    with pytest.raises(CheckpointError, match="does not load"):
        load_dense(spec, TwoShards(spec))
