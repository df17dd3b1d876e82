"""`raymoe serve`: bring a deployment up, say what happens, wait for a signal, take it down."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from actors.controller import ensure_controller, find_controller, reason
from actors.local import LocalRay, check_port_free
from raymoe.config import DeploymentConfig, read_secret
from raymoe.errors import ConfigError

MIB = 1 << 20
_POLL_S = 0.2
_STOP_GRACE_S = 5.0
_STEP_S = 10.0  # for the step of a start that is under way when it is to stop
_OWN_STEP_S = 1.0


class _Stopped(Exception):
    """A signal arrived while the deployment was coming up."""


def launch(
    config: DeploymentConfig, spec_json: str, summary: str, build: Callable[..., Any]
) -> int:
    """Serves until SIGINT or SIGTERM; the exit status. `build` makes the Serve application.

    Raises `ConfigError` (and other `RaymoeError`s) when the deployment cannot come up; whatever
    was started by then is gone.
    """
    if config.ray.address is None:  # in a cluster, Ray Serve may listen there already
        check_port_free(config.gateway.host, config.gateway.port)
    stop = threading.Event()
    _say(f"raymoe: {summary}")
    bringing_up = _BringUp(config, spec_json, build, stop)
    bringing_up.start()
    try:
        while not stop.is_set():
            # Again and again: Ray's core puts its own handler for SIGTERM in place whenever it is
            # initialised, and that one aborts the process.
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda *_: stop.set())
            stop.wait(_POLL_S)
            if bringing_up.failed is not None:
                raise bringing_up.failed
    finally:
        _say("stopping")
        bringing_up.take_down()
    _say("stopped")
    return 0


class _BringUp(threading.Thread):
    """Starts everything, step by step, in a thread of its own.

    Ray's calls must not be broken off by a signal in their middle, and nobody waits
    long for the end of a step that hangs.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        spec_json: str,
        build: Callable[..., Any],
        stop: threading.Event,
    ) -> None:
        super().__init__(name="bring-up", daemon=True)
        self._config, self._spec_json, self._build, self._stop = config, spec_json, build, stop
        self._local: LocalRay | None = None
        self._through = threading.Event()
        self._taken_down = threading.Event()
        self.failed: Exception | None = None

    def run(self) -> None:
        started = time.monotonic()
        try:
            self._start_ray()
            self._check()
            controller = ensure_controller(self._config, self._spec_json)
            self._check()
            _deploy(self._config, self._build, self._spec_json)
            _follow(controller, self._config, self._check)
            _announce(self._config, time.monotonic() - started)
        except _Stopped:
            pass
        except (ray.exceptions.RayError, ConnectionError) as e:
            self.failed = ConfigError(f"the deployment cannot start: {reason(e)}")
        except Exception as e:
            self.failed = e
        finally:
            self._through.set()
            # Ray has its processes die with the thread that started them: stay.
            self._taken_down.wait()

    def take_down(self) -> None:
        """Ends what was started.

        A Ray of our own that is still coming up is not asked: its processes are ended. In a
        cluster that is not ours the step under way is waited for, so that it can be undone.
        """
        self._stop.set()
        finished = self._through.wait(_STEP_S if self._local is None else _OWN_STEP_S)
        if self._local is not None and not finished:
            self._local.kill()
            _say("stopped")
            sys.stdout.flush()
            os._exit(0)  # the broken step still runs in its thread, and may wait for long
        _take_down(self._config, self._local)
        self._taken_down.set()

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _start_ray(self) -> None:
        if self._config.ray.address is None:
            self._local = LocalRay(self._config.ray)
            self._config = _with_secret(self._config, self._local.folder)
            _say("starting Ray on this machine")
            self._local.start(*_logical_resources(self._config))
        else:
            read_secret(self._config)
            _say(f"joining the Ray cluster at {self._config.ray.address}")
            ray.init(address=self._config.ray.address, log_to_driver=False, logging_level="ERROR")


