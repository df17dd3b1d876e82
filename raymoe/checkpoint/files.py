"""The files of a checkpoint folder: found, checked, opened one tensor at a time, fingerprinted.

Nothing here needs transformers, so that groups can read single experts without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raymoe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAMPLE_BYTES = 65536
SAMPLES = 16


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of the folder. Raises CheckpointError when missing or unreadable."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json: not a checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'} does not hold an object")
    return config


class WeightFiles:
    """The safetensors files of a folder, by the names of the tensors in them.

    Opening is lazy and cached; tensors are read through a memory map, so that only the bytes of
    what is asked for are touched. Safe to share between threads.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError when there are no safetensors or the index cannot be read."""
        self.path = path
        self._open: dict[str, Any] = {}
        self.file_of_key: dict[str, str] = self._index()

    def _index(self) -> dict[str, str]:
        index = self.path / INDEX
        if index.exists():
            try:
                read = json.loads(index.read_text(encoding="utf-8"))
                file_of_key = dict(read["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} cannot be read: {error!r}") from None
            if not isinstance(read.get("metadata"), dict):  # without it transformers loads nothing
                raise CheckpointError(
                    f'{index} has no "metadata": add {{"total_size": BYTES}} beside "weight_map"'
                )
            return file_of_key
        if (self.path / SINGLE).exists():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt")):
            raise CheckpointError(
                f"{self.path} holds its weights as pickle files (.bin) only; loading those would "
                "run code from them: convert the checkpoint to safetensors"
            )
        raise CheckpointError(f"{self.path} holds no weights ({SINGLE} or {INDEX})")

    @property
    def files(self) -> list[str]:
        """Names of all weight files, sorted."""
        return sorted(set(self.file_of_key.values()))

    def _file(self, name: str) -> Any:
        opened = self._open.get(name)
        if opened is None:
            try:
                opened = safe_open(self.path / name, "pt")
            except FileNotFoundError:
                raise CheckpointError(f"{self.path} lacks the weight file {name}") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.path / name} is corrupt or cut short: {error}"
                ) from None
            self._open[name] = opened
        return opened

    def check(self) -> None:
        """Open every file and compare with the index. Raises CheckpointError naming the file.

        safetensors itself compares each file's length with its header.
        """
        held = {name: set(self._file(name).keys()) for name in self.files}
        for key, name in self.file_of_key.items():
            if key not in held[name]:
                raise CheckpointError(f"{self.path / name} lacks {key}, which its index promises")

    def _tensor_file(self, key: str) -> Any:
        try:
            return self._file(self.file_of_key[key])
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor named {key}") from None

    def tensor(self, key: str) -> torch.Tensor:
        """One whole stored tensor."""
        tensor: torch.Tensor = self._tensor_file(key).get_tensor(key)
        return tensor

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of dim 0 of a stored tensor; only their bytes are read."""
        tensor: torch.Tensor = self._tensor_file(key).get_slice(key)[start:stop]
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensor_file(key).get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """safetensors' own word: F32, BF16, F16, U8, F8_E4M3, ..."""
        return str(self._tensor_file(key).get_slice(key).get_dtype())


def fingerprint(path: Path, files: list[str]) -> str:
    """Hex digest over config, index, and each weight file's size, header and 16 samples of 64 KiB.

    Reads about 1 MiB a file, so that a 1 TB checkpoint takes seconds; a fine-tuned file of the same
    size and header differs in the samples.
    """
    digest = hashlib.sha256()
    for name in ("config.json", INDEX):
        if (path / name).exists():
            digest.update((path / name).read_bytes())
    for name in files:
        size = (path / name).stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with open(path / name, "rb", buffering=0) as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
