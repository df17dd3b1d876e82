"""Continuous batching: requests join and leave between steps, one packed forward a step."""

from __future__ import annotations

import logging
import sys
from time import monotonic, perf_counter, sleep
from typing import Any

import torch

from raymoe.engine.aside import SettingAside
from raymoe.engine.batch import Chunks
from raymoe.engine.blame import Blame
from raymoe.engine.config import EngineConfig
from raymoe.engine.events import end_event, token_event
from raymoe.engine.facts import eos_ids, longest_context
from raymoe.engine.intake import Intake
from raymoe.engine.output import (
    Reading,
    end_of,
    readings,
    readings_without,
    rows_of,
    take_prompt_logprobs,
    take_tokens,
)
from raymoe.engine.paged import PagedModel
from raymoe.engine.prefix import PrefixChain
from raymoe.engine.runnable import runnable
from raymoe.engine.scheduler import Scheduler
from raymoe.engine.seam import Experts
from raymoe.engine.sequence import Sequence, start_sequence
from raymoe.engine.stats import EngineStats
from raymoe.engine.waiting import AwayRequests
from raymoe.errors import ExpertsUnavailable
from raymoe.grammar.state import GrammarStart
from raymoe.requests import (
    ErrorKind,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    TokenLogprobs,
)

log = logging.getLogger(__name__)


