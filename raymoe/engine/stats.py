"""Counters of an engine: what it did, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.engine.batch import StepBatch


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made. Seconds are wall time of the engine's thread."""

    steps: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    plan_s: float = 0.0  # scheduling and index tensors
    forward_s: float = 0.0  # the model, with attention and the wait for experts
    sample_s: float = 0.0  # sampling and events

    def record(
        self, batch: StepBatch, begin: float, built: float, computed: float, done: float
    ) -> None:
        self.steps += 1
        self.decode_tokens += batch.decode_rows
        self.prefill_tokens += batch.tokens - batch.decode_rows
        self.plan_s += built - begin
        self.forward_s += computed - built
        self.sample_s += done - computed
