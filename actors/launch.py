"""`raymoe serve`: bring a deployment up, watch it, wait for a signal, take it down."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.serve.context import _get_global_client

from actors.controller import ensure_controller, reason
from actors.deploy import deploy, follow
from actors.leftovers import remove_leftovers
from actors.local import LocalRay, check_port_free
from actors.quiet import quiet_errors
from actors.say import announce, say
from actors.spawn import controller_name, names_alive
from actors.take_down import drain, end_actors, leave_cluster, within
from actors.watch import Watch, watch
from raymoe.config import DeploymentConfig, read_secret
from raymoe.errors import ConfigError, RaymoeError
from raymoe.logs import configure

_POLL_S = 0.2
_MORE_GROUPS = 16  # of a kind without max_count that a Ray of our own has room for
_STEP_S = 10.0  # for the step of a start that is under way when it is to stop
_OWN_STEP_S = 1.0
_LEAVE_S = 14.0  # a cluster that does not answer is not waited for longer


class _Stopped(Exception):
    """A signal arrived while the deployment was coming up."""


class _RayGone(RaymoeError):
    """Ray does not answer any more. One argument: the sentence."""


def launch(
    config: DeploymentConfig,
    spec_json: str,
    summary: str,
    build: Callable[..., Any],
    stop: threading.Event,
) -> int:
    """Serves until SIGINT, SIGTERM or `stop`; the exit status. `build` makes the application.

    Raises `ConfigError` (and other `RaymoeError`s) when the deployment cannot come up or cannot
    go on; whatever was started by then is gone.
    """
    if config.ray.address is None:  # in a cluster, Ray Serve may listen there already
        for folder in remove_leftovers(config.ray.temp_dir):
            say(f"removed {folder}: left by a raymoe serve that was killed")
        check_port_free(config.gateway.host, config.gateway.port)
        if config.gateway.grpc_port is not None:
            check_port_free(config.gateway.host, config.gateway.grpc_port)
    if config.logging.folder is not None:  # the console says what an operator needs
        configure(config.logging, "serve", config.name)
    say(f"raymoe: {summary}")
    bringing_up = _BringUp(config, spec_json, build, stop)
    bringing_up.start()
    clean = False
    try:
        while not stop.is_set():
            # Again and again: Ray's core puts its own handler for SIGTERM in place whenever it is
            # initialised, and that one aborts the process.
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda *_: stop.set())
            stop.wait(_POLL_S)
            bringing_up.raise_if_over()
        clean = True
    except _RayGone as e:
        bringing_up.abandon(str(e))
    finally:
        say("stopping")
        bringing_up.take_down(keep_logs=not clean)
    say("stopped")
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
        self._created = False  # a controller of our own, and whatever comes after it
        self._deployed = False
        self._serve_is_ours = False
        self._watch: Watch | None = None
        self._through = threading.Event()
        self._taken_down = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._bring_up(time.monotonic())
        except _Stopped:
            pass
        except (ray.exceptions.RayError, ConnectionError) as e:
            self._error = ConfigError(f"the deployment cannot start: {reason(e)}")
        except Exception as e:
            self._error = e
        finally:
            self._through.set()
            # Ray has its processes die with the thread that started them: stay.
            self._taken_down.wait()

    def raise_if_over(self) -> None:
        """Raises what went wrong, in the start or since then."""
        if self._error is not None:
            raise self._error
        if self._watch is not None:
            if self._watch.failed():
                raise RaymoeError(f"the deployment has failed: {self._watch.failed()}")
            if self._watch.ray_gone(time.monotonic()):
                raise _RayGone("Ray does not answer any more; the deployment is lost")

    def take_down(self, keep_logs: bool) -> None:
        """Ends what was started.

        A Ray of our own that is still coming up is not asked: its processes are ended. In a
        cluster that is not ours the step under way is waited for, so that it can be undone.
        """
        self._stop.set()
        finished = self._through.wait(_STEP_S if self._local is None else _OWN_STEP_S)
        if self._local is not None and not finished:
            self._local.kill()
            say("stopped")
            _leave(0)  # the broken step still runs in its thread, and may wait for long
        if self._watch is not None:
            self._watch.end()
            drain(self._config)
        if self._local is None:
            self._leave_cluster()
        else:
            if self._created and ray.is_initialized():
                within(_LEAVE_S / 2, lambda: end_actors(self._config.name))
            _tell_logs(self._local.stop(keep_logs=keep_logs))
        self._taken_down.set()

    def abandon(self, sentence: str) -> None:
        """The end when Ray is gone: nothing can be asked of it, and its client may hang."""
        if self._local is not None:
            _tell_logs(self._local.kill(keep_logs=True))
        print(f"raymoe: {sentence}", file=sys.stderr, flush=True)
        _leave(2)

    def _bring_up(self, started_s: float) -> None:
        self._start_ray()
        self._check()
        self._created = True
        controller = ensure_controller(self._config, self._spec_json)
        self._check()
        self._deployed = True
        deploy(self._config, self._build, self._spec_json)
        follow(controller, self._config, self._check)
        announce(self._config, time.monotonic() - started_s)
        self._watch = watch(self._config.name)
        self._watch.start()

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _start_ray(self) -> None:
        quiet_errors()
        if self._config.ray.address is None:
            self._local = LocalRay(self._config.ray)
            self._config = _with_secret(self._config, self._local.folder)
            say("starting Ray on this machine")
            self._local.start(*_logical_resources(self._config))
            return
        read_secret(self._config)
        say(f"joining the Ray cluster at {self._config.ray.address}")
        ray.init(address=self._config.ray.address, log_to_driver=False, logging_level="ERROR")
        check_name_free(self._config, names_alive())
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is not None:
            check_serve(self._config, client.http_config, _prefixes(client.get_serve_details()))
        self._serve_is_ours = client is None

    def _leave_cluster(self) -> None:
        def leave() -> None:
            if self._created:
                leave_cluster(
                    self._config, deployed=self._deployed, serve_is_ours=self._serve_is_ours
                )
            ray.shutdown()

        if ray.is_initialized() and not within(_LEAVE_S, leave):
            say(f"the cluster did not answer: look for raymoe:{self._config.name}: actors there")


def check_name_free(config: DeploymentConfig, names: set[str]) -> None:
    """Raises `ConfigError` when a deployment of this name is among the actors that run."""
    if controller_name(config.name) in names:
        raise ConfigError(
            f"deployment {config.name!r} runs already in this cluster; stop it, or choose another "
            "name with --name"
        )


def check_serve(config: DeploymentConfig, running: Any, prefixes: dict[str, str | None]) -> None:
    """Raises `ConfigError` when the Ray Serve that runs in the cluster cannot take this one in.

    It keeps its own address (`running.host`, `running.port`) whatever it is asked for;
    `prefixes` are the route prefixes of its applications by name.
    """
    wanted = (config.gateway.host, config.gateway.port)
    if (running.host, running.port) != wanted:
        raise ConfigError(
            f"Ray Serve of this cluster listens on {running.host}:{running.port} already, not on "
            f"{wanted[0]}:{wanted[1]}: use --host {running.host} --port {running.port}"
        )
    if config.name in prefixes:
        raise ConfigError(
            f"this cluster has a Serve application {config.name!r} already; choose another name "
            "with --name"
        )
    for name, prefix in prefixes.items():
        if prefix == config.gateway.route_prefix:
            raise ConfigError(
                f"Serve application {name!r} of this cluster has the route prefix {prefix!r}: "
                f"choose another one in gateway.route_prefix, e.g. /{config.name}"
            )


def _prefixes(details: dict[str, Any]) -> dict[str, str | None]:
    return {name: app["route_prefix"] for name, app in details["applications"].items()}


def _tell_logs(folder: Path | None) -> None:
    if folder is not None:
        say(f"Ray's logs are kept in {folder}")


def _leave(status: int) -> None:
    sys.stdout.flush()
    os._exit(status)


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

    Ray only counts them: on one machine more actors than cores may run, and do. CPUs are there for
    as many groups and routers as scaling may come to; GPUs are real, and not made up.
    """
    cpus = config.gateway.num_cpus * config.gateway.count + 2
    cpus += config.routers.num_cpus * config.routers.most
    gpus = config.routers.num_gpus * config.routers.count
    resources: dict[str, float] = {}
    for kind in config.groups:
        cpus += kind.num_cpus * (kind.max_count or kind.count + _MORE_GROUPS)
        gpus += kind.num_gpus * kind.count
    asked = [(k.resources, k.max_count or k.count + _MORE_GROUPS) for k in config.groups]
    asked.append((config.routers.resources, config.routers.most))
    asked.append((config.gateway.resources, config.gateway.count))
    for amounts, count in asked:
        for name, amount in amounts.items():
            resources[name] = resources.get(name, 0.0) + amount * count
    return cpus, gpus, resources
