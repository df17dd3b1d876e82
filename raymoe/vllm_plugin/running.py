"""The requests of a router that vLLM has not ended, as tasks of one event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymoe.errors import Overloaded
from raymoe.grammar.state import GrammarState
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.vllm_plugin.asking import ended_already, vllm_params
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.telling import event_of

log = logging.getLogger(__name__)
Publish = Callable[[Sequence[TokenEvent]], None]


@dataclass(eq=False, slots=True)
class Open:
    """A request that has not ended; `request.output_ids`: those at the start of its attempt."""

    request: GenerationRequest
    grammar: GrammarState | None
    output_ids: list[int] = field(default_factory=list)  # made here, and published
    task: asyncio.Task[None] | None = None
    first: bool = True


class Running:
    """`admit` and `known` from any thread, everything else in the loop's.

    `publish` is told what happens; `on_end` that vLLM has ended, and why.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        llm: Any,
        board: Board,
        *,
        eos_ids: Collection[int],
        max_context: int,
        limit: int,
        publish: Publish,
        on_end: Callable[[str], None],
    ) -> None:
        self._loop, self.llm, self.board = loop, llm, board
        self._eos_ids, self._max_context, self._limit = eos_ids, max_context, limit
        self._publish, self._on_end = publish, on_end
        self._open: dict[str, Open] = {}
        self._count_lock = threading.Lock()
        self.known = 0
        self._events: list[TokenEvent] = []
        self.held = False
        """While a void step is dealt with: new requests are kept, not begun."""

    def admit(self, *, goes_on: bool = False) -> None:
        """Room for one more. Raises Overloaded, but not for one that goes on from another router:
        it was let in there."""
        with self._count_lock:
            if self.known >= self._limit and not goes_on:
                raise Overloaded(f"{self.known} requests are running or waiting")
            self.known += 1

    def begin(self, one: Open) -> None:
        self._open[one.request.request_id] = one
        if not self.held:
            self._attempt(one)

    def cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            one = self._open.get(request_id)
            if one is not None:
                self._forget(one)
                if one.task is not None:
                    one.task.cancel()

    async def stop_all(self) -> None:
        """Takes every request back from vLLM; none of them has ended."""
        tasks = [one.task for one in self._open.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def go_on(self, void: Collection[str]) -> None:
        """After `stop_all`: those named end, all others begin again, with the tokens they have."""
        for one in tuple(self._open.values()):
            if one.request.request_id in void:
                self._end(
                    one,
                    finish="error",
                    error="experts that this request needs did not answer in time",
                    error_kind="unavailable",
                )
                continue
            sampling = one.request.sampling
            if one.output_ids:  # the prompt's came with the first event
                sampling = replace(sampling, prompt_logprobs=None)
            output = (*one.request.output_ids, *one.output_ids)
            one.request = replace(one.request, output_ids=output, sampling=sampling)
            one.output_ids = []
            self._attempt(one)

    def _attempt(self, one: Open) -> None:
        """Hand it to vLLM; tokens made so far are part of its prompt there."""
        finish = ended_already(one.request, self._eos_ids, self._max_context)
        if finish is not None:
            self._end(one, finish=finish)
            return
        one.task = self._loop.create_task(self._generate(one))

    async def _generate(self, one: Open) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        request = one.request
        try:
            outputs = self.llm.generate(
                TokensPrompt(prompt_token_ids=[*request.prompt_ids, *request.output_ids]),
                SamplingParams(
                    **vllm_params(request, self._eos_ids), output_kind=RequestOutputKind.DELTA
                ),
                request.request_id,
                priority=request.priority,
            )
            try:
                async for output in outputs:
                    if self.board.pending:  # of a void step, or made after it
                        await asyncio.Event().wait()  # until it is cancelled
                    event = _read(one, output)
                    if event.finish is None:
                        self._say(event)
                        continue
                    self._tell_end(one, event)
                    if not output.finished:  # vLLM would go on: closing it aborts the request
                        break
            finally:
                await outputs.aclose()
        except EngineDeadError as error:
            self._on_end(str(error))
        except Exception as error:
            log.exception("vLLM did not finish request %s", request.request_id)
            self._end(
                one,
                finish="error",
                error=str(error) or repr(error),
                error_kind="bad_request" if isinstance(error, ValueError) else None,
            )

    def _end(self, one: Open, **how: Any) -> None:
        self._tell_end(one, TokenEvent(request_id=one.request.request_id, **how))

    def _tell_end(self, one: Open, event: TokenEvent) -> None:
        if self._open.get(one.request.request_id) is one:
            self._forget(one)
            self._say(event)

    def _forget(self, one: Open) -> None:
        del self._open[one.request.request_id]
        with self._count_lock:
            self.known -= 1

    def _say(self, event: TokenEvent) -> None:
        """With all others of the step in one frame: vLLM wakes every request's task at once."""
        self._events.append(event)
        if len(self._events) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        events, self._events = self._events, []
        self._publish(events)


def _read(one: Open, output: Any) -> TokenEvent:
    """The event of an output, as the request's grammar lets it stand."""
    event = event_of(one.request, output, first=one.first)
    one.first = False
    one.output_ids += event.token_ids
    if one.grammar is None or not event.token_ids:
        return event
    one.grammar.take(event.token_ids)
    if (wrong := one.grammar.error) is not None:
        sentence = f"the output's grammar broke off: {wrong}"
        return replace(event, token_ids=(), logprobs=(), finish="error", error=sentence)
    if one.grammar.ended and event.finish != "error":
        return replace(event, finish="stop")
    return event


async def recover(running: Running) -> None:
    """After a void step: its requests end, all others are computed again from their tokens.

    vLLM names blocks by their tokens when it schedules a step, before they are computed: none of
    the cache is kept.
    """
    running.held = True
    board = running.board
    while (void := board.requests()) is None:
        await asyncio.sleep(0.01)
    await running.stop_all()
    while not await running.llm.reset_prefix_cache():
        await asyncio.sleep(0.01)  # a step that ends has blocks still
    board.handle()
    running.held = False
    running.go_on(void)
