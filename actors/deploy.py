"""Hands a deployment to Ray Serve and waits until it answers, or says why it never will."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from actors.quiet import quiet_serve
from actors.say import base_url, last_sentence, lasting_error, say
from raymoe.config import DeploymentConfig
from raymoe.errors import ConfigError

_POLL_S = 0.2


def deploy(config: DeploymentConfig, build: Callable[..., Any], spec_json: str) -> None:
    """Starts Ray Serve, if it is not there, and gives it the application; does not wait."""
    groups = sum(kind.count for kind in config.groups)
    routers = str(config.routers.count)
    if config.routers.most > config.routers.count:
        routers += f" to {config.routers.most}"
    say(
        f"starting {groups} expert group(s), {routers} router(s), {config.gateway.count} gateway(s)"
    )
    application = build(config, spec_json)
    prefix = config.gateway.route_prefix
    with quiet_serve():
        serve.start(http_options={"host": config.gateway.host, "port": config.gateway.port})
        serve.run_many(
            [serve.RunTarget(application, name=config.name, route_prefix=prefix)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def follow(controller: Any, config: DeploymentConfig, check: Callable[[], None]) -> None:
    """Waits until the deployment can answer; raises the controller's reason when it cannot."""
    deadline = time.monotonic() + config.placement.load_timeout_s
    shown = ""
    while True:
        check()
        progress = _progress(controller, max(1.0, deadline - time.monotonic()))
        if progress["failed"]:
            raise ConfigError(progress["failed"])
        if progress["text"] != shown:
            shown = progress["text"]
            say(shown)
        running = _application_runs(config.name)
        if progress["ready"] and running and _healthy(config):
            return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"not ready after {config.placement.load_timeout_s:.0f} s "
                f"(placement.load_timeout_s); last: {shown}"
            )
        time.sleep(_POLL_S)


def _progress(controller: Any, limit_s: float) -> dict[str, Any]:
    try:
        progress: dict[str, Any] = ray.get(controller.progress.remote(), timeout=limit_s)
    except ray.exceptions.GetTimeoutError as e:
        raise ConfigError("the placement controller did not answer while it started") from e
    return progress


def _application_runs(name: str) -> bool:
    """Whether Serve has it running; raises `ConfigError` when it cannot, as soon as that shows."""
    app = serve.status().applications.get(name)
    if app is None:
        return False
    messages = [d.message for d in app.deployments.values() if d.message]
    lasting = lasting_error(messages)
    if lasting is not None:
        raise ConfigError(f"the deployment cannot start: {lasting}")
    if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise ConfigError(
            f"the Serve application failed to start: {last_sentence([*messages, app.message])}"
        )
    return bool(app.status == "RUNNING")


def _healthy(config: DeploymentConfig) -> bool:
    try:
        with urllib.request.urlopen(base_url(config) + "/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
