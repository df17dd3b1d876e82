"""The Serve config inside the RayService: Ray Serve's own schema, ours, and what pods offer it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from actors.door import HOLD_S
from raymoe.config import DeploymentConfig, GatewayConfig, GroupsConfig, RoutersConfig, parse_config
from raymoe.errors import ConfigError
from tests.k8s.overlays import Doc, of_kind, pods, quantity, workers
from tests.k8s.rules_pods import DRAIN


def serve_config(docs: list[Doc]) -> dict[str, Any]:
    """What the operator hands to Ray Serve."""
    (service,) = of_kind(docs, "RayService")
    loaded: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return loaded


def settings_of(docs: list[Doc]) -> DeploymentConfig:
    """The `args` of its one application; raises `ConfigError`."""
    (application,) = serve_config(docs)["applications"]
    return parse_config(application.get("args", {}), source="args")


def serve_takes_it(docs: list[Doc]) -> Iterator[str]:
    """By Serve's schema; keys it does not know, which it ignores silently; and `args` by ours."""
    config = serve_config(docs)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as e:
        yield from (f"Serve config: {'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        return
    yield from _unknown(ServeDeploySchema, config, "Serve config")
    try:
        settings_of(docs)
    except ConfigError as e:
        yield str(e)
    for application in config["applications"]:
        if application["import_path"] != "serve_app:build":
            yield f"import_path {application['import_path']} is not serve_app:build"
        known = {"Router", "Gateway", "Door"}
        for name in {d["name"] for d in application.get("deployments", [])} - known:
            yield f"the application has no deployment {name!r}"


def _unknown(model: type[BaseModel], data: Mapping[str, Any], path: str) -> Iterator[str]:
    """Keys of `data` that the model has no field for, at any depth."""
    for key, value in data.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{path}: Ray Serve ignores {key!r}"
            continue
        inner = _model_in(field.annotation)
        for child in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(child, dict):
                yield from _unknown(inner, child, f"{path}.{key}")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)


def reachable(docs: list[Doc]) -> Iterator[str]:
    """Ports, paths and files that the config names are those of the pods."""
    config, settings = serve_config(docs), settings_of(docs)
    http = config.get("http_options", {})
    if (http.get("host"), http.get("port")) != ("0.0.0.0", 8000):
        yield "http_options must be 0.0.0.0:8000, where the Service leads"
    if config["applications"][0].get("route_prefix", "/") != "/":
        yield "route_prefix must be /: the probes ask for /health"
    if settings.data_plane.host != "node":
        yield "data_plane.host must be `node`: pods cannot reach each other's 127.0.0.1"
    for pod in pods(docs):
        if not pod.ray:
            continue
        secret = (pod.volume("/etc/raymoe") or {}).get("secret", {})
        files = [f"/etc/raymoe/{item['path']}" for item in secret.get("items", [])]
        for name, file in (
            ("secret_file", settings.secret_file),
            ("admin_token_file", settings.gateway.admin_token_file),
        ):
            if file not in files:
                yield f"{pod.owner}: {name} {file} is not mounted"
        if not settings.model.startswith("/models/") or pod.volume("/models") is None:
            yield f"{pod.owner}: model {settings.model} is not mounted"


def lasts(docs: list[Doc]) -> Iterator[str]:
    """A request that is accepted may use its whole time, whatever ends meanwhile."""
    (service,) = of_kind(docs, "RayService")
    timeout_s = settings_of(docs).gateway.request_timeout_s
    if service["spec"].get("rayClusterDeletionDelaySeconds", 60) <= timeout_s:
        yield "the old cluster of an upgrade goes before its requests have ended"
    overrides = serve_config(docs)["applications"][0].get("deployments", [])
    grace = {d["name"]: d.get("graceful_shutdown_timeout_s", 5) for d in overrides}
    for pod in pods(docs):
        if not pod.ray:
            continue
        if float(pod.env("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S") or 120) <= timeout_s:
            yield f"{pod.owner}: a reload of the proxy cuts long streams"
        if pod.labels["app.kubernetes.io/component"] == "serving":
            probe = pod.main["readinessProbe"]
            if probe.get("periodSeconds", 10) * probe.get("successThreshold", 1) >= HOLD_S:
                yield f"{pod.owner}: a new cluster is RUNNING before it is ready (actors/door.py)"
            drain_s = float(pod.env(DRAIN) or 30)
            if not drain_s / 2 <= grace.get("Gateway", 5) < drain_s:
                yield "Gateway.graceful_shutdown_timeout_s must fill the serving pods' drain"