class Engine:
    """Runs a transformers causal language model whose routed experts are behind `experts`.

    `model` comes from `raymoe.checkpoint.dense.load_dense(spec, experts)`; `experts` None means
    that the model has its own; over `SettingAside`, experts that are away stop only the requests
    that need them. `add` and `cancel` may be called from any thread; `step` belongs to
    one thread. Raises `ConfigError` when the KV budget holds not even a short request.
    """

    def __init__(
        self,
        model: Any,
        experts: Experts | None = None,
        config: EngineConfig | None = None,
        *,
        grammars: GrammarStart | None = None,
    ) -> None:
        """grammars: how an output that follows a grammar begins; None: such requests are refused"""
        self.config = config or EngineConfig()
        self.eos_ids = eos_ids(model)
        self._model = runnable(model, experts, self.config)
        self.pool = self._model.pool
        self.max_context = min(
            self.pool.capacity_tokens,
            longest_context(model),
            self.config.max_context or sys.maxsize,
        )
        self._intake = Intake(self.config, self.max_context, grammars)
        self._scheduler = Scheduler(
            self.pool,
            max_batch=self.config.max_batch,
            chunk_tokens=self.config.chunk_tokens if self._model.chunked_prefill else None,
            # What a family keeps besides keys and values of each token is not in any block.
            chain=PrefixChain(self.config.block_tokens)
            if self.config.prefix_cache and self.packed
            else None,
        )
        self._aside = experts if isinstance(experts, SettingAside) and self.packed else None
        self._away = AwayRequests(self._aside, self.config) if self._aside is not None else None
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._blame = Blame()
        self._committing = False  # a failure now leaves sequences half changed
        self._computed = 0.0  # when the last forward was done
        self.stats = EngineStats()

    # -- from any thread ---------------------------------------------------------------------

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestError for one that can never run, and Overloaded."""
        self._intake.add(request)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; unknown and ended ones are ignored."""
        self._intake.cancel(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return len(self._intake) > 0

    @property
    def packed(self) -> bool:
        """Whether all requests share one forward a step; if not, each has its own (slower)."""
        return isinstance(self._model, PagedModel)

    @property
    def preemptions(self) -> int:
        """How often a request lost its blocks to an earlier one, and was computed again."""
        return self._scheduler.preemptions

    def load(self) -> tuple[int, int]:
        """Requests that run, and requests that wait to."""
        running = len(self._scheduler.running)
        return running, max(len(self._intake) - running, 0)

    # -- from the engine's thread ------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """Compute one packed forward; what it made, and which requests ended.

        When `ExpertsUnavailable` stops the forward, nothing has happened but the wait: a later
        step tries again, and a request that has been stalled for `stall_end_s` ends with an error.
        After any other failure the next step tries each request alone, and those that fail again
        end with an error (`Blame`); what is raised here means that the engine is broken.
        """
        begin = perf_counter()
        events = self._take_in() + self._bring_back()
        plan = self._scheduler.plan()
        if self._scheduler.admitted:
            self._note_begins()
        chunks = self._model.order(plan, alone=self._blame.suspicious)
        if not chunks:
            if self._away and not events:
                sleep(self.config.stall_pause_s)
            return events
        planned = perf_counter()
        with torch.inference_mode():
            if self._blame.suspicious:
                return events + self._one_by_one(chunks)
            try:
                events += self._compute(chunks)
            except ExpertsUnavailable as error:
                self._model.spoilt(chunks)
                return events + self._stall(chunks, error, perf_counter() - planned)
            except Exception as error:
                self._model.spoilt(chunks)
                if self._committing:
                    raise
                self._blame.failed(error)
                return events
        self._blame.succeeded()
        self.stats.record(
            plan, begin=begin, planned=planned, computed=self._computed, done=perf_counter()
        )
        self.stats.preemptions = self._scheduler.preemptions
        self.stats.prefix_queried_tokens = self._scheduler.queried_tokens
        self.stats.prefix_reused_tokens = self._scheduler.reused_tokens
        return events

    def _compute(self, chunks: Chunks) -> list[TokenEvent]:
        """One forward and what comes of it. Until `_committing` nothing has happened."""
        found = readings(chunks)
        logits = self._forward(chunks, found)
        self._computed = perf_counter()
        if self._aside is not None and self._aside.lost:
            chunks, found, logits = self._set_aside(chunks, found, logits)
        return self._commit(chunks, found, logits)

    def _one_by_one(self, chunks: Chunks) -> list[TokenEvent]:
        """The step after one that has failed."""
        events, guilty = self._blame.one_by_one(
            chunks, self._compute, self._model.spoilt, lambda: self._committing
        )
        for one, error in guilty:
            said = f"the engine failed at this request: {type(error).__name__}: {error}"
            events.append(self._end(one, error=said))
        return events

    def _note_begins(self) -> None:
        now = monotonic()
        for one in self._scheduler.admitted:
            one.began_s = one.began_s or now
        self._scheduler.admitted.clear()

    def _forward(self, chunks: Chunks, found: list[Reading]) -> torch.Tensor:
        """Logits [R, V] of what is to be read; those of requests set aside mean nothing."""
        if self._aside is None:
            return self._model.forward(chunks, rows_of(found))
        self._aside.begin([at for at, (_, tokens) in enumerate(chunks) for _ in range(tokens)])
        try:
            return self._model.forward(chunks, rows_of(found))
        finally:
            self._aside.end()

    def _set_aside(
        self, chunks: Chunks, found: list[Reading], logits: torch.Tensor
    ) -> tuple[Chunks, list[Reading], torch.Tensor]:
        """Take the requests that the step lost out of it: for them it has not happened."""
        assert self._aside is not None and self._away is not None
        lost = self._aside.lost
        self.stats.stalled_steps += 1
        self._away.put(chunks, lost, monotonic())
        found, rows = readings_without(found, lost)
        kept = [chunk for at, chunk in enumerate(chunks) if at not in lost]
        return kept, found, logits[rows]

    def _bring_back(self) -> list[TokenEvent]:
        """Requests whose experts may be back go on; those that waited for too long end."""
        if not self._away:
            return []
        now = monotonic()
        ended = []
        for one in self._away.bring_back(now):
            assert one.away is not None and one.stalled_since is not None
            error = one.away.error
            sentence = str(ExpertsUnavailable(error.layer, error.experts, now - one.stalled_since))
            ended.append(self._end(one, error=sentence, kind="unavailable"))
        return ended

    def _take_in(self) -> list[TokenEvent]:
        events = []
        for item in self._intake.take():
            if isinstance(item, str):
                cancelled = self._sequences.get(item)
                if cancelled is not None:
                    events.append(self._end(cancelled, finish="cancelled"))
                continue
            request, grammar = item
            sequence = start_sequence(request, self._arrivals)
            sequence.grammar = grammar
            self._arrivals += 1
            self._sequences[request.request_id] = sequence
            self._scheduler.add(sequence)
            if request.output_ids:  # continued from elsewhere: it may have had its last already
                finish = end_of(sequence, self.eos_ids, self.max_context)
                if finish is not None:
                    events.append(self._end(sequence, finish=finish))
        return events

    def _stall(self, chunks: Chunks, error: ExpertsUnavailable, tried_s: float) -> list[TokenEvent]:
        """A try has failed after `tried_s`: ends what has been stalled for too long.

        The experts of a fleet have waited already; ones that fail at once must not make us spin.
        """
        self.stats.stalled_steps += 1
        self.stats.stalled_s += tried_s
        now = monotonic()
        if self._away is not None and self._aside is not None and self._aside.lost:
            self._away.put(chunks, self._aside.lost, now)
            return []
        if all(one.stalled_since is None for one, _ in chunks):
            log.warning("%d requests are stalled: %s", len(chunks), error)
        ended = []
        for one, _ in chunks:
            if one.stalled_since is None:
                one.stalled_since = now - tried_s
            stalled_s = now - one.stalled_since
            if stalled_s >= self.config.stall_end_s:
                sentence = str(ExpertsUnavailable(error.layer, error.experts, stalled_s))
                ended.append(self._end(one, error=sentence, kind="unavailable"))
        if not ended and tried_s < self.config.stall_pause_s:
            sleep(self.config.stall_pause_s - tried_s)
        return ended

    def _commit(
        self, chunks: Chunks, found: list[Reading], logits: torch.Tensor
    ) -> list[TokenEvent]:
        """Let the step have happened: only from here on does any sequence change."""
        take_prompt_logprobs(logits, found)
        tokens, logprobs = take_tokens(logits, found, self.eos_ids)
        drawn = iter(zip(tokens, logprobs, strict=True))
        events = []
        self._committing = True
        for reading, (sequence, count) in zip(found, chunks, strict=True):
            self._scheduler.commit(sequence, count)
            sequence.stalled_since, sequence.tries = None, 0
            if reading.sample is not None:
                token, logprob = next(drawn)
                events.append(self._append(sequence, token, logprob))
            elif sequence.pending == 0:  # max_tokens 0: only the prompt was of interest
                events.append(self._end(sequence, finish="length"))
        self._committing = False
        return events

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprobs | None) -> TokenEvent:
        sequence.tokens.append(token)
        if sequence.grammar is not None:
            sequence.grammar.take((token,))
            if (error := sequence.grammar.error) is not None:
                return self._end(sequence, error=f"the output's grammar broke off: {error}")
        finish = end_of(sequence, self.eos_ids, self.max_context)
        if finish is not None:
            self._forget(sequence)
        return token_event(sequence, token, logprob, finish)

    def _end(
        self,
        sequence: Sequence,
        *,
        finish: FinishReason = "error",
        error: str | None = None,
        kind: ErrorKind | None = None,
    ) -> TokenEvent:
        self._forget(sequence)
        return end_event(sequence, finish=finish, error=error, kind=kind)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        if self._away:
            self._away.forget(sequence)
        del self._sequences[sequence.request.request_id]
        self._intake.forget(sequence.request.request_id)
