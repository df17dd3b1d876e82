"""Mistakes to plant into the built objects of the overlay `ha`, and what must be said of each."""

from __future__ import annotations

from collections.abc import Callable

from tests.k8s.overlays import Doc, cluster_of, of_kind, workers
from tests.k8s.rules_pods import DRAIN

Mistake = Callable[[list[Doc]], object]


def service(docs: list[Doc]) -> Doc:
    (found,) = of_kind(docs, "RayService")
    spec: Doc = found["spec"]
    return spec


def template(docs: list[Doc], group: str) -> Doc:
    spec: Doc = workers(docs)[group]["template"]["spec"]
    return spec


def main(docs: list[Doc], group: str = "experts") -> Doc:
    container: Doc = template(docs, group)["containers"][0]
    return container


def head(docs: list[Doc]) -> Doc:
    spec: Doc = cluster_of(docs)["headGroupSpec"]["template"]["spec"]
    return spec


def named(docs: list[Doc], kind: str, name: str) -> Doc:
    (found,) = [doc for doc in of_kind(docs, kind) if doc["metadata"]["name"] == name]
    return found


def spread(docs: list[Doc], group: str) -> list[Doc]:
    found: list[Doc] = template(docs, group)["topologySpreadConstraints"]
    return found


def variable(docs: list[Doc], name: str, group: str = "experts") -> Doc:
    (found,) = [v for v in main(docs, group)["env"] if v["name"] == name]
    entry: Doc = found
    return entry


def in_config(before: str, after: str) -> Mistake:
    """Changes the Serve config, in both places where it stands."""

    def plant(docs: list[Doc]) -> None:
        spec = service(docs)
        assert before in spec["serveConfigV2"]
        spec["serveConfigV2"] = spec["serveConfigV2"].replace(before, after)
        for doc in of_kind(docs, "ConfigMap"):
            if doc["metadata"]["name"].startswith("serve-config"):
                doc["data"]["serveConfigV2"] = spec["serveConfigV2"]

    return plant


