"""Counters of an engine: what it did, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.engine.scheduler import StepPlan


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made. Seconds are wall time of the engine's thread."""

    steps: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    plan_s: float = 0.0  # scheduling
    forward_s: float = 0.0  # the model, with index tensors, attention and the wait for experts
    sample_s: float = 0.0  # sampling and events
    stalled_steps: int = 0  # tries that failed because experts were away
    stalled_s: float = 0.0  # spent in them
    preemptions: int = 0  # requests that lost their blocks to another
    prefix_queried_tokens: int = 0  # of requests when they began (again)
    prefix_reused_tokens: int = 0  # of those, not computed since their blocks were there

    def record(
        self, plan: StepPlan, *, begin: float, planned: float, computed: float, done: float
    ) -> None:
        self.steps += 1
        # This step's own token is among the output: with no other, it was the end of a prompt.
        decoded = sum(one.output_tokens > 1 for one in plan.decode)
        self.decode_tokens += decoded
        self.prefill_tokens += len(plan.decode) - decoded
        self.prefill_tokens += sum(tokens for _, tokens in plan.prefill)
        self.plan_s += planned - begin
        self.forward_s += computed - planned
        self.sample_s += done - computed
