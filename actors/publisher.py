"""Tables to clients: under this controller's term, the epoch goes on from the last one's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from actors.speeds import Measured
from placement.table import Table
from raymoe.table import GroupEndpoint, RoutingTable

log = logging.getLogger("raymoe.controller")


class Control(Protocol):
    """Where tables go (`raymoe.control.ControlServer`)."""

    def publish(self, routing: RoutingTable) -> bool: ...


class Publisher:
    """Remembers what was published last, as the reconciler made it."""

    def __init__(
        self, control: Control, term: int, epoch: int, keep_epoch: Callable[[int], None]
    ) -> None:
        self._control, self._keep_epoch = control, keep_epoch
        self.term, self.epoch = term, epoch
        self.table: Table | None = None
        self._endpoints: dict[str, GroupEndpoint] = {}

    def publish(
        self,
        table: Table,
        endpoints: Mapping[str, GroupEndpoint],
        measured: Mapping[str, Measured],
    ) -> None:
        """`table` as the next epoch, with the terms of each group's time for the batch split."""
        self.epoch += 1
        try:
            self._keep_epoch(self.epoch)
        except Exception:
            # Ray's head is away: tables are ordered by term first, and the next term is larger
            log.exception("epoch %d is not kept", self.epoch)
        self.table = replace(table, term=self.term, epoch=self.epoch)
        self._endpoints = dict(endpoints)
        told = with_terms(self.table, measured)
        self._control.publish(RoutingTable(table=told, endpoints=self._endpoints))

    def follow_endpoints(
        self, endpoints: Mapping[str, GroupEndpoint], measured: Mapping[str, Measured]
    ) -> None:
        """A group that was started anew is reached before it is of use again."""
        if self.table is not None and dict(endpoints) != self._endpoints:
            self.publish(self.table, endpoints, measured)


def with_terms(table: Table, measured: Mapping[str, Measured]) -> Table:
    """The table with alpha, gamma and pairs/s of every group apart, when all are known."""
    told = [measured.get(group_id) for group_id in table.group_ids]
    known = [one for one in told if one is not None]
    if not known or len(known) < len(told):
        return table
    if np.allclose(table.speed, table.speed[0]):  # to be split as if all were alike
        fastest = max(known, key=lambda one: one.speed)
        known = [fastest] * len(told)
    return replace(
        table,
        speed=np.array([one.pairs_per_s for one in known]),
        alpha_s=np.array([one.alpha_s for one in known]),
        gamma_s=np.array([one.gamma_s for one in known]),
    )
