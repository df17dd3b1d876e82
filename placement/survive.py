"""Survival: what must still fit when one failure domain is gone."""

from __future__ import annotations

import numpy as np

from placement.errors import DoesNotFit
from placement.types import Bools, Fleet


def domains(fleet: Fleet) -> list[tuple[str, Bools]]:
    """The failure domains of `fleet.survive`: (name, bool [G] groups in it)."""
    if fleet.survive == "group":
        return [(f"group {g.id}", np.array([h is g for h in fleet.groups])) for g in fleet.groups]
    if fleet.survive == "node":
        names = sorted({g.node for g in fleet.groups})
        return [
            (f"node {name}", np.array([g.node == name for g in fleet.groups])) for name in names
        ]
    return []


def shortfall(fleet: Fleet, present: Bools, staying: Bools | None = None) -> tuple[int, str]:
    """Missing bytes after the worst loss, and its name; (0, "") when every loss is survived.

    After a loss the survivors may give up spare replicas, so the question is whether one replica
    of each expert fits their budgets (in whole replicas).
    """
    alive = np.ones(len(fleet.groups), np.bool_) if staying is None else staying
    needed = int((present.sum(1) * fleet.expert_bytes).sum())
    grain = int(fleet.expert_bytes.max())
    same = bool((fleet.expert_bytes == grain).all())
    worst, name = 0, ""
    for domain, inside in domains(fleet):
        budget = fleet.budget_bytes[alive & ~inside]
        # with one size only whole replicas count; with several, one replica may go to waste
        usable = budget // grain * grain if same else budget
        missing = needed - int(usable.sum())
        if missing > worst:
            worst, name = missing, domain
    return worst, name


def check_survives(fleet: Fleet, present: Bools, staying: Bools | None = None) -> None:
    """Raise DoesNotFit, by how many bytes, when a domain's loss leaves experts without a place."""
    missing, name = shortfall(fleet, present, staying)
    if missing:
        raise DoesNotFit(
            f"survive: {fleet.survive} needs one replica of each expert to fit without {name}, "
            f"and {missing} bytes are missing; add memory or a group, or lower `survive`",
            missing,
        )
