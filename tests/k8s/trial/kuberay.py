"""What KubeRay 1.7 makes of a pod template: the command that starts Ray, and the environment."""

from __future__ import annotations

import json

from tests.k8s.overlays import Doc, quantity

TOKEN = "0123456789abcdef" * 4  # in place of the Secret's auth_token
REDIS_PASSWORD = "fedcba9876543210"  # and of its redis_password


def start_command(group: Doc, address: str | None, redis: Doc) -> str:
    """The container's command; `address` is the head's, None for the head itself; `redis` the
    cluster's gcsFaultToleranceOptions."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    flags = dict(group.get("rayStartParams", {}))
    custom = {}
    for name, amount in group.get("resources", {}).items():
        if name in ("CPU", "GPU"):
            flags[f"num-{name.lower()}s"] = amount
        else:
            custom[name] = float(amount)
    if custom:
        flags["resources"] = f"'{json.dumps(custom)}'"
    if group.get("labels"):
        flags["labels"] = ",".join(f"{k}={v}" for k, v in sorted(group["labels"].items()))
    flags.setdefault("num-cpus", str(int(quantity(limits["cpu"]))))
    flags.setdefault("memory", str(int(quantity(limits["memory"]))))
    flags |= {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
    flags |= {"dashboard-host": "0.0.0.0"} if address is None else {"address": f"{address}:6379"}
    if redis and address is None:
        flags["redis-password"] = "$REDIS_PASSWORD"
    words = [f"--{name}={value}" for name, value in sorted(flags.items())]
    words += ["--block", "--head", "--no-monitor"] if address is None else ["--block"]
    return f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {' '.join(words)}"


def environment(
    group: Doc, cluster: str, pod: str, address: str | None, redis: Doc
) -> dict[str, str]:
    """The manifest's variables and those that KubeRay adds for a RayService."""
    listed = group["template"]["spec"]["containers"][0]["env"]
    found = {variable["name"]: variable["value"] for variable in listed}
    found |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ADDRESS": f"{address or '127.0.0.1'}:6379",
        "RAY_PORT": "6379",
        "RAY_CLUSTER_NAME": cluster,
        "RAY_CLOUD_INSTANCE_ID": pod,
        "RAY_NODE_TYPE_NAME": group.get("groupName", "headgroup"),
        "RAY_timeout_ms_task_wait_for_death_info": "0",
        "RAY_gcs_server_request_timeout_seconds": "5",
        "RAY_SERVE_KV_TIMEOUT_S": "5",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    if address is None:
        found["RAY_enable_autoscaler_v2"] = "true"
    if redis and address is None:
        found["RAY_REDIS_ADDRESS"] = redis["redisAddress"]
        found["RAY_external_storage_namespace"] = cluster  # KubeRay: the cluster's UID
        found["REDIS_PASSWORD"] = REDIS_PASSWORD
    elif redis:
        found["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    return found
