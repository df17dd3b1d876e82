"""What Ray's own autoscaler reads from the manifests. Does not start Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as derive,
)

from tests.k8s.overlays import OVERLAYS, build, cluster_of, workers


def node_types(overlay: str) -> dict[str, dict[str, Any]]:
    """The autoscaler's node types by name."""
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": cluster_of(build(overlay))}
    found: dict[str, dict[str, Any]] = derive(cluster)["available_node_types"]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pools_have_the_resources_and_labels_that_groups_ask_for(overlay: str) -> None:
    types = node_types(overlay)
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["serving"]["resources"]["CPU"] > 0 and "GPU" not in types["serving"]["resources"]
    for name in set(workers(build(overlay))) - {"serving"}:
        resources = {k: v for k, v in types[name]["resources"].items() if k != "memory"}
        gpu = {} if overlay == "local" else {"GPU": 1}
        assert resources == {"CPU": 0, "expert_slot": 1, **gpu}
        assert types[name]["labels"] == {"raymoe-pool": name}


def test_limits_of_mixed_pools() -> None:
    limits = {n: (t["min_workers"], t["max_workers"]) for n, t in node_types("mixed").items()}
    del limits["headgroup"]
    assert limits == {"serving": (1, 4), "h100": (1, 4), "a100": (0, 4), "l4": (0, 8)}
