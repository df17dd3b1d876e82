"""Composition root: typed settings -> Ray Serve application (gateway and routers).

A Serve config names `import_path: serve_app:build`, with the fields of
`raymoe.config.DeploymentConfig` as `args`; `raymoe serve` calls `application`.
"""

# No `from __future__ import annotations` here: Ray Serve looks at the annotation of `build`'s
# argument itself, and would hand over an unchecked dict if it were a string.

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from actors.door import Door
from actors.gateway import gateway_app
from actors.router import Router
from actors.router_scaling import serve_options
from raymoe.config import DeploymentConfig, GatewayConfig, RoutersConfig

_LEAVE_S = 5.0  # for a router to be gone after its drain
_DOOR_CPUS = 0.01  # it waits, then sleeps; with none at all it could be put on a node of experts


@serve.ingress()
class Gateway:
    """The OpenAI endpoint as a Serve ingress replica: the app is built where it runs."""

    def __init__(
        self, config: dict[str, Any], spec_json: str, routers: Any, door: Any = None
    ) -> None:
        # Handles of what belongs to the application; tokens do not travel through them.
        self._config, self._spec_json = config, spec_json

    def __serve_build_asgi_app__(self) -> FastAPI:
        return gateway_app(self._config, self._spec_json)


def build(args: DeploymentConfig) -> Application:
    """The application of a Serve config: Ray Serve allows a builder this one argument.

    It is RUNNING for Serve once the endpoint answers at every proxy, see `actors.door`.

    Raises `CheckpointError` when the checkpoint cannot be served, `PlacementError` when the groups
    are too small for it.
    """
    from raymoe.budget import check_budgets
    from raymoe.checkpoint.reader import read_spec

    spec = read_spec(args.model, compute_dtype=args.experts_dtype)
    check_budgets(args, spec)
    door = serve.deployment(
        Door,
        name="Door",
        ray_actor_options=_where(
            GatewayConfig(num_cpus=_DOOR_CPUS, label_selector=args.gateway.label_selector)
        ),
        graceful_shutdown_timeout_s=1,
    ).bind(args.placement.load_timeout_s)
    return application(args, spec.to_json(), door)


def application(
    settings: DeploymentConfig, spec_json: str, door: Application | None = None
) -> Application:
    """The application of one deployment; `spec_json` is the `ModelSpec` of its checkpoint.

    With a `door`, the application is not RUNNING before that is.
    """
    config = settings.model_dump(mode="json")
    routers, gateway = settings.routers, settings.gateway
    router = serve.deployment(
        Router,
        name="Router",
        ray_actor_options={**_where(routers), "num_gpus": routers.num_gpus},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,  # Serve sees no requests there: nothing to wait for
        graceful_shutdown_timeout_s=routers.drain_s + _LEAVE_S,
        **serve_options(routers),
    ).bind(config, spec_json)
    return serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=gateway.count,
        max_ongoing_requests=gateway.max_in_flight + 64,  # ours answers 429 before Serve does
        ray_actor_options=_where(gateway),
        graceful_shutdown_timeout_s=5,
    ).bind(config, spec_json, router, *([] if door is None else [door]))


def _where(wanted: RoutersConfig | GatewayConfig) -> dict[str, Any]:
    """What a replica asks Ray for, and on which nodes it may run."""
    options: dict[str, Any] = {"num_cpus": wanted.num_cpus, "resources": wanted.resources}
    if wanted.label_selector:
        options["label_selector"] = wanted.label_selector
    return options
