"""What routers read: ready replicas, shares and speeds, ordered by (term, epoch)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import PlacementError
from placement.types import Bools, Fleet, Floats, Ints, Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """An immutable snapshot of the READY replicas.

    resident   bool [L, E, G], only replicas that answer now
    share      float64 [L, E, G], sums to 1 over the ready replicas of an expert, 0 elsewhere
    speed      float64 [G], pairs/s of one layer
    alpha_s, gamma_s  float64 [G], fixed seconds of a batch, and per active expert
    """

    term: int
    epoch: int
    group_ids: tuple[str, ...]
    resident: Bools
    share: Floats
    speed: Floats
    alpha_s: Floats
    gamma_s: Floats

    def __post_init__(self) -> None:
        if self.resident.ndim != 3 or self.resident.shape != self.share.shape:
            raise PlacementError("a table needs resident and share of one shape [L, E, G]")
        g = self.resident.shape[2]
        sizes = {len(self.group_ids), len(self.speed), len(self.alpha_s), len(self.gamma_s)}
        if sizes != {g}:
            raise PlacementError(f"a table of {g} groups needs an id, speed, alpha, gamma of each")

    @property
    def order(self) -> tuple[int, int]:
        """Newer tables compare greater: (term, epoch)."""
        return self.term, self.epoch

    def __lt__(self, other: Table) -> bool:
        return self.order < other.order

    @cached_property
    def copies(self) -> Ints:
        """Ready replicas of each expert, int64 [L, E]."""
        copies: Ints = self.resident.sum(2, dtype=np.int64)
        return copies

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, JSON- and msgpack-safe; shares travel for replicated experts only."""
        replicated = self.resident & (self.copies > 1)[:, :, None]
        return {
            "term": self.term,
            "epoch": self.epoch,
            "group_ids": list(self.group_ids),
            "shape": list(self.resident.shape),
            "resident": _text(np.packbits(self.resident)),
            "share": _text(self.share[replicated]),
            "speed": self.speed.tolist(),
            "alpha_s": self.alpha_s.tolist(),
            "gamma_s": self.gamma_s.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Table:
        """The table that `to_dict` wrote. Raises PlacementError when the dict is no table."""
        try:
            layers, experts, groups = (int(n) for n in data["shape"])
            size = layers * experts * groups
            bits = np.frombuffer(base64.b64decode(data["resident"], validate=True), np.uint8)
            if len(bits) != -(-size // 8):
                raise ValueError(f"{len(bits)} bytes for {size} replicas")
            flat = np.unpackbits(bits, count=size).astype(np.bool_)
            resident = flat.reshape(layers, experts, groups)
            share = resident.astype(np.float64)
            replicated = resident & (resident.sum(2) > 1)[:, :, None]
            values = np.frombuffer(base64.b64decode(data["share"], validate=True), np.float64)
            if len(values) != replicated.sum():
                raise ValueError(f"{len(values)} shares for {replicated.sum()} replicas")
            share[replicated] = values
            return cls(
                term=int(data["term"]),
                epoch=int(data["epoch"]),
                group_ids=tuple(data["group_ids"]),
                resident=resident,
                share=share,
                speed=np.array(data["speed"], np.float64),
                alpha_s=np.array(data["alpha_s"], np.float64),
                gamma_s=np.array(data["gamma_s"], np.float64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlacementError(f"not a table: {error!r}") from None


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def make_table(
    fleet: Fleet, placement: Placement, *, term: int, epoch: int, ready: Bools | None = None
) -> Table:
    """The table of a placement, as far as its replicas are ready.

    ready  bool [L, E, G], replicas that answer now; None: all. A ready replica outside the
           placement is left out while the expert has one inside it, and else serves: an expert
           is never without a replica because its new home still loads.
    """
    up = placement.resident if ready is None else np.asarray(ready, np.bool_)
    planned = placement.resident & up
    resident = np.where(planned.any(2, keepdims=True), planned, up)
    share = np.where(resident, placement.share, 0.0)
    total = share.sum(2, keepdims=True)
    # shares of replicas not ready yet go to the ready ones, by speed where those had none
    by_speed = resident * fleet.pair_rate
    by_speed = by_speed / np.maximum(by_speed.sum(2, keepdims=True), 1e-300)
    share = np.where(total > 1e-12, share / np.maximum(total, 1e-300), by_speed)
    return Table(
        term=term,
        epoch=epoch,
        group_ids=fleet.ids,
        resident=resident,
        share=share,
        speed=fleet.pair_rate,
        alpha_s=fleet.alpha_s,
        gamma_s=fleet.gamma_s,
    )
