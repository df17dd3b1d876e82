"""Messages of several clients computed as one."""

from __future__ import annotations

import numpy as np
import torch

from raymoe.links.link import Request
from raymoe.links.protocol import ROWS


class Joined:
    """Several messages of one layer as one, and back. Rows of x follow each other by message."""

    def __init__(self, requests: list[Request]) -> None:
        first = requests[0]
        self.x = torch.cat([request.x for request in requests])
        experts = np.concatenate([np.repeat(r.expert_ids, r.counts) for r in requests])
        token_start = np.cumsum([0, *(r.call.tokens for r in requests)])
        tokens = np.concatenate(
            [r.token_of_pair.numpy() + at for r, at in zip(requests, token_start, strict=False)]
        )
        self.order = np.argsort(experts, kind="stable")
        self.token_of_pair = tokens[self.order].astype(np.int32)
        self.weights: torch.Tensor | None = None
        if first.weights is not None:
            every = torch.cat([r.weights for r in requests if r.weights is not None])
            self.weights = every[torch.from_numpy(self.order)]
        counts = np.bincount(experts)
        self.expert_ids = np.flatnonzero(counts).astype(np.int32)
        self.counts = counts[self.expert_ids].astype(np.int32)
        rows = len(experts) if first.call.mode == ROWS else len(self.x)
        self.out = torch.empty(rows, self.x.shape[1], dtype=self.x.dtype)

    def hand_out(self, requests: list[Request], mode: int) -> None:
        """Each message's rows into its own reply."""
        out = self.out
        if mode == ROWS:
            out = torch.empty_like(self.out)
            out[torch.from_numpy(self.order)] = self.out
        at = 0
        for request in requests:
            request.out.copy_(out[at : at + request.call.out_rows])
            at += request.call.out_rows
