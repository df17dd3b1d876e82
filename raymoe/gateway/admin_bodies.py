"""What operators send: the bodies of the routes in raymoe/gateway/admin.py."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ScaleBody(BaseModel):
    """So many groups of a kind are to serve."""

    model_config = ConfigDict(extra="forbid", strict=True)
    groups: int = Field(ge=0, le=4096)
    kind: str | None = None


class DrainBody(BaseModel):
    """Empty a group and end it, or have it back."""

    model_config = ConfigDict(extra="forbid", strict=True)
    group: str
    undo: bool = False


class PinBody(BaseModel):
    """A replica is to be on a group, or is not to be; or nothing is said of it any more."""

    model_config = ConfigDict(extra="forbid", strict=True)
    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    group: str
    undo: bool = False


class DryRunBody(BaseModel):
    """How the plan asked about differs from what the controller would make; all may be left out.

    `without`: groups to do without, as if they were drained.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    horizon_s: float | None = Field(None, gt=0)
    margin: float | None = Field(None, ge=0, lt=1)
    interval_bytes: int | None = Field(None, ge=0)
    without: list[str] = Field(default_factory=list, max_length=4096)
