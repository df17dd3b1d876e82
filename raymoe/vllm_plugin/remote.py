"""RemoteExperts: the routed experts of one engine process, wherever their weights are.

One a rank: its own links to the groups, and a thread with a control connection of its own, so that
tables arrive and counts leave while the engine's thread waits inside a layer.
"""

from __future__ import annotations

import logging
import os
import re
import select
import signal
import socket
import threading
import time
from dataclasses import asdict

import torch
from torch import Tensor

from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.client.batch import Batch
from raymoe.config import read_secret
from raymoe.control import ControlClient
from raymoe.errors import ConfigError, ExpertsUnavailable
from raymoe.identity import identity_of
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.settings import PluginSettings

NOTHING = -1
"""The ticket of a dispatch that sent nothing."""

_TELL_S = 0.5
_GRACE_S = 3.0
log = logging.getLogger(__name__)
_BLOCK = re.compile(r"\.(\d+)\.")


class RemoteExperts:
    """Dispatch and combine by ticket: between the two ops only a number can travel.

    Tensor parallel: all `ranks` hold the same tokens, so each sends its slice of them and returns
    zeros elsewhere; vLLM's all-reduce after the layer makes the whole.
    """

    def __init__(
        self, spec: ModelSpec, settings: PluginSettings, *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Returns at once; links and tables come in the background."""
        deployment = settings.deployment_config(spec.path)
        identity, secret = identity_of(deployment, spec), read_secret(deployment)
        # two clients of one name would be one to the controller
        name = settings.name or f"vllm-{socket.gethostname()}-{os.getpid()}"
        name = name if ranks == 1 else f"{name}-{rank}"
        self.spec, self.settings = spec, settings
        self._rank, self._ranks = rank, ranks
        self._layer_of_block = {_block(n): layer for layer, n in enumerate(spec.layer_names)}
        self._batches: dict[int, tuple[Batch, int, int]] = {}  # by ticket: batch, tokens from, to
        self._next_ticket = 0
        self._closed = False
        self.client = ExpertClient(
            identity,
            secret,
            settings.node,
            ClientConfig(mode=settings.mode, stall_limit_s=settings.stall_limit_s),
            name=name,
        )
        self.control = ControlClient(
            identity,
            secret,
            name=name,
            resolve=settings.controller_address,
            client=self.client,
        )
        self.control.start()
        self._board = None if settings.board is None else Board(settings.board)
        self._told = threading.Event()
        if self._board is not None:
            for target in (self._end_with_router, *([self._tell] if rank == 0 else [])):
                threading.Thread(target=target, args=(self._board,), daemon=True).start()

    def layer_of(self, module_name: str) -> int:
        """The MoE layer whose experts vLLM calls `module_name`. ConfigError when there is none."""
        layer = self._layer_of_block.get(_block(module_name))
        if layer is None:
            raise ConfigError(f"{module_name} is no MoE layer of {self.spec.path}")
        return layer

    def dispatch(self, layer: int, x: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> int:
        """Send; x [T, D], expert_ids [T, K] of any integer dtype, gate_weights [T, K], any device.

        x must stay as it is until `combine`. Returns the ticket.
        """
        if self._board is not None and self._board.pending:
            return NOTHING
        tokens = x.shape[0]
        each = -(-tokens // self._ranks)
        start = min(self._rank * each, tokens)
        stop = min(start + each, tokens)
        if start == stop:
            return NOTHING
        try:
            batch = self.client.dispatch(
                layer,
                x[start:stop].cpu(),
                expert_ids[start:stop].to("cpu", torch.int64),
                gate_weights[start:stop].cpu(),
            )
        except ExpertsUnavailable as error:
            self._void(error)
            return NOTHING
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._batches[ticket] = batch, start, stop
        return ticket

    def combine(self, ticket: int, x: Tensor) -> Tensor:
        """Wait; the weighted sums [T, D] in x's dtype and device, zeros where another rank's are.

        After `stall_limit_s` without an answer a router's step is void, and the rest of it means
        nothing; without a router ExpertsUnavailable is raised, which ends the engine.
        """
        if ticket == NOTHING:
            return torch.zeros_like(x)
        batch, start, stop = self._batches.pop(ticket)
        try:
            sums = self.client.combine(batch)
        except ExpertsUnavailable as error:
            self._void(error)
            return torch.zeros_like(x)
        if self._ranks == 1:
            return sums.to(x.device)
        out = torch.zeros_like(x)
        out[start:stop] = sums
        return out

    def _void(self, error: ExpertsUnavailable) -> None:
        if self._board is None:
            raise error
        log.error("a step is void: %s", error)
        self._board.void()

    def _tell(self, board: Board) -> None:
        """The client's totals, for the router's report."""
        while not self._told.wait(_TELL_S):
            reach = {"out_of_reach": self.client.out_of_reach()}
            board.tell_client({**asdict(self.client.stats), **reach})

    def _end_with_router(self, board: Board) -> None:
        """vLLM's processes do not notice when a router is killed."""
        try:
            router = os.pidfd_open(board.router_pid)
        except ProcessLookupError:
            os._exit(1)
        with select.epoll() as poll:
            poll.register(router, select.EPOLLIN)
            poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # vLLM then leaves nothing behind
        time.sleep(_GRACE_S)
        os._exit(1)

    def close(self) -> None:
        """End its threads and links. Idempotent."""
        if not self._closed:
            self._closed = True
            self._told.set()
            self.control.close()
            self.client.close()


def _block(module_name: str) -> int:
    """Number of the transformer block in a module's name: `model.layers.3.mlp.experts` -> 3."""
    found = _BLOCK.search(module_name)
    if found is None:
        raise ConfigError(f"no block number in the module name {module_name!r}")
    return int(found[1])
