"""One expert's stored bytes: read from the checkpoint, checked, copied between groups.

Needs torch and safetensors only. The record keeps the checkpoint's dtype, so a copy moves no more
bytes than the file holds, and its checksum is the same in every group. Where a checkpoint mixes
dtypes all records have the widest, which rounds nothing.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from raymoe.checkpoint.files import WeightFiles, fingerprint, read_config
from raymoe.checkpoint.quantized import from_fp8, from_mxfp4
from raymoe.checkpoint.spec import DTYPE_BYTES, LayerSpec, ModelSpec, Source
from raymoe.errors import CheckpointError

Parts = list[torch.Tensor]


def _concat(parts: Parts) -> Parts:
    return [torch.cat(parts, dim=0)]


def _transpose(parts: Parts) -> Parts:
    return [part.t() for part in parts]


def _deinterleave(parts: Parts) -> Parts:
    """Rows g0 u0 g1 u1 ... -> g0 g1 ... u0 u1 ..."""
    return [torch.cat([part[0::2], part[1::2]]) for part in parts]


def _interleave(parts: Parts) -> Parts:
    """Rows g0 g1 ... u0 u1 ... -> g0 u0 g1 u1 ..."""
    return [torch.stack(part.chunk(2), dim=1).reshape(part.shape) for part in parts]


def _halves(parts: Parts) -> Parts:
    """Last dim g0 u0 g1 u1 ... -> g0 g1 ... u0 u1 ..."""
    return [torch.cat([part[..., 0::2], part[..., 1::2]], dim=-1) for part in parts]


def _fp8(parts: Parts) -> Parts:
    """Weight, scales, weight, scales, ... -> weights."""
    return [from_fp8(*pair) for pair in zip(parts[0::2], parts[1::2], strict=True)]


def _mxfp4(parts: Parts) -> Parts:
    """Blocks and scales -> the weight."""
    return [from_mxfp4(*parts)]


STEPS: dict[str, Callable[[Parts], Parts]] = {
    "concat": _concat,
    "transpose": _transpose,
    "deinterleave": _deinterleave,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "interleave": _interleave,
    "halves": _halves,
}
"""Every step acts on the list of one expert's parts, without the expert dim."""


@dataclass(frozen=True, kw_only=True)
class ExpertRecord:
    """An expert in the resident layout, in the stored dtype; opaque to everything but the shard.

    tensors: by resident name, each contiguous on the CPU
    """

    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def checksum(self) -> int:
        """CRC-32 over the tensors' bytes, in order."""
        crc = 0
        for view in self._views():
            crc = zlib.crc32(view, crc)
        return crc

    def _views(self) -> list[memoryview]:
        return [tensor.view(-1).view(torch.uint8).numpy().data for tensor in self.tensors.values()]

    def to_parts(self) -> tuple[bytes, list[memoryview]]:
        """A header and the payload's pieces, to be sent in this order. No copy is made."""
        names = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in self.tensors.items()
        ]
        header = {"tensors": names, "nbytes": self.nbytes, "checksum": self.checksum}
        return json.dumps(header).encode(), self._views()

    @staticmethod
    def payload_bytes(header: bytes) -> int:
        """How many payload bytes follow a header. Raises CheckpointError for a bad header."""
        return int(_parse(header)["nbytes"])

    @classmethod
    def from_parts(cls, header: bytes, payload: bytearray | memoryview) -> ExpertRecord:
        """The record whose parts were sent; its tensors lie in `payload` (writable, not copied).

        Raises CheckpointError when lengths or checksum do not match.
        """
        fields = _parse(header)
        flat = torch.frombuffer(payload, dtype=torch.uint8)
        if flat.numel() != fields["nbytes"]:
            raise CheckpointError(
                f"an expert's record has {flat.numel()} bytes instead of {fields['nbytes']}"
            )
        tensors: dict[str, torch.Tensor] = {}
        at = 0
        for name, dtype, shape in fields["tensors"]:
            end = at + _bytes(dtype, shape)
            tensors[name] = flat[at:end].view(getattr(torch, dtype)).view(shape)
            at = end
        record = cls(tensors=tensors)
        if record.checksum != fields["checksum"]:
            raise CheckpointError("an expert's record arrived damaged: its checksum differs")
        return record


def _bytes(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _parse(header: bytes) -> dict[str, Any]:
    """The header's fields, whose tensors fill its payload exactly."""
    try:
        fields: dict[str, Any] = json.loads(header)
        for _, dtype, shape in fields["tensors"]:
            if dtype not in DTYPE_BYTES or any(type(n) is not int or n < 1 for n in shape):
                raise ValueError(f"a tensor of {dtype} {shape}")
        total = sum(_bytes(dtype, shape) for _, dtype, shape in fields["tensors"])
        if type(fields["checksum"]) is not int or fields["nbytes"] != total or total == 0:
            raise ValueError(f"{fields['nbytes']} bytes for tensors of {total}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"an expert's record has a malformed header: {error!r}") from None
    return fields


@lru_cache(maxsize=4)
def _files(path: str) -> WeightFiles:
    return WeightFiles(Path(path))


def close_files() -> None:
    """Let go of the weight files: their mapped pages leave this process; the next load reopens."""
    _files.cache_clear()


def check_files(spec: ModelSpec) -> None:
    """Whether the files at `spec.path` on this machine are those the spec was read from.

    For a group on another node than where the spec was made. Raises CheckpointError.
    """
    path = Path(spec.path)
    read_config(path)
    try:
        found = fingerprint(path, WeightFiles(path).files)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if found != spec.fingerprint:
        raise CheckpointError(
            f"{path} on this machine differs from the checkpoint that is served: "
            f"fingerprint {found} instead of {spec.fingerprint}"
        )


def load_expert(spec: ModelSpec, layer: int, expert: int) -> ExpertRecord:
    """Read one expert, and only its bytes.

    Raises CheckpointError when the expert does not exist or its stored tensors do not fit.
    """
    if not 0 <= layer < spec.layers or not 0 <= expert < spec.layer_specs[layer].experts:
        raise CheckpointError(f"{spec.path} has no expert {expert} in MoE layer {layer}")
    files, of_layer = _files(spec.path), spec.layer_specs[layer]
    dtype = getattr(torch, spec.stored_dtype)
    return ExpertRecord(
        tensors={
            source.tensor: _read(files, of_layer, source, expert, dtype)
            for source in of_layer.sources
        }
    )


def _read(
    files: WeightFiles, layer: LayerSpec, source: Source, expert: int, dtype: torch.dtype
) -> torch.Tensor:
    if source.pick == "key":
        parts = [files.tensor(key.format(expert)) for key in source.keys]
    elif source.pick == "index":
        parts = [files.rows(key, expert, expert + 1)[0] for key in source.keys]
    else:
        start = expert * source.rows
        parts = [files.rows(key, start, start + source.rows) for key in source.keys]
    for step in source.steps:
        parts = STEPS[step](parts)
    (tensor,) = parts
    if tuple(tensor.shape) != source.shape:
        raise CheckpointError(
            f"{source.tensor} of expert {expert} of {layer.name} has shape {list(tensor.shape)} "
            f"instead of {list(source.shape)}"
        )
    # A copy of our own: the memory map must not stay referenced by a record.
    return torch.empty(source.shape, dtype=dtype).copy_(tensor)
