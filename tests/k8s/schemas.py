"""Structure: every object against a closed schema, so that an unknown field is refused.

Kubernetes' own kinds, pod templates inside the RayService included, go by the published API schemas
(PyPI `kubernetes-validate`). Of RayService and PodMonitor the fields that these manifests use are
written down here, from the reference of KubeRay 1.7 and of the Prometheus operator: a new field in
a manifest is to be added here too. Where the operator's own CRDs are at hand, `crd.py` uses them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate

from tests.k8s.overlays import Doc

KUBERNETES = "1.33"  # the oldest version that README.md promises
Schema = dict[str, Any]


def _closed(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Schema = {"type": "string"}
YES_NO: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
KUBERNETES_OWN: Schema = {"type": "object"}  # checked by the API's schemas, see `_parts`

_AUTOSCALER = _closed(
    version=_one_of("v1", "v2"),
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=KUBERNETES_OWN,
    securityContext=KUBERNETES_OWN,
    env=_list(KUBERNETES_OWN),
    volumeMounts=_list(KUBERNETES_OWN),
)
_HEAD = _closed(
    "template",
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    serviceType=TEXT,
    template=KUBERNETES_OWN,
)
_WORKERS = _closed(
    "groupName",
    "template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    labels=TEXTS,
    resources=TEXTS,
    rayStartParams=TEXTS,
    template=KUBERNETES_OWN,
)
_REDIS = _closed(
    backend=_one_of("redis", "rocksdb"),
    redisAddress=TEXT,
    redisUsername=KUBERNETES_OWN,
    redisPassword=KUBERNETES_OWN,
    externalStorageNamespace=TEXT,
)
_CLUSTER = _closed(
    "headGroupSpec",
    "workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=_closed("mode", mode=_one_of("token", "disabled"), secretName=TEXT),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=_AUTOSCALER,
    gcsFaultToleranceOptions=_REDIS,
    headServiceAnnotations=TEXTS,
    headGroupSpec=_HEAD,
    workerGroupSpecs=_list(_WORKERS),
)
_UPGRADE_STEPS = _closed(
    "gatewayClassName",
    "intervalSeconds",
    "stepSizePercent",
    gatewayClassName=TEXT,
    intervalSeconds=COUNT,
    stepSizePercent=COUNT,
    maxSurgePercent=COUNT,
)
_SERVICE = _closed(
    "rayClusterConfig",
    "serveConfigV2",
    serveConfigV2=TEXT,
    rayClusterConfig=_CLUSTER,
    serveService=KUBERNETES_OWN,
    excludeHeadPodFromServeSvc=YES_NO,
    rayClusterDeletionDelaySeconds=COUNT,
    serviceUnhealthySecondThreshold=COUNT,
    deploymentUnhealthySecondThreshold=COUNT,
    suspend=YES_NO,
    upgradeStrategy=_closed(
        "type",
        type=_one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
        clusterUpgradeOptions=_UPGRADE_STEPS,
    ),
)
_METADATA = _closed("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
_DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
_MONITOR = _closed(
    "selector",
    "podMetricsEndpoints",
    selector=_closed(matchLabels=TEXTS),
    podTargetLabels=_list(TEXT),
    podMetricsEndpoints=_list(
        _closed("port", port=TEXT, path=TEXT, interval=_DURATION, scrapeTimeout=_DURATION)
    ),
)
CUSTOM: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayService"): _SERVICE,
    ("monitoring.coreos.com/v1", "PodMonitor"): _MONITOR,
}


def custom_schema(version: str, kind: str) -> Schema:
    """The whole object's schema."""
    return _closed(
        "metadata",
        "spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=_METADATA,
        spec=CUSTOM[version, kind],
    )


def problems_of_structure(doc: Doc) -> Iterator[str]:
    """Every field that is unknown, missing or of the wrong type, with its path."""
    version, kind = doc.get("apiVersion", ""), doc.get("kind", "")
    where = f"{kind} {doc.get('metadata', {}).get('name')}"
    if (version, kind) not in CUSTOM:
        yield from _by_kubernetes(where, doc)
        return
    checker = jsonschema.Draft202012Validator(custom_schema(version, kind))
    errors = list(checker.iter_errors(doc))
    yield from (f"{where}: {error.json_path}: {error.message}" for error in errors)
    if kind == "RayService" and not errors:
        for part, wrapped in _parts(doc["spec"]):
            yield from _by_kubernetes(f"{where}: {part}", wrapped)


def _by_kubernetes(where: str, doc: Doc) -> Iterator[str]:
    problem = _kubernetes_problem(json.dumps(doc))
    if problem:
        yield f"{where}: {problem}"


@cache  # overlays share most of their objects
def _kubernetes_problem(text: str) -> str:
    doc = json.loads(text)
    try:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as e:
        return f"{'.'.join(str(step) for step in e.path)}: {e.message}"
    except kubernetes_validate.SchemaNotFoundError:
        return f"Kubernetes {KUBERNETES} has no {doc['kind']} of {doc['apiVersion']}"
    return ""


def _parts(spec: Doc) -> Iterator[tuple[str, Doc]]:
    """Kubernetes' own types inside a RayService, each put into an object that has a schema."""
    cluster = spec["rayClusterConfig"]
    yield "headGroupSpec", _template(cluster["headGroupSpec"]["template"])
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], _template(group["template"])
    if "serveService" in spec:
        yield "serveService", {"apiVersion": "v1", "kind": "Service", **spec["serveService"]}
    options = cluster.get("autoscalerOptions", {})
    own = ("resources", "securityContext", "env", "volumeMounts")
    container = {"name": "autoscaler", **{k: options[k] for k in own if k in options}}
    password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    variable = {"name": "REDIS_PASSWORD", **password}
    container["env"] = [*container.get("env", []), variable]
    yield "autoscalerOptions", _template({"spec": {"containers": [container]}})


def _template(template: Doc) -> Doc:
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
