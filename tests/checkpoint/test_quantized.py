"""MXFP4 and block FP8: undone as transformers undoes them, expert by expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.quantized import from_fp8, from_mxfp4
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.record import load_expert
from raymoe.errors import CheckpointError
from tests.checkpoint.parity import LOGITS_WITHIN, TwoShards, greedy
from tests.zoo import tiny_checkpoint

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [N, K] in blocks of 128 x 128 -> FP8, and its scales."""
    grid = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            block = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            grid[row, column] = weight[block].abs().max() / 448
            stored[block] = (weight[block] / grid[row, column]).to(torch.float8_e4m3fn)
    return stored, grid


def rewrite(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    """A copy of the checkpoint at `path` beside it, with other weights."""
    copy = path.parent / f"{path.name}-{'quantized' if quantization else 'undone'}"
    copy.mkdir()
    config = json.loads((path / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (copy / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def fp8_pair(folder: Path) -> tuple[Path, Path]:
    """A DeepSeek-V3 with every 2-D weight of its layers in FP8, and the same undone by hand."""
    path = tiny_checkpoint("deepseek_v3", folder, moe_intermediate_size=160)  # ragged blocks
    stored, undone = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        stored[name] = undone[name] = tensor
        if tensor.dim() == 2 and ".layers." in name and ".gate.weight" not in name:
            stored[name], scales = to_fp8(tensor)
            stored[f"{name}_scale_inv"] = scales
            grid = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            undone[name] = stored[name].float() * grid[: tensor.shape[0], : tensor.shape[1]]
    return rewrite(path, stored, FP8), rewrite(path, undone, None)


def mxfp4_pair(folder: Path) -> tuple[Path, Path]:
    """A gpt-oss with random MXFP4 experts, and the same undone by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = tiny_checkpoint("gpt_oss", folder, dtype="bfloat16", intermediate_size=64)
    draw = torch.Generator().manual_seed(0)
    stored, undone = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        stored[name] = undone[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape  # stored [E, in, out]; MXFP4 is [E, out, in/32]
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
            scales = torch.randint(119, 124, shape, dtype=torch.uint8, generator=draw)
            del stored[name]
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
            undone[name] = convert_moe_packed_tensors(blocks, scales)
            assert undone[name].shape == tensor.shape
    return rewrite(path, stored, {"quant_method": "mxfp4"}), rewrite(path, undone, None)


@pytest.mark.parity
@pytest.mark.parametrize(("pair", "method"), [(fp8_pair, "fp8"), (mxfp4_pair, "mxfp4")])
def test_quantized_checkpoint_gives_what_the_undone_one_gives(
    pair: Any, method: str, tmp_path: Path
) -> None:
    from tests.checkpoint.parity import stock_model

    quantized, undone = pair(tmp_path)
    spec, plain = read_spec(quantized), read_spec(undone)
    assert (spec.quantization, plain.quantization) == (method, None)
    assert spec.expert_bytes == plain.expert_bytes
    for layer in range(spec.layers):
        for expert in (0, 7):
            ours = load_expert(spec, layer, expert).tensors
            for name, tensor in load_expert(plain, layer, expert).tensors.items():
                assert torch.equal(ours[name], tensor)
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(3))
    truth, truth_logits = greedy(stock_model(undone), ids, 4)
    found, logits = greedy(load_dense(spec, TwoShards(spec)), ids, 4)
    assert torch.equal(found, truth)
    torch.testing.assert_close(logits, truth_logits, rtol=0, atol=LOGITS_WITHIN)


def test_fp8_scale_of_the_whole_tensor() -> None:
    weight = torch.tensor([[1.0, -2.0]]).to(torch.float8_e4m3fn)
    assert from_fp8(weight, torch.tensor(0.5)).tolist() == [[0.5, -1.0]]


def test_fp8_scales_that_do_not_cover_the_weight() -> None:
    with pytest.raises(CheckpointError, match="do not cover"):
        from_fp8(torch.zeros(300, 4).to(torch.float8_e4m3fn), torch.ones(2, 1))


def test_mxfp4_every_value() -> None:
    blocks = torch.arange(16, dtype=torch.uint8).view(1, 1, 16)  # low half-byte 0..15, high 0
    found = from_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert found[0, 0::2].tolist() == [2 * v for v in [*values, *(-value for value in values)]]
    assert found[0, 1::2].tolist() == [0.0] * 16


def test_fp8_in_other_blocks_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    copy = rewrite(
        path, load_file(path / "model.safetensors"), {**FP8, "weight_block_size": [64, 64]}
    )
    with pytest.raises(CheckpointError, match=r"'fp8' in blocks of \[64, 64\]"):
        read_spec(copy)


def test_fp8_experts_without_scales_are_refused(tmp_path: Path) -> None:
    quantized, _ = fp8_pair(tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"]
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the scales.*experts\.5\.up_proj"):
        read_spec(quantized)


def test_fp8_experts_one_of_which_is_not_are_refused(tmp_path: Path) -> None:
    quantized, _ = fp8_pair(tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    odd = "model.layers.2.mlp.experts.3.down_proj.weight"
    tensors[odd] = tensors[odd].bfloat16()  # its scales would be applied to what is no FP8
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight as BF16"):
        read_spec(quantized)
