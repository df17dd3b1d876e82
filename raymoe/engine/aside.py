"""Experts that are away stop the requests whose tokens need them, and no others.

A step packs the tokens of many requests, and its rows do not depend on other requests' rows. So
when a layer finds no live replica of an expert, the requests with a row for it are set aside: their
rows go on with zeros in place of the experts' sums, at no expert's cost, and what the step makes of
them is thrown away (keys and values are written by position: trying again overwrites them). The
layer is computed again for the other rows, and the step ends for them as ever.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from raymoe.engine.seam import Experts
from raymoe.engine.turns import others_turn, rows_here
from raymoe.errors import ExpertsUnavailable

_LayerCall = tuple[int, Tensor, Tensor, Tensor]


class SettingAside:
    """`Experts` over other experts, for one engine at a time.

    With `begin`, a step sets requests aside; `lost` says which and why. Without (models that run
    requests one by one, whose states cannot be computed twice), a layer waits for its experts for
    up to `patience_s`.

    `experts.absent(layer)`, where there is one, gives the experts of a layer that are known to
    have no live replica, or None: rows for them are set aside at once, without asking.
    `experts.abandon(pending)`, where there is one, takes what is never going to be combined.

    While one micro-batch of a step waits here, the other goes on (`raymoe.engine.turns`); owners
    and who goes on are those of the whole step.
    """

    def __init__(self, experts: Experts, *, patience_s: float = 5.0) -> None:
        self._experts = experts
        self._patience_s = patience_s
        self._absent = getattr(experts, "absent", _nobody)
        self._abandon = getattr(experts, "abandon", _nobody)
        self._owners: Tensor | None = None  # int64 [N]
        self._going: Tensor | None = None  # bool [N], None while all rows go on
        self.lost: dict[int, ExpertsUnavailable] = {}

    def begin(self, owners: Rows[int]) -> None:
        """A step begins in which packed row r belongs to request `owners[r]`."""
        self._owners = torch.tensor(owners)
        self._going = None
        self.lost = {}

    def end(self) -> None:
        """The step is over, however it went; `lost` stays."""
        self._owners = self._going = None

    def back(self, error: ExpertsUnavailable) -> bool:
        """Whether the experts that were away may be there again."""
        absent = self._absent(error.layer)
        return absent is None or not set(error.experts).intersection(absent)

    # -- the seam ----------------------------------------------------------------------------

    def dispatch(
        self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> tuple[_LayerCall, Any]:
        call = (layer, hidden, expert_ids, gate_weights)
        if self._owners is None:
            return call, self._experts.dispatch(*call)
        if self._going is not None:
            return call, None
        try:
            absent = self._absent(layer)
            if absent is not None:
                self._check(call, ExpertsUnavailable(layer, tuple(absent), 0.0))
            return call, self._experts.dispatch(*call)
        except ExpertsUnavailable as error:
            return call, error

    def combine(self, pending: tuple[_LayerCall, Any]) -> Tensor:
        """[T, D]; zeros for rows of requests that were set aside. Raises ExpertsUnavailable when
        no request is left."""
        call, sent = pending
        try:
            others_turn()
        except BaseException:  # it has failed, and this half of the step ends with it
            if sent is not None and not isinstance(sent, ExpertsUnavailable):
                self._abandon(sent)
            raise
        if self._owners is None:
            return self._wait(call, sent)
        error: ExpertsUnavailable | None = None
        if isinstance(sent, ExpertsUnavailable):
            error = sent
        elif sent is not None:
            try:
                return self._experts.combine(sent)
            except ExpertsUnavailable as found:
                error = found
        return self._for_the_others(call, error)

    def _check(self, call: _LayerCall, error: ExpertsUnavailable) -> None:
        """Raises `error` when a row needs one of its experts."""
        if bool(torch.isin(call[2], torch.tensor(error.experts)).any()):
            raise error

    def _for_the_others(self, call: _LayerCall, error: ExpertsUnavailable | None) -> Tensor:
        layer, hidden, expert_ids, gate_weights = call
        out = torch.zeros_like(hidden)
        # Then the error may be of rows that the other micro-batch has set aside meanwhile.
        others = self._going is not None
        while True:
            if error is not None:
                self._set_aside(error, expert_ids, others)
                others = False
            assert self._going is not None
            going = self._going[rows_here()]
            times = len(hidden) // len(going)  # Llama 4 sends a row a pair
            rows = going.repeat_interleave(times).nonzero()[:, 0]
            if not len(rows):  # all of this micro-batch's, not of the other's
                return out
            rest = (layer, hidden[rows], expert_ids[rows], gate_weights[rows])
            try:
                absent = self._absent(layer)
                if absent is not None:
                    self._check(rest, ExpertsUnavailable(layer, tuple(absent), 0.0))
                out[rows] = self._experts.combine(self._experts.dispatch(*rest))
                return out
            except ExpertsUnavailable as found:
                error = found

    def _set_aside(self, error: ExpertsUnavailable, expert_ids: Tensor, others: bool) -> None:
        """Take the requests whose rows need the experts of `error` out of this step.

        others: they may be out of it already. Raises `error` when nobody is left, or needs them.
        """
        owners, here = self._owners, rows_here()
        assert owners is not None
        needs = torch.isin(expert_ids, torch.tensor(error.experts)).any(-1)
        needs = needs.view(len(owners[here]), -1).any(-1)
        if self._going is not None:
            needs &= self._going[here]
        found = set(owners[here][needs].tolist())
        if not found and others:
            return
        if not found:  # nobody asked for them: trying again would never end
            raise error
        self.lost.update(dict.fromkeys(found, error))
        going = ~torch.isin(owners, torch.tensor(list(self.lost)))
        if not going.any():
            raise error
        self._going = going

    def _wait(self, call: _LayerCall, sent: Any) -> Tensor:
        since = monotonic()
        while True:
            try:
                return self._experts.combine(sent)
            except ExpertsUnavailable:
                if monotonic() - since >= self._patience_s:
                    raise
            sent = self._experts.dispatch(*call)


def _nobody(_: Any) -> None:
    """For experts that do not say who is absent, or have nothing to abandon."""