def _deploy(config: DeploymentConfig, build: Callable[..., Any], spec_json: str) -> None:
    groups = sum(kind.count for kind in config.groups)
    _say(
        f"starting {groups} expert group(s), {config.routers.count} router(s), "
        f"{config.gateway.count} gateway(s)"
    )
    with _quiet_serve():
        serve.start(http_options={"host": config.gateway.host, "port": config.gateway.port})
        _check_listening(config)
        serve.run_many(
            [serve.RunTarget(build(config, spec_json), name=config.name, route_prefix="/")],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def _check_listening(config: DeploymentConfig) -> None:
    """A Serve instance that runs already keeps its own address, whatever it is asked for."""
    wanted = (config.gateway.host, config.gateway.port)
    running = _get_global_client().http_config
    if (running.host, running.port) != wanted:
        raise ConfigError(
            f"Ray Serve of this cluster listens on {running.host}:{running.port} already, not on "
            f"{wanted[0]}:{wanted[1]}: use --host {running.host} --port {running.port}"
        )


def _follow(controller: Any, config: DeploymentConfig, check: Callable[[], None]) -> None:
    """Waits until the deployment can answer; raises the controller's reason when it cannot."""
    deadline = time.monotonic() + config.placement.load_timeout_s
    shown = ""
    while True:
        check()
        progress = ray.get(controller.progress.remote())
        if progress["failed"]:
            raise ConfigError(progress["failed"])
        if progress["text"] != shown:
            shown = progress["text"]
            _say(shown)
        app = serve.status().applications.get(config.name)
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ConfigError(f"the Serve application failed to start: {app.message}")
        if progress["ready"] and app is not None and app.status == "RUNNING" and _healthy(config):
            return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"not ready after {config.placement.load_timeout_s:.0f} s "
                f"(placement.load_timeout_s); last: {shown}"
            )
        time.sleep(_POLL_S)


def _healthy(config: DeploymentConfig) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(_url(config) + "/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _announce(config: DeploymentConfig, seconds: float) -> None:
    url, model = _url(config), config.served_model_name
    _say(f"ready: {url}/v1  model {model!r}  ({seconds:.1f} s)")
    _say("try:")
    print(
        f"  curl {url}/v1/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "prompt": "In the beginning", "max_tokens": 32}}\'',
        flush=True,
    )


def _url(config: DeploymentConfig) -> str:
    host = config.gateway.host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{config.gateway.port}"


def _take_down(config: DeploymentConfig, local: LocalRay | None) -> None:
    if ray.is_initialized():
        deadline = time.monotonic() + _STOP_GRACE_S
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            controller = find_controller(config.name)
            ray.get(controller.stop.remote(), timeout=max(0.1, deadline - time.monotonic()))
            ray.kill(controller)
        if local is None:
            with contextlib.suppress(ray.exceptions.RayError), _quiet_serve():
                serve.delete(config.name)
                if not serve.status().applications:
                    serve.shutdown()
            ray.shutdown()
    if local is not None:
        local.stop()


def _with_secret(config: DeploymentConfig, folder: Path) -> DeploymentConfig:
    """A local start without a secret gets one of its own, readable by this user only."""
    if config.secret_file is not None or "RAYMOE_SECRET" in os.environ:
        read_secret(config)
        return config
    path = folder / "secret"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return config.model_copy(update={"secret_file": str(path)})


def _logical_resources(config: DeploymentConfig) -> tuple[float, float, dict[str, float]]:
    """Logical CPUs, GPUs and custom resources that the deployment asks Ray for, all together.

    Ray only counts them: on one machine more actors than cores may run, and do.
    """
    cpus = config.gateway.num_cpus * config.gateway.count + 2
    cpus += config.routers.num_cpus * config.routers.count
    gpus = config.routers.num_gpus * config.routers.count
    resources: dict[str, float] = {}
    for kind in config.groups:
        cpus += kind.num_cpus * kind.count
        gpus += kind.num_gpus * kind.count
        for name, amount in kind.resources.items():
            resources[name] = resources.get(name, 0.0) + amount * kind.count
    return cpus, gpus, resources


@contextlib.contextmanager
def _quiet_serve() -> Iterator[None]:
    """Ray Serve logs a dozen lines a start through its own logger; ours say enough."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _say(line: str) -> None:
    print(line, flush=True)