def placeable(docs: list[Doc]) -> Iterator[str]:
    """Every actor that is asked for has pods to run in, as many as maxReplicas allows."""
    settings = settings_of(docs)
    used = dict.fromkeys(workers(docs), 0.0)
    wanted: list[tuple[str, GroupsConfig | RoutersConfig | GatewayConfig]] = [
        (f"groups of kind {kind.kind}", kind) for kind in settings.groups
    ]
    wanted += [("routers", settings.routers), ("gateways", settings.gateway)]
    for what, one in wanted:
        places = [n for n, group in workers(docs).items() if _fits(group, one)]
        if len(places) != 1:
            yield f"{what}: exactly one worker group must suit them, found {places}"
            continue
        most = one.count
        if isinstance(one, GroupsConfig):
            if one.max_count is None:
                yield f"{what}: could be scaled without max_count beyond what the pool has"
            most = one.max_count or one.count
        used[places[0]] += most * _share(workers(docs)[places[0]], one)
    wanted_labels = settings.routers.label_selector.items()
    serving = workers(docs)["serving"].get("labels", {})
    if not wanted_labels or not wanted_labels <= serving.items():
        yield "controller: goes where routers.label_selector leads, else to any pod"
    for name, share in used.items():
        if share > workers(docs)[name]["maxReplicas"]:
            yield f"{name}: maxReplicas is too small for what may be there ({share:.2f} pods)"
        if share == 0:
            yield f"{name}: nothing is ever placed there"
    for kind in settings.groups:
        for name, group in workers(docs).items():
            image = group["template"]["spec"]["containers"][0]["image"]
            cuda = kind.device != "cpu"
            if _fits(group, kind) and cuda != image.endswith("-cuda"):
                yield f"{name}: image {image} for groups on {kind.device}"
            if _fits(group, kind) and _share(group, kind) != 1:
                yield f"{name}: a pod must be filled by one group"


def _offers(group: Doc) -> dict[str, float]:
    """Ray resources of one pod of the worker group."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    offers = {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits.get("nvidia.com/gpu", 0))}
    return {**offers, **{k: quantity(v) for k, v in group.get("resources", {}).items()}}


def _asks(one: GroupsConfig | RoutersConfig | GatewayConfig) -> dict[str, float]:
    gpus = 0.0 if isinstance(one, GatewayConfig) else one.num_gpus
    asks = {"CPU": one.num_cpus, "GPU": gpus, **one.resources}
    return {name: amount for name, amount in asks.items() if amount > 0}


def _fits(group: Doc, one: GroupsConfig | RoutersConfig | GatewayConfig) -> bool:
    offers, labels = _offers(group), group.get("labels", {})
    return all(labels.get(k) == v for k, v in one.label_selector.items()) and all(
        offers.get(name, 0) >= amount for name, amount in _asks(one).items()
    )


def _share(group: Doc, one: GroupsConfig | RoutersConfig | GatewayConfig) -> float:
    """The part of one pod that one of them takes."""
    offers = _offers(group)
    return max(amount / offers[name] for name, amount in _asks(one).items())


def survives(docs: list[Doc]) -> Iterator[str]:
    """Where the head's state outlives it, everything else is there twice, on pods of their own."""
    (service,) = of_kind(docs, "RayService")
    if "gcsFaultToleranceOptions" not in service["spec"]["rayClusterConfig"]:
        return
    settings = settings_of(docs)
    overrides = serve_config(docs)["applications"][0].get("deployments", [])
    a_node = {d["name"]: d.get("max_replicas_per_node") for d in overrides}
    for name, count in (("Router", settings.routers.count), ("Gateway", settings.gateway.count)):
        if count < 2 or a_node.get(name) != 1:
            yield f"{name}: two are needed, on two pods (max_replicas_per_node: 1)"
    if settings.placement.survive == "none":
        yield "placement.survive: the plan leaves no room for what a lost group held"
    for kind in settings.groups:
        if kind.min_count < 2:
            yield f"groups of kind {kind.kind}: min_count leaves none beside one that is lost"
    protected = [b["spec"]["selector"]["matchLabels"] for b in of_kind(docs, "PodDisruptionBudget")]
    for pod in pods(docs):
        covered = any(wanted.items() <= pod.labels.items() for wanted in protected)
        if pod.ray and pod.labels["app.kubernetes.io/component"] != "head" and not covered:
            yield f"{pod.owner}: no PodDisruptionBudget"


RULES = (serve_takes_it, reachable, lasts, placeable, survives)
