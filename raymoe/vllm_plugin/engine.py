"""VllmEngine: vLLM's AsyncLLM as the engine of a router.

vLLM's scheduler and model run in a process of their own (or several, tensor parallel); here is a
thread with an event loop that hands requests over and takes outputs back.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raymoe.checkpoint.spec import ModelSpec
from raymoe.client.stats import ClientStats
from raymoe.config import DeploymentConfig
from raymoe.engine.facts import eos_ids, longest_context
from raymoe.engine.stats import EngineStats
from raymoe.errors import ConfigError, Overloaded, RequestError, RouterUnavailable
from raymoe.grammar.state import GrammarState, LateGrammars
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.messages import ModelInfo
from raymoe.vllm_plugin.arguments import engine_arguments, environment
from raymoe.vllm_plugin.asking import ended_already, vllm_params
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.supported import check_config, check_family, check_version
from raymoe.vllm_plugin.telling import event_of
from raymoe.vllm_plugin.traces import (
    mark_owner,
    note_rings,
    remove_traces,
    remove_traces_of_dead,
)

log = logging.getLogger(__name__)
_TICK_S = 0.05
_FOLLOW_S = 1.0
_SHUTDOWN_S = 3.0
_NOTE_S = 0.5
Publish = Callable[[Sequence[TokenEvent]], None]


def check_installed(spec: ModelSpec) -> None:
    """Raises ConfigError when this Python cannot run the model under vLLM, before anything runs."""
    check_family(spec)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine: vllm needs vLLM, which this Python does not have: pip install 'raymoe[vllm]' "
            "in an environment of its own (docs/vllm.md says which versions go together)"
        )


@dataclass(eq=False, slots=True)
class _Open:
    """A request that has not ended; `request.output_ids`: those at the start of its attempt."""

    request: GenerationRequest
    grammar: GrammarState | None
    output_ids: list[int] = field(default_factory=list)  # made here, and published
    task: asyncio.Task[None] | None = None
    first: bool = True


class VllmEngine:
    """A router's engine. `submit`, `cancel` and `load` return at once, from any thread.

    Raises ConfigError for what vLLM or the plugin refuses.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        spec: ModelSpec,
        *,
        name: str,
        node: str,
        folder: Path,
        controller: Callable[[], tuple[str, int]],
    ) -> None:
        """`folder`: an empty one, for what router and workers tell each other; `controller()` says
        where the controller's control end is now, or raises while it is away."""
        check_installed(spec)
        # what a killed router before this one has left in shared memory
        remove_traces_of_dead(folder.parent.glob("vllm-*"))
        mark_owner(folder)
        os.environ.update(environment(config, folder.parent))
        self._spec = spec
        self._folder = folder
        self._board = Board.create(folder)
        self._board.set_controller(*controller())
        self._controller = controller
        self._closing = threading.Event()
        self.died: str | None = None
        self.client = ClientStats()  # of this process: the workers' is in `profile`
        self._publish: Publish = lambda _: None
        self._on_death: Callable[[], None] = lambda: None
        self._open: dict[str, _Open] = {}
        self._count_lock = threading.Lock()
        self._known = 0
        self._events: list[TokenEvent] = []
        self._recovering: asyncio.Task[None] | None = None
        self._running = 0
        self._kv_usage = 0.0
        self._stats = EngineStats()
        self._loop = asyncio.new_event_loop()
        self._limit = config.routers.max_batch + config.routers.max_waiting
        plane = config.data_plane
        plugin = {
            "controller_file": str(self._board.controller_file),
            "deployment": config.name,
            "node": node,
            "name": name,
            "secret_file": config.secret_file,
            "wire_dtype": plane.wire_dtype,
            "mode": plane.mode,
            "board": str(folder),
            "stall_limit_s": plane.stall_limit_s,
        }
        made: Future[Any] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(config, plugin, made), name="raymoe-vllm", daemon=True
        )
        self._thread.start()
        while not made.done():  # a router may be killed in its start too
            note_rings(folder)
            wait([made], _NOTE_S)
        note_rings(folder)
        self._llm = made.result()
        settings = self._llm.vllm_config
        model, cache = settings.model_config, settings.cache_config
        self._eos_ids = eos_ids(
            SimpleNamespace(
                generation_config=SimpleNamespace(**(model.try_get_generation_config() or {})),
                config=model.hf_config,
            )
        )
        self._kv_blocks = int(cache.num_gpu_blocks)
        vocab = model.get_vocab_size()
        self.model = ModelInfo(
            name=config.served_model_name,
            vocab=vocab,
            context_tokens=model.max_model_len,
            kv_capacity_tokens=self._kv_blocks * cache.block_size,
            eos_ids=tuple(sorted(self._eos_ids)),
        )
        self._max_context = self.model.longest_tokens
        self._grammars = LateGrammars(self._make_grammars)
        self._await_experts(config.placement.load_timeout_s)

    def _await_experts(self, limit_s: float) -> None:
        """As the embedded engine: the router is ready once its worker reaches every expert."""
        deadline = time.monotonic() + limit_s
        while self._board.client().get("out_of_reach") != 0:
            if time.monotonic() > deadline or self._llm.errored:
                self.close()
                raise RouterUnavailable(
                    f"vLLM's worker does not reach every expert within {limit_s:.0f} s"
                )
            time.sleep(0.05)

    # ---- from any thread

    def start(self, publish: Publish, on_death: Callable[[], None]) -> None:
        """From now on requests may come; `on_death` is called once if the engine ends by itself."""
        self._publish, self._on_death = publish, on_death
        self._loop.call_soon_threadsafe(self._tick)
        threading.Thread(target=self._follow_controller, name="vllm-control", daemon=True).start()

    def submit(self, request: GenerationRequest) -> None:
        """Raises RequestError for one that can never run, and Overloaded."""
        length = len(request.prompt_ids)
        if length == 0 or length >= self._max_context:
            raise RequestError(
                f"the prompt has {length} tokens; from 1 to {self._max_context - 1} are possible",
                "prompt",
            )
        grammar = request.sampling.grammar
        state = None if grammar is None else self._grammars(grammar, request.output_ids)
        with self._count_lock:
            if self._known >= self._limit:
                raise Overloaded(f"{self._known} requests are running or waiting")
            self._known += 1
        self._loop.call_soon_threadsafe(self._begin, _Open(request, state))

    def cancel(self, request_ids: Sequence[str]) -> None:
        self._loop.call_soon_threadsafe(self._cancel, tuple(request_ids))

    @property
    def epoch(self) -> tuple[int, int] | None:
        """Not known here: the workers have the tables."""
        return None

    def load(self) -> tuple[int, int]:
        """Requests that run, and requests that wait to."""
        running = min(self._running, self._known)
        return running, self._known - running

    def profile(self) -> dict[str, Any]:
        """Totals, under the names of the embedded engine; 0 where vLLM does not tell."""
        return {
            **asdict(self._stats),
            **asdict(ClientStats()),
            **self._board.client(),
            "kv_used_blocks": round(self._kv_usage * self._kv_blocks),
            "kv_blocks": self._kv_blocks,
        }

    def close(self) -> None:
        """Ends vLLM's processes and the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(20)
        remove_traces(self._folder)

    def _follow_controller(self) -> None:
        """A new controller listens elsewhere; the workers read the file when they connect."""
        while not self._closing.wait(_FOLLOW_S):
            try:
                self._board.set_controller(*self._controller())
            except Exception as error:  # it restarts
                log.info("where the controller listens is not known: %s", error)

    # ---- the loop's thread

    def _run(self, config: DeploymentConfig, plugin: dict[str, Any], made: Future[Any]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            llm = self._loop.run_until_complete(self._make(config, plugin))
        except BaseException as error:
            made.set_exception(error)
            remove_traces(self._folder)
            return
        made.set_result(llm)
        try:
            self._loop.run_forever()
        finally:
            llm.shutdown(timeout=_SHUTDOWN_S)
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    async def _make(self, config: DeploymentConfig, plugin: dict[str, Any]) -> Any:
        try:
            import vllm
            from vllm import AsyncEngineArgs, envs
            from vllm.platforms import current_platform
            from vllm.transformers_utils.config import get_config
            from vllm.v1.engine.async_llm import AsyncLLM

            from raymoe.vllm_plugin.drawing import NAME
        except ImportError as error:
            raise ConfigError(f"engine: vllm does not fit this vLLM: {error}") from error
        text = get_config(self._spec.path, trust_remote_code=False)
        arguments = engine_arguments(
            config,
            self._spec.path,
            plugin,
            drawing=NAME,
            device=current_platform.device_type,
            context=longest_context(SimpleNamespace(config=text)),
        )
        # here already, so that whoever starts the deployment reads the sentence
        check_version(vllm.__version_tuple__[:2], current_platform.device_type)
        try:
            settings = AsyncEngineArgs(**arguments).create_engine_config()
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"vLLM refuses its arguments: {_line(error)}") from error
        check_config(
            settings, config.data_plane.stall_limit_s, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        )
        try:
            return AsyncLLM.from_vllm_config(
                settings, stat_loggers=[self._stat_logger()], disable_log_stats=True
            )
        except RuntimeError as error:  # what happened there is in its own output only
            raise ConfigError(
                f"vLLM's engine process did not start (Ray's logs of the router say why): "
                f"{_line(error)}"
            ) from error

    def _stat_logger(self) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class Counters(StatLoggerBase):  # type: ignore[misc]
            """What vLLM tells after each step."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def log_engine_initialized(self) -> None: ...

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
            ) -> None:
                engine._record(scheduler_stats, iteration_stats)

        return Counters

    def _record(self, scheduler: Any, iteration: Any) -> None:
        stats = self._stats
        if scheduler is not None:
            stats.steps += 1
            self._running, self._kv_usage = scheduler.num_running_reqs, scheduler.kv_cache_usage
            stats.prefix_queried_tokens += scheduler.prefix_cache_stats.queries
            stats.prefix_reused_tokens += scheduler.prefix_cache_stats.hits
        if iteration is not None:
            stats.decode_tokens += iteration.num_generation_tokens
            stats.prefill_tokens += iteration.num_prompt_tokens
            stats.preemptions += iteration.num_preempted_reqs

    def _make_grammars(self) -> Any:
        from raymoe.vllm_plugin.drawing import grammars_of

        return grammars_of(self._spec.path, self.model.vocab, self._eos_ids)

    def _begin(self, one: _Open) -> None:
        self._open[one.request.request_id] = one
        if self._recovering is None:
            self._attempt(one)

    def _attempt(self, one: _Open) -> None:
        """Hand it to vLLM; tokens made so far are part of its prompt there."""
        finish = ended_already(one.request, self._eos_ids, self._max_context)
        if finish is not None:
            self._end(one, TokenEvent(request_id=one.request.request_id, finish=finish))
            return
        one.task = self._loop.create_task(self._generate(one))

    async def _generate(self, one: _Open) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        request = one.request
        try:
            outputs = self._llm.generate(
                TokensPrompt(prompt_token_ids=[*request.prompt_ids, *request.output_ids]),
                SamplingParams(
                    **vllm_params(request, self._eos_ids), output_kind=RequestOutputKind.DELTA
                ),
                request.request_id,
                priority=request.priority,
            )
            try:
                async for output in outputs:
                    if self._board.pending:  # of a void step, or made after it
                        await asyncio.Event().wait()  # until it is cancelled
                    event = self._read(one, output)
                    if event.finish is None:
                        self._say(event)
                        continue
                    self._end(one, event)
                    if not output.finished:  # vLLM would go on: closing it aborts the request
                        break
            finally:
                await outputs.aclose()
        except EngineDeadError as error:
            self._die(str(error))
        except Exception as error:
            log.exception("vLLM did not finish request %s", request.request_id)
            wrong = TokenEvent(
                request_id=request.request_id,
                finish="error",
                error=str(error) or repr(error),
                error_kind="bad_request" if isinstance(error, ValueError) else None,
            )
            self._end(one, wrong)

    def _read(self, one: _Open, output: Any) -> TokenEvent:
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

    def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            one = self._open.get(request_id)
            if one is not None:
                self._forget(one)
                if one.task is not None:
                    one.task.cancel()

    def _end(self, one: _Open, event: TokenEvent) -> None:
        if self._open.get(one.request.request_id) is one:
            self._forget(one)
            self._say(event)

    def _forget(self, one: _Open) -> None:
        del self._open[one.request.request_id]
        with self._count_lock:
            self._known -= 1

    def _say(self, event: TokenEvent) -> None:
        """With all others of the step in one frame: vLLM wakes every request's task at once."""
        self._events.append(event)
        if len(self._events) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        events, self._events = self._events, []
        self._publish(events)

    def _tick(self) -> None:
        if self.died is not None:
            return
        if self._llm.errored:
            self._die("vLLM's engine process has ended")
            return
        if self._board.pending and self._recovering is None:
            self._recovering = self._loop.create_task(self._recover())
        self._loop.call_later(_TICK_S, self._tick)

    async def _recover(self) -> None:
        """After a void step: its requests end, all others are computed again from their tokens.

        vLLM names blocks by their tokens when it schedules a step, before they are computed: none
        of the cache is kept.
        """
        try:
            while (void := self._board.requests()) is None:
                await asyncio.sleep(0.01)
            tasks = [one.task for one in self._open.values() if one.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while not await self._llm.reset_prefix_cache():
                await asyncio.sleep(0.01)  # a step that ends has blocks still
            self._stats.stalled_steps += 1
            self._board.handle()
            self._recovering = None
            for one in tuple(self._open.values()):
                self._go_on(one, void)
        except Exception as error:
            log.exception("the router could not recover from a void step")
            self._die(repr(error))

    def _go_on(self, one: _Open, void: frozenset[str]) -> None:
        request_id = one.request.request_id
        if request_id in void:
            gone = TokenEvent(
                request_id=request_id,
                finish="error",
                error="experts that this request needs did not answer in time",
                error_kind="unavailable",
            )
            self._end(one, gone)
            return
        sampling = one.request.sampling
        if one.output_ids:  # the prompt's came with the first event
            sampling = replace(sampling, prompt_logprobs=None)
        output = (*one.request.output_ids, *one.output_ids)
        one.request = replace(one.request, output_ids=output, sampling=sampling)
        one.output_ids = []
        self._attempt(one)

    def _die(self, why: str) -> None:
        if self.died is None:
            self.died = why
            log.error("vLLM's engine is gone: %s", why)
            self._on_death()


def _line(error: Exception) -> str:
    """What an error says, in one line: pydantic's have a line for each field."""
    return " ".join(str(error).split())[:400]
