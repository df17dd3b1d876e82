"""Pods of the overlay `local` on this machine, under requests that must not fail. As root:

    sudo .venv/bin/python -m tests.k8s.trial upgrade     # a second cluster, the Service moved
    sudo .venv/bin/python -m tests.k8s.trial head        # the head lost, its state in Redis

The pods live in namespaces of their own. What KubeRay's operator does is done here: the Serve
config goes to the dashboard with Ray's token; once Serve calls the second application RUNNING the
Service leads there; later the first cluster's pods get SIGTERM. `head` needs a `redis-server`.
Takes some five minutes on two cores; 10.79.0.0/24 must be free.
"""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import time

from tests.k8s.overlays import build, cluster_of, of_kind
from tests.k8s.trial.clients import Load, Service
from tests.k8s.trial.cluster import Cluster, check_pods, say, wait_until
from tests.k8s.trial.kuberay import REDIS_PASSWORD
from tests.k8s.trial.pod import BRIDGE, NETWORK, Pod, run

_BESIDE_S = 15.0  # both clusters run: what is open on the old one ends there
_WITHOUT_HEAD_S = 20.0


def upgrade(pods: list[Pod]) -> None:
    """A changed serve.yaml: a second cluster, the Service moved to it, the first one deleted."""
    docs = build("local")
    changed = copy.deepcopy(docs)
    (service,) = of_kind(changed, "RayService")
    before = service["spec"]["serveConfigV2"]
    service["spec"]["serveConfigV2"] = before.replace("routers: {", "routers: {max_batch: 32, ")
    assert service["spec"]["serveConfigV2"] != before
    old = Cluster("old", docs, 10, pods)
    old.serve()
    check_pods(old)
    say("the first cluster serves; its pods are as the manifest says")
    way = Service(old.pods)
    with Load(way.port) as load:
        time.sleep(5)
        new = Cluster("new", changed, 40, pods)
        new.serve()
        way.pods = new.pods
        say("the Service leads to the new cluster")
        time.sleep(_BESIDE_S)
        old.delete()
        time.sleep(3)
    _judge(load, way)


def head(pods: list[Pod]) -> None:
    """The head pod lost and made anew, with the Redis options of the overlay `ha`."""
    docs = build("local")
    options = cluster_of(build("ha"))["gcsFaultToleranceOptions"]
    address = f"redis://{NETWORK}.1:6379"
    cluster_of(docs)["gcsFaultToleranceOptions"] = {**options, "redisAddress": address}
    settings = f"bind {NETWORK}.1\nport 6379\nrequirepass {REDIS_PASSWORD}\nsave ''\n"
    redis = subprocess.Popen(["redis-server", "-"], stdin=subprocess.PIPE, stdout=sys.stderr)
    assert redis.stdin is not None
    redis.stdin.write(settings.encode())
    redis.stdin.close()
    try:
        cluster = Cluster("only", docs, 10, pods)
        cluster.serve()
        check_pods(cluster)
        way = Service(cluster.pods)
        with Load(way.port) as load:
            time.sleep(5)
            cluster.lose_head()
            say(f"the head is lost; {load.told()}")
            time.sleep(_WITHOUT_HEAD_S)
            say(f"still without a head; {load.told()}")
            cluster.add_head()
            say("a new head is ready")
            cluster.await_running()  # by what Redis holds: nobody hands the Serve config over again
            wait_until(lambda: all(pod.ready for pod in cluster.pods), 60, "all pods are ready")
            assert all(pod.status is None for pod in cluster.pods), "a pod ended with the head"
            time.sleep(5)
        _judge(load, way)
    finally:
        redis.terminate()


def _judge(load: Load, way: Service) -> None:
    say(f"{load.told()}; connections refused: {way.refused}")
    assert not load.failures and not way.refused, load.failures[:5]


def main(wanted: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    pods: list[Pod] = []
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        {"upgrade": upgrade, "head": head}[wanted](pods)
    except BaseException:
        for pod in pods:
            print(pod.told())
        raise
    finally:
        for pod in pods:
            pod.remove()
        run("ip", "link", "delete", BRIDGE, check=False)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["upgrade"])
