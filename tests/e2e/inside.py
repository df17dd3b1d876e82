"""Calls to the actors of a running deployment that no HTTP route offers, for tests only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.e2e.conftest import ROOT, Deployment

_CALL = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
from actors.controller import find_controller
controller = find_controller(sys.argv[2])
ray.get(getattr(controller, sys.argv[3]).remote(*json.loads(sys.argv[4])), timeout=30)
"""


_PORT = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("port", ray.nodes()[0]["MetricsExportPort"])
"""


def ray_address(deployment: Deployment) -> str:
    """Where the GCS of this deployment's own Ray listens."""
    for process in deployment.tree():
        for argument in process.cmdline():
            if argument.startswith("--gcs-address="):
                return argument.partition("=")[2]
    raise AssertionError("no raylet found below raymoe serve")


def call_controller(deployment: Deployment, method: str, *arguments: Any) -> None:
    """One call of the controller, made from a process that joins the deployment's Ray."""
    _run(_CALL, ray_address(deployment), "raymoe", method, json.dumps(list(arguments)))


def ray_metrics_port(deployment: Deployment) -> int:
    """Where the agent of Ray's (first) node exports metrics."""
    said = _run(_PORT, ray_address(deployment))
    return int(said.rsplit("port ", 1)[1])


def _run(code: str, *told: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *told],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