STRUCTURE: list[tuple[Mistake, str]] = [
    (lambda d: service(d).update(serveConfig="x"), "serveConfig"),
    (lambda d: service(d).update(rayClusterDeletionDelaySeconds="660"), "rayClusterDeletionDelay"),
    (lambda d: cluster_of(d).update(enableInTreeAutoscaler=True), "enableInTreeAutoscaler"),
    (lambda d: cluster_of(d).update(rayVersion=2.6), "rayVersion"),
    (lambda d: cluster_of(d)["autoscalerOptions"].update(version="v3"), "v3"),
    (lambda d: cluster_of(d)["autoscalerOptions"]["securityContext"].update(root=1), "root"),
    (lambda d: workers(d)["experts"].update(maxReplica=3), "maxReplica"),
    (lambda d: workers(d)["experts"]["resources"].update(CPU=0), "CPU"),
    (lambda d: workers(d)["experts"].pop("template"), "template"),
    (lambda d: template(d, "experts").update(toleration=[]), "toleration"),
    (lambda d: main(d).update(image=3), "image"),
    (lambda d: main(d)["env"].append({"name": "X", "vlaue": "1"}), "vlaue"),
    (lambda d: main(d)["readinessProbe"].update(periodSecond=5), "periodSecond"),
    (lambda d: service(d)["serveService"]["spec"]["ports"][0].update(tragetPort=1), "tragetPort"),
    (lambda d: named(d, "NetworkPolicy", "raymoe-dns")["spec"].update(egres=[]), "egres"),
    (lambda d: named(d, "PodDisruptionBudget", "raymoe-serving")["spec"].update(min=1), "min"),
    (lambda d: named(d, "PodMonitor", "raymoe")["spec"].update(podMetricEndpoints=[]), "podMetric"),
    (lambda d: named(d, "StatefulSet", "raymoe-redis").update(apiVersion="apps/v2"), "apps/v2"),
]
PODS: list[tuple[Mistake, str]] = [
    (lambda d: template(d, "experts").update(hostNetwork=True), "hostNetwork"),
    (lambda d: template(d, "experts")["securityContext"].pop("runAsNonRoot"), "root"),
    (lambda d: template(d, "serving")["securityContext"].pop("seccompProfile"), "seccomp"),
    (lambda d: main(d)["securityContext"].update(privileged=True), "privileges"),
    (lambda d: main(d)["securityContext"]["capabilities"].update(add=["IPC_LOCK"]), "capabilities"),
    (lambda d: main(d)["securityContext"].pop("readOnlyRootFilesystem"), "root file system"),
    (lambda d: cluster_of(d)["autoscalerOptions"].pop("securityContext"), "autoscaler"),
    (lambda d: main(d).pop("resources"), "requests and limits"),
    (lambda d: main(d)["resources"]["requests"].update(memory="1Gi"), "differ"),
    (lambda d: main(d).update(image="raymoe"), "no version"),
    (lambda d: template(d, "serving").pop("automountServiceAccountToken"), "API token"),
    (
        lambda d: main(d).update(lifecycle={"preStop": {"exec": {"command": ["ray", "stop"]}}}),
        "preStop",
    ),
    (lambda d: template(d, "serving").update(terminationGracePeriodSeconds=300), "middle of its"),
    (lambda d: variable(d, DRAIN, "serving").update(value="60"), "longest"),
    (lambda d: main(d).pop("readinessProbe"), "readinessProbe"),
    (lambda d: main(d)["readinessProbe"]["httpGet"].update(port=8000), "Ray's own health"),
    (lambda d: main(d, "serving")["readinessProbe"]["httpGet"].update(path="/"), "/health"),
    (lambda d: template(d, "experts")["volumes"].pop(1), "/dev/shm"),
    (
        lambda d: workers(d)["experts"]["rayStartParams"].update(
            {"object-store-memory": "1073741824"}
        ),
        "object-store-memory",
    ),
    (lambda d: main(d)["volumeMounts"].pop(0), "/tmp"),
    (lambda d: main(d)["env"].append({"name": "HF_TOKEN", "value": "hf_abc"}), "HF_TOKEN"),
    (lambda d: main(d)["env"].append({"name": "RAY_ADDRESS", "value": "x"}), "KubeRay's"),
    (lambda d: main(d).update(args=["--token=abcd1234"]), "secret in the arguments"),
    (
        lambda d: head(d)["containers"][0]["volumeMounts"].append(
            {"name": "api-token", "mountPath": "/token"}
        ),
        "token of the Kubernetes API",
    ),
]
CLUSTER: list[tuple[Mistake, str]] = [
    (lambda d: main(d).update(image="raymoe:0.0.9-cuda"), "0.0.9-cuda"),
    (lambda d: cluster_of(d).update(rayVersion="2.9.0"), "pyproject"),
    (lambda d: cluster_of(d).update(rayVersion="2.61.0"), "Dockerfile"),
    (lambda d: workers(d)["experts"].update(groupName="Experts"), "DNS"),
    (lambda d: workers(d)["experts"].update(groupName="serving"), "same name"),
    (lambda d: workers(d)["experts"]["rayStartParams"].update(labels="a=b"), "labels"),
    (lambda d: workers(d)["experts"]["rayStartParams"].update({"num-cpus": "1"}), "both in"),
    (lambda d: template(d, "experts").update(restartPolicy="Always"), "restartPolicy"),
    (
        lambda d: workers(d)["experts"]["rayStartParams"].update({"object-store-mem": "1"}),
        "no option --object-store-mem",
    ),
    (lambda d: variable(d, "RAY_worker_niceness").update(name="RAY_nice"), "no variable RAY_nice"),
    (
        lambda d: main(d)["env"].append({"name": "RAY_SERVE_ENABLE_HA_PROXI", "value": "1"}),
        "no variable RAY_SERVE_ENABLE_HA_PROXI",
    ),
    (lambda d: workers(d)["experts"].update(minReplicas=9), "minReplicas"),
    (lambda d: cluster_of(d)["authOptions"].update(mode="disabled"), "authentication"),
    (lambda d: cluster_of(d).update(enableInTreeAutoscaling=False), "autoscaler"),
    (lambda d: cluster_of(d)["headGroupSpec"]["resources"].update(CPU="4"), "head offers"),
    (lambda d: workers(d)["experts"]["resources"].update(CPU="2"), "must offer no CPU"),
    (lambda d: service(d)["upgradeStrategy"].update(type="None"), "new cluster"),
    (lambda d: service(d).update(excludeHeadPodFromServeSvc=False), "leave the head out"),
    (lambda d: service(d)["serveService"]["spec"]["ports"][0].update(targetPort=8000), "by name"),
    (lambda d: main(d)["ports"].append({"name": "serve", "containerPort": 8000}), "named serve"),
    (
        lambda d: cluster_of(d)["headGroupSpec"]["template"]["metadata"].pop("annotations"),
        "no change of the cluster",
    ),
    (
        lambda d: cluster_of(d)["gcsFaultToleranceOptions"].update(redisAddress="redis://x:6379"),
        "no Service x",
    ),
    (
        lambda d: cluster_of(d)["gcsFaultToleranceOptions"].update(redisPassword={"value": "x"}),
        "password of Redis",
    ),
]
SERVE: list[tuple[Mistake, str]] = [
    (in_config("import_path", "import_pth"), "import_path"),
    (in_config("serve_app:build", "serve_app:application"), "serve_app:application"),
    (in_config("max_replicas_per_node", "max_replica_per_node"), "max_replica_per_node"),
    (in_config("proxy_location", "proxy_locations"), "ignores 'proxy_locations'"),
    (in_config("host: 0.0.0.0", "hots: 0.0.0.0"), "ignores 'hots'"),
    (in_config("port: 8000", "port: eight"), "port"),
    (in_config("- name: Router", "- name: Routers"), "no deployment 'Routers'"),
    (in_config("kv_bytes", "kv_byte"), "kv_byte"),
    (in_config("load_timeout_s: 1800", "load_timeout_s: -1"), "load_timeout_s"),
    (in_config("survive: group", "survive: all"), "survive"),
    (in_config("port: 8000", "port: 8001"), "0.0.0.0:8000"),
    (in_config("route_prefix: /", "route_prefix: /v2"), "route_prefix"),
    (in_config("host: node", "host: 127.0.0.1"), "data_plane.host"),
    (in_config("/etc/raymoe/deployment_secret", "/etc/secret"), "/etc/secret"),
    (
        in_config("        admin_token_file: /etc/raymoe/admin_token", "       "),
        "admin_token_file None",
    ),
    (in_config("max_count: 4", "max_count: 6"), "maxReplicas"),
    (in_config("          max_count: 4", "         "), "without max_count"),
    (in_config("/models/model", "Qwen/Qwen3-30B-A3B"), "not mounted"),
    (in_config("graceful_shutdown_timeout_s: 270", "health_check_period_s: 5"), "must fill"),
    (lambda d: service(d).update(rayClusterDeletionDelaySeconds=60), "old cluster"),
    (lambda d: main(d, "serving")["readinessProbe"].update(periodSeconds=10), "before it is ready"),
    (
        lambda d: variable(d, "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S").update(value="120"),
        "long streams",
    ),
    (in_config("raymoe-pool: experts", "raymoe-pool: export"), "groups of kind gpu"),
    (in_config("num_gpus: 1", "num_gpus: 2"), "groups of kind gpu"),
    (in_config("min_count: 3", "min_count: 5"), "min_count"),
    (in_config("num_cpus: 3", "num_cpus: 5"), "routers"),
    (
        lambda d: (
            in_config("expert_slot: 1", "expert_slot: 0.5")(d),
            in_config("num_gpus: 1", "num_gpus: 0.5")(d),
        ),
        "filled by one group",
    ),
    (in_config("device: cuda", "device: cpu"), "groups on cpu"),
    (lambda d: workers(d)["experts"]["labels"].update({"raymoe-pool": "x"}), "nothing is ever"),
    (
        in_config("count: 2\n        num_cpus", "count: 1\n        num_cpus"),
        "Router: two are needed",
    ),
    (
        in_config("Gateway\n        max_replicas_per_node: 1", "Gateway"),
        "Gateway: two are needed, on two pods",
    ),
    (in_config("survive: group", "survive: none"), "leaves no room"),
    (
        in_config(
            "kv_bytes: 6000000000\n        label_selector: {raymoe-pool: serving}", "kv_bytes: 1"
        ),
        "controller: goes",
    ),
    (in_config("min_count: 3", "min_count: 1"), "none beside one"),
    (
        lambda d: d.remove(named(d, "PodDisruptionBudget", "raymoe-experts")),
        "pods of experts: no PodDisruptionBudget",
    ),
]
OBJECTS: list[tuple[Mistake, str]] = [
    (
        lambda d: spread(d, "experts")[0]["labelSelector"]["matchLabels"].update(a="b"),
        "does not count them",
    ),
    (lambda d: spread(d, "serving")[0].pop("matchLabelKeys"), "with the old cluster"),
    (lambda d: spread(d, "serving")[0].pop("minDomains"), "on one node"),
    (lambda d: template(d, "experts").pop("topologySpreadConstraints"), "may share one node"),
    (lambda d: spread(d, "serving").pop(0), "share one node"),
    (
        lambda d: spread(d, "serving")[0].update(whenUnsatisfiable="ScheduleAnyway", minDomains=2),
        "minDomains|all gateways",
    ),
    (
        lambda d: named(d, "PodMonitor", "raymoe")["spec"]["selector"]["matchLabels"].update(a="b"),
        "PodMonitor raymoe: selects no pod",
    ),
    (
        lambda d: named(d, "PodMonitor", "raymoe-ray")["spec"]["podMetricsEndpoints"][0].update(
            port="serve"
        ),
        "have no port serve",
    ),
    (
        lambda d: named(d, "NetworkPolicy", "raymoe-redis")["spec"].update(
            podSelector={"matchLabels": {"app": "redis"}}
        ),
        "raymoe-redis: selects no pod",
    ),
    (
        lambda d: named(d, "NetworkPolicy", "raymoe-redis")["spec"]["ingress"][0]["from"][0].update(
            podSelector={"matchLabels": {"app": "head"}}
        ),
        "from selects no pod",
    ),
    (
        lambda d: named(d, "NetworkPolicy", "raymoe-dns")["spec"].update(policyTypes=["Ingress"]),
        "without that policy type",
    ),
    (
        lambda d: named(d, "NetworkPolicy", "raymoe-redis")["spec"]["ingress"][0].pop("from"),
        "open to everybody",
    ),
    (
        lambda d: named(d, "NetworkPolicy", "raymoe-endpoint")["spec"]["ingress"][0].pop("ports"),
        "o",
    ),
    (
        lambda d: named(d, "PodDisruptionBudget", "raymoe-serving")["spec"].update(
            maxUnavailable=1
        ),
        "only a number in minAvailable",
    ),
    (
        lambda d: named(d, "PodDisruptionBudget", "raymoe-experts")["spec"].update(minAvailable=3),
        "no eviction at all",
    ),
    (
        lambda d: named(d, "ServiceAccount", "raymoe-head").pop("automountServiceAccountToken"),
        "mou",
    ),
    (lambda d: d.remove(named(d, "ServiceAccount", "raymoe-worker")), "no ServiceAccount"),
    (lambda d: cluster_of(d)["authOptions"].update(secretName="other"), "README.md"),
    (
        lambda d: d.append(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "s", "namespace": "raymoe"},
                "stringData": {"auth_token": "abc"},
            }
        ),
        "do not belong into manifests",
    ),
    (
        lambda d: d.append(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRole",
                "metadata": {"name": "all", "namespace": "raymoe"},
                "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}],
            }
        ),
        "needs rights",
    ),
    (lambda d: named(d, "Service", "raymoe-redis")["metadata"].update(namespace="x"), "another"),
    (
        lambda d: [
            d.remove(named(d, "NetworkPolicy", f"raymoe-{name}")) for name in ("closed", "inside")
        ],
        "no policy denies",
    ),
    (
        lambda d: named(d, "NetworkPolicy", "raymoe-inside")["spec"]["podSelector"][
            "matchLabels"
        ].update({"app.kubernetes.io/component": "head"}),
        "talk to each other",
    ),
]

MISTAKES = [*STRUCTURE, *PODS, *CLUSTER, *SERVE, *OBJECTS]
