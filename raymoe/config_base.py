"""What all parts of the configuration are made of."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

GIB = 1 << 30
MIB = 1 << 20
_OWN_FIELDS = {"CPU": "num_cpus", "GPU": "num_gpus"}


def torch_device(device: str) -> str:
    """Validates a device's name."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {device!r}")
    return device


def custom_resources(resources: dict[str, float]) -> dict[str, float]:
    """Validates Ray resources beside CPUs and GPUs."""
    for name, amount in resources.items():
        if name in _OWN_FIELDS:
            raise ValueError(f"{name} is asked for with {_OWN_FIELDS[name]}")
        if not name or amount <= 0:
            raise ValueError(f"needs a name and an amount above 0, got {name!r}: {amount}")
    return resources


class Checked(BaseModel):
    """Frozen; unknown names fail."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
