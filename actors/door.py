"""A part of the Serve application that is healthy once the endpoint answers, through every proxy.

KubeRay leads clients to a new Ray cluster as soon as Serve calls the application RUNNING. By then
the proxies may not know the gateways yet, and no pod has passed a readiness probe: for some seconds
clients would be refused. With the door in the application, RUNNING comes after both.
"""

from __future__ import annotations

import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from ray import serve
from ray.serve.context import _get_global_client

HOLD_S = 7.0  # more than the period of a readiness probe (k8s/base/rayservice.yaml)
_POLL_S = 0.5
_ASK_S = 5.0
_WAITED_FOR = ("STARTING", "HEALTHY")  # a proxy that drains or is broken takes no requests
log = logging.getLogger("raymoe.door")


class Door:
    """A replica that is made when all proxies have led to a gateway for `HOLD_S`."""

    def __init__(self, limit_s: float) -> None:
        app = serve.get_replica_context().app_name
        if not await_open(lambda: health_urls(app), answers, limit_s=limit_s):
            log.error("the endpoint did not answer at every proxy within %.0f s", limit_s)


def await_open(
    urls: Callable[[], Sequence[str]],
    ask: Callable[[str], bool],
    *,
    limit_s: float,
    hold_s: float = HOLD_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Waits until all `urls` have answered for `hold_s` without a break; False after `limit_s`."""
    began, since = clock(), None
    while clock() - began < limit_s:
        listed = urls()
        if not listed or not all(ask(url) for url in listed):
            since = None
        elif since is None:
            since = clock()
        elif clock() - since >= hold_s:
            return True
        sleep(_POLL_S)
    return False


def health_urls(app: str) -> list[str]:
    """/health of the application at each of Serve's proxies; none before they are there."""
    client = _get_global_client()
    http, details = client.http_config, client.get_serve_details()
    prefix = details["applications"].get(app, {}).get("route_prefix") or ""
    waited_for = [p["node_ip"] for p in details["proxies"].values() if p["status"] in _WAITED_FOR]
    return sorted({health_url(http.host, ip, http.port, prefix) for ip in waited_for})


def health_url(host: str | None, node_ip: str, port: int, prefix: str) -> str:
    """At a proxy on the node `node_ip` that was told to listen on `host`."""
    at = node_ip if host in (None, "0.0.0.0", "::") else str(host)
    return f"http://{f'[{at}]' if ':' in at else at}:{port}{prefix.rstrip('/')}/health"


def answers(url: str) -> bool:
    """Whether it is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=_ASK_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
