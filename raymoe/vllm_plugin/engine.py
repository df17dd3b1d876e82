"""VllmEngine: vLLM's AsyncLLM as the engine of a router.

vLLM's scheduler and model run in a process of their own (or several, tensor parallel); here is a
thread with an event loop that hands requests over and takes outputs back (`running.py`).
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
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from raymoe.checkpoint.spec import ModelSpec
from raymoe.client.stats import ClientStats
from raymoe.config import DeploymentConfig
from raymoe.engine.facts import eos_ids
from raymoe.engine.stats import EngineStats
from raymoe.errors import ConfigError, RequestError, RouterUnavailable
from raymoe.grammar.state import LateGrammars
from raymoe.requests import GenerationRequest
from raymoe.stream.messages import ModelInfo
from raymoe.vllm_plugin.arguments import environment
from raymoe.vllm_plugin.board import Board
from raymoe.vllm_plugin.making import make_llm
from raymoe.vllm_plugin.running import Open, Publish, Running, recover
from raymoe.vllm_plugin.supported import check_family
from raymoe.vllm_plugin.traces import (
    mark_owner,
    note_memory,
    remove_traces,
    remove_traces_of_dead,
)

log = logging.getLogger(__name__)
_TICK_S = 0.05
_FOLLOW_S = 1.0
_SHUTDOWN_S = 3.0
_NOTE_S = 0.5


def check_installed(spec: ModelSpec) -> None:
    """Raises ConfigError when this Python cannot run the model under vLLM, before anything runs."""
    check_family(spec)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "engine: vllm needs vLLM, which this Python does not have: pip install 'raymoe[vllm]' "
            "in an environment of its own (docs/vllm.md says which versions go together)"
        )


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
        self._recovering: asyncio.Task[None] | None = None
        self._running = 0
        self._kv_usage = 0.0
        self._stats = EngineStats()
        self._loop = asyncio.new_event_loop()
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
            note_memory(folder)
            wait([made], _NOTE_S)
        note_memory(folder)
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
        self._requests = Running(
            self._loop,
            self._llm,
            self._board,
            eos_ids=self._eos_ids,
            max_context=self._max_context,
            limit=config.routers.max_requests,
            publish=lambda events: self._publish(events),
            on_end=self._die,
        )
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
        self._requests.admit(goes_on=bool(request.output_ids))
        self._loop.call_soon_threadsafe(self._requests.begin, Open(request, state))

    def cancel(self, request_ids: Sequence[str]) -> None:
        self._loop.call_soon_threadsafe(self._requests.cancel, tuple(request_ids))

    @property
    def epoch(self) -> tuple[int, int] | None:
        """Not known here: the workers have the tables."""
        return None

    def load(self) -> tuple[int, int]:
        """Requests that run, and requests that wait to."""
        known = self._requests.known
        running = min(self._running, known)
        return running, known - running

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
        return await make_llm(config, self._spec.path, plugin, self._record)

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
        try:
            await recover(self._requests)
            self._stats.stalled_steps += 1
            self._recovering = None
        except Exception as error:
            log.exception("the router could not recover from a void step")
            self._die(repr(error))

    def _die(self, why: str) -> None:
        if self.died is None:
            self.died = why
            log.error("vLLM's engine is gone: %s", why)
            self._on_death()
