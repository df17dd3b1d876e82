"""Experts restored elsewhere while their group is away, and given back when it is there again."""

from __future__ import annotations

import numpy as np

from placement.failing import Cell
from placement.types import Bools, Placement


class Lent:
    """What lost groups held, and the replicas made in their stead. By group id."""

    def __init__(self) -> None:
        self._home: dict[str, Bools] = {}  # lost group -> bool [L, E], its part of the plan
        self._stand_ins: set[Cell] = set()

    def lost(self, placement: Placement, ids: tuple[str, ...], gone: list[str]) -> None:
        """`gone` of the groups `ids` (the order of `placement`) are there no more."""
        for group in gone:
            self._home[group] = placement.resident[:, :, ids.index(group)].copy()

    def restored(self, layer: int, expert: int, group: str) -> None:
        """A replica was placed on `group` because the expert had none left."""
        if any(held[layer, expert] for held in self._home.values()):
            self._stand_ins.add((layer, expert, group))

    def planned(self) -> None:
        """A plan has weighed every replica since: those that had others will not come back."""
        for held in self._home.values():
            mine = np.zeros_like(held)
            for layer, expert, _ in self._stand_ins:
                mine[layer, expert] = True
            held &= mine

    def give_back(self, placement: Placement, ids: tuple[str, ...]) -> Placement:
        """The plan with what groups of `ids` that are back had, in place of its stand-ins."""
        resident = placement.resident.copy()
        index = {group: g for g, group in enumerate(ids)}
        for group in [g for g in self._home if g in index]:
            home = self._home.pop(group)
            resident[:, :, index[group]] |= home
            for cell in [c for c in self._stand_ins if home[c[0], c[1]]]:
                self._stand_ins.discard(cell)
                if cell[2] in index and cell[2] != group:
                    resident[cell[0], cell[1], index[cell[2]]] = False
        share = np.where(resident, placement.share, 0.0)
        total = share.sum(2, keepdims=True)
        even = resident / np.maximum(resident.sum(2, keepdims=True), 1)
        share = np.where(total > 1e-12, share / np.maximum(total, 1e-300), even)
        return Placement(resident=resident, share=share)
