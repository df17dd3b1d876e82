"""A made-up deployment behind the page: the controller's own observer, told what we like."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from placement.table import Table
from raymoe.errors import RouterUnavailable
from raymoe.observe.catalogue import CATALOGUE
from raymoe.observe.observer import Observer

START = 1_760_000_000.0  # Unix seconds


class FakeFleet:
    """`ask` is what the controller would answer. Time passes with `look` only."""

    def __init__(self, layers: int = 6, experts: int = 16, groups: int = 3) -> None:
        self.shape = layers, experts
        self.observer = Observer()
        self.now, self.asked, self.away = 0.0, 0, False
        self.tokens = 0.0
        self.delays = {n: np.zeros(len(CATALOGUE[n].bounds) + 2) for n in DELAYS}
        self.rows = [self.group(f"g{i}", speed=1.0 - 0.3 * (i == 1)) for i in range(groups)]
        self.resident = np.zeros((layers, experts, groups), np.bool_)
        for e in range(experts):
            self.resident[:, e, e % groups] = True
        self.why: dict[tuple[int, int, str], tuple[float, str]] = {}
        self.epoch = 1
        rng = np.random.default_rng(1)
        self.load = rng.zipf(1.8, (layers, experts)).clip(max=40) * 25.0
        self.look()

    @staticmethod
    def group(name: str, **changes: Any) -> dict[str, Any]:
        row = {"id": name, "kind": "default", "pid": 4242, "node": "a" * 56, "state": "ready"}
        row |= {"speed": 1.0, "memory_bytes": 80 << 20, "resident_bytes": 51 << 20, "replicas": 32}
        return {**row, "queued_pairs": 12, "deaths": 0, "last_error": "", **changes}

    def status(self) -> dict[str, Any]:
        answers = {row["id"]: int(1000 * self.now) for row in self.rows}
        profile = {
            "kv_used_blocks": 700,
            "kv_blocks": 2048,
            "answers": answers,
            "latency_s": {g: n * 0.004 for g, n in answers.items()},
        }
        router = {"id": "router-77-a1b2c3", "pid": 77, "state": "ready", "profile": profile}
        return {
            "deployment": "raymoe",
            "model": "demo",
            "family": "qwen3_moe",
            "ready": True,
            "term": 1,
            "epoch": self.epoch,
            "balancedness": round(0.9 + 0.05 * math.sin(self.now / 9), 4),
            "groups": [dict(row) for row in self.rows],
            "routers": [router],
            "controller": {"pid": 1, "state": "ready"},
        }

    def table(self) -> Table:
        ones = np.ones(len(self.rows))
        return Table(
            term=1,
            epoch=self.epoch,
            group_ids=tuple(row["id"] for row in self.rows),
            resident=self.resident.copy(),
            share=self.resident / np.maximum(self.resident.sum(2, keepdims=True), 1),
            speed=np.array([row["speed"] for row in self.rows]) * 1e4,
            alpha_s=0 * ones,
            gamma_s=0 * ones,
        )

    def look(self, seconds: float = 2.0) -> None:
        """So much later, with traffic meanwhile."""
        self.now += seconds
        self.tokens += seconds * (310 + 60 * math.sin(self.now / 7))
        for name, slow in DELAYS.items():
            bounds = CATALOGUE[name].bounds
            for q in range(1, 20):
                value = slow * (0.5 + q / 10) * (1.2 + math.sin(self.now / 11))
                self.delays[name][int(np.searchsorted(bounds, value))] += 1
        self.observer.look(
            self.status(),
            self.table(),
            self.load,
            {"events": [], "plans": []},
            lambda cell: self.why.get(cell, (START, "placed at start, by bytes and speed")),
            {
                "raymoe_generation_tokens_total": {(): self.tokens},
                **{name: {(): list(counts)} for name, counts in self.delays.items()},
            },
            now=self.now,
            at=START + self.now,
        )

    def add(self, layer: int, expert: int, g: int, why: str = "its load grew") -> None:
        """A replica joins the table; seen with the next look."""
        self.resident[layer, expert, g] = True
        self.why[layer, expert, self.rows[g]["id"]] = (START + self.now, why)
        self.epoch += 1

    def drop(self, layer: int, expert: int, g: int) -> None:
        self.resident[layer, expert, g] = False
        self.epoch += 1

    async def ask(
        self, since_seq: int, since_at: float, layers: list[int], why: bool
    ) -> dict[str, Any]:
        self.asked += 1
        if self.away:
            raise RouterUnavailable("the placement controller does not answer")
        view = self.observer.view(since_seq, since_at, layers, why)
        return {**view, "status": self.status()}


DELAYS = {"raymoe_time_to_first_token_seconds": 0.08, "raymoe_inter_token_latency_seconds": 0.03}
