"""The end of a deployment: open requests first, then Serve, then the groups, then Ray."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import ray
from ray import serve

from actors.quiet import quiet_serve
from actors.say import base_url
from actors.spawn import controller_name, deployment_prefix, find, names_alive
from raymoe.config import DeploymentConfig

_APP_GONE_S = 6.0
_GROUPS_CLOSED_S = 3.0
_POLL_S = 0.1
_IN_FLIGHT = "raymoe_gateway_requests_in_flight "


def drain(config: DeploymentConfig, in_flight: Callable[[], int | None] | None = None) -> None:
    """Waits until no request is open, `gateway.drain_s` at most; not at all without an answer."""
    ask = in_flight or (lambda: requests_in_flight(config))
    deadline = time.monotonic() + config.gateway.drain_s
    while time.monotonic() < deadline:
        if not ask():
            return
        time.sleep(_POLL_S)


def requests_in_flight(config: DeploymentConfig) -> int | None:
    """Requests open at the gateways, as far as they can be seen; None when nobody answers.

    What an answer says of other gateways is up to 2 s old: with several, the proxy is asked twice
    as often.
    """
    open_requests = 0
    for _ in range(1 if config.gateway.count == 1 else 2 * config.gateway.count):
        try:
            with urllib.request.urlopen(base_url(config) + "/metrics", timeout=0.5) as answer:
                lines = answer.read().decode().splitlines()
        except (urllib.error.URLError, OSError):
            return None
        values = [line.removeprefix(_IN_FLIGHT) for line in lines if line.startswith(_IN_FLIGHT)]
        open_requests += sum(int(float(value)) for value in values)
    return open_requests


def leave_cluster(config: DeploymentConfig, *, deployed: bool, serve_is_ours: bool) -> None:
    """Ends one deployment in a cluster that stays, and Serve if we started it and it is unused."""
    if deployed:
        # First of all: a router replica would bring the controller back.
        with contextlib.suppress(Exception), quiet_serve():
            serve.delete(config.name, _blocking=False)
            _await_app_gone(config.name)
    end_actors(config.name)
    if serve_is_ours:
        with contextlib.suppress(Exception), quiet_serve():
            if not serve.status().applications:
                serve.shutdown()
    ray.shutdown()


def end_actors(deployment: str) -> None:
    """Ends the controller and every group of the deployment, whatever state they are in."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):
        controller = find(controller_name(deployment))
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(controller.stop.remote(), timeout=_GROUPS_CLOSED_S)
        ray.kill(controller, no_restart=True)
    with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
        for name in names_alive():
            if name.startswith(deployment_prefix(deployment)):
                with contextlib.suppress(ValueError, ray.exceptions.RayError):
                    ray.kill(find(name), no_restart=True)


def within(limit_s: float, work: Callable[[], None]) -> bool:
    """Whether `work` came to its end in time. It runs on in its thread when it did not."""
    thread = threading.Thread(target=work, name="take-down", daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


def _await_app_gone(name: str) -> None:
    deadline = time.monotonic() + _APP_GONE_S
    while name in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_S)
