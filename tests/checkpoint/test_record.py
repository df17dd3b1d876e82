"""One expert's record: read alone, copied, checked; without transformers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from raymoe.checkpoint.record import ExpertRecord, load_expert
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import CheckpointError


@pytest.fixture(scope="module")
def record(qwen3_spec: ModelSpec) -> ExpertRecord:
    return load_expert(qwen3_spec, 1, 5)


def sent(record: ExpertRecord) -> tuple[bytes, bytearray]:
    header, views = record.to_parts()
    return header, bytearray(b"".join(views))


def test_record_is_the_stored_expert_in_the_resident_layout(
    qwen3: Path, record: ExpertRecord
) -> None:
    stored = {}
    for file in qwen3.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if "layers.1.mlp.experts.5." in name:
                    stored[name.split(".")[-2]] = tensors.get_tensor(name)
    gate_up = torch.cat([stored["gate_proj"], stored["up_proj"]]).T
    assert torch.equal(record.tensors["up"], gate_up)
    assert torch.equal(record.tensors["down"], stored["down_proj"].T)
    assert record.tensors["up"].dtype == torch.bfloat16
    assert all(tensor.is_contiguous() for tensor in record.tensors.values())
    assert record.nbytes == 3 * 64 * 48 * 2


def test_copied_record_is_bit_equal(record: ExpertRecord) -> None:
    header, payload = sent(record)
    assert ExpertRecord.payload_bytes(header) == len(payload) == record.nbytes
    copy = ExpertRecord.from_parts(header, payload)
    assert copy.checksum == record.checksum
    assert list(copy.tensors) == list(record.tensors)
    for name, tensor in record.tensors.items():
        assert torch.equal(copy.tensors[name], tensor)


def test_copy_keeps_nans_and_signed_zeros(record: ExpertRecord) -> None:
    odd = torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-40]])
    header, payload = sent(ExpertRecord(tensors={"up": odd}))
    copy = ExpertRecord.from_parts(header, payload).tensors["up"]
    assert torch.equal(copy.view(torch.int32), odd.view(torch.int32))


@pytest.mark.parametrize("at", [0, 1000, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_is_caught(record: ExpertRecord, at: int, bit: int) -> None:
    header, payload = sent(record)
    payload[at] ^= 1 << bit
    with pytest.raises(CheckpointError, match="damaged"):
        ExpertRecord.from_parts(header, payload)


def test_payload_of_another_length_is_refused(record: ExpertRecord) -> None:
    header, payload = sent(record)
    with pytest.raises(CheckpointError, match="bytes instead of"):
        ExpertRecord.from_parts(header, payload[:-1])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'{"nbytes": 4}',
        b'{"nbytes": 4, "checksum": 0, "tensors": [["up", "object", [1]]]}',
        b'{"nbytes": 4, "checksum": 0, "tensors": [["up", "float32", [-1]]]}',
        b'{"nbytes": 4, "checksum": 0, "tensors": [["up", "float32", [1e9]]]}',
        b'{"nbytes": 0, "checksum": 0, "tensors": []}',
        b'{"nbytes": 4, "checksum": null, "tensors": [["up", "float32", [1]]]}',
        b'{"nbytes": 4, "checksum": 0, "tensors": [["up", "float32", [1000]]]}',
    ],
)
def test_malformed_header_is_refused(header: bytes) -> None:
    with pytest.raises(CheckpointError, match="malformed header"):
        ExpertRecord.from_parts(header, bytearray(4))


def test_expert_that_does_not_exist(qwen3_spec: ModelSpec) -> None:
    for layer, expert in ((3, 0), (0, 8), (-1, 0)):
        with pytest.raises(CheckpointError, match="no expert"):
            load_expert(qwen3_spec, layer, expert)


def test_expert_of_another_shape(qwen3_spec: ModelSpec) -> None:
    layer = qwen3_spec.layer_specs[0]
    wrong = dataclasses.replace(layer.sources[0], shape=(64, 95))
    sources = (wrong, *layer.sources[1:])
    spec = dataclasses.replace(
        qwen3_spec, layer_specs=(dataclasses.replace(layer, sources=sources),)
    )
    with pytest.raises(CheckpointError, match="has shape"):
        load_expert(spec, 0, 0)


def test_a_group_needs_no_transformers(qwen3_spec: ModelSpec) -> None:
    code = (
        "import sys\n"
        "from raymoe.checkpoint.record import load_expert\n"
        "from raymoe.checkpoint.spec import ModelSpec\n"
        "from raymoe.experts.shard import ExpertShard\n"
        "spec = ModelSpec.from_json(sys.stdin.read())\n"
        "shard = ExpertShard(spec, budget_bytes=1 << 20)\n"
        "shard.add(2, 7, load_expert(spec, 2, 7))\n"
        "assert shard.has(2, 7)\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], input=qwen3_spec.to_json(), text=True, check=True)
