"""What the loader reads of a checkpoint: all but the experts, in every layout; needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.files import WeightFiles
from raymoe.checkpoint.reader import read_spec
from raymoe.errors import ConfigError
from raymoe.vllm_plugin.dense import dense_weights, is_experts
from raymoe.vllm_plugin.supported import FAMILIES, check_family
from tests.zoo import tiny_checkpoint


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "dbrx", "granitemoe"])
def test_exactly_the_dense_tensors_are_read(family: str, tmp_path: Path) -> None:
    """Numbers in what is read = numbers in the dense model, whose loader has tests of its own.

    One tensor an expert, and all experts' tensors with biases, flattened, and transposed.
    """
    spec = read_spec(tiny_checkpoint(family, tmp_path))

    class NoExperts:
        def dispatch(self, *_: object) -> None: ...
        def combine(self, _: object) -> torch.Tensor:
            raise AssertionError

    read = dict(dense_weights(spec))
    dense = load_dense(spec, NoExperts())
    assert sum(t.numel() for t in read.values()) == sum(p.numel() for p in dense.parameters())
    assert len(read) < len(WeightFiles(Path(spec.path)).file_of_key)
    if family not in FAMILIES:
        with pytest.raises(ConfigError, match=f"'{family}'"):
            check_family(spec)


def test_what_stands_beside_an_experts_weight_is_the_experts() -> None:
    stems = frozenset({"m.0.experts.3.up_proj", "m.1.experts.gate_up_proj"})
    for name in (
        "m.0.experts.3.up_proj.weight",
        "m.0.experts.3.up_proj.weight_scale_inv",
        "m.1.experts.gate_up_proj",
        "m.1.experts.gate_up_proj_bias",
        "m.1.experts.gate_up_proj_scale_inv",
    ):
        assert is_experts(name, stems), name
    for name in ("m.0.gate.weight", "m.0.shared_expert.up_proj.weight", "m.1.experts_norm.weight"):
        assert not is_experts(name, stems), name
