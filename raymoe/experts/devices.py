"""Whether a device is there and has room, before anything is put on it."""

from __future__ import annotations

import torch

from raymoe.errors import ConfigError


def check_device(device: str, wanted_bytes: int, who: str) -> None:
    """Raises ConfigError when `who` cannot have so many bytes of a device; the CPU is not asked."""
    if torch.device(device).type == "cpu":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{who}: device {device!r} is not to be had here; under Ray it needs num_gpus above 0"
        )
    number = torch.device(device).index or 0
    if number >= torch.cuda.device_count():
        raise ConfigError(f"{who}: there is no {device!r}, only {torch.cuda.device_count()} GPUs")
    free, total = torch.cuda.mem_get_info(number)
    if wanted_bytes > free:
        raise ConfigError(
            f"{who}: {wanted_bytes} bytes are wanted of {device!r}, "
            f"which has {free} of {total} free"
        )
