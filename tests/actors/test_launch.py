"""The launcher's decisions, without Ray: what it refuses, says, watches, drains and tidies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from actors.launch import check_name_free, check_serve
from actors.leftovers import mark_owner, remove_leftovers, unmark_owner
from actors.local import LocalRay
from actors.say import base_url, last_sentence, lasting_error
from actors.take_down import drain, requests_in_flight
from actors.watch import Watch
from raymoe.config import DeploymentConfig, RayConfig, load_config
from raymoe.errors import ConfigError

DIED = """The deployment failed to start 1 times in a row. Error:
\x1b[36mray::ServeReplica:raymoe:Router.initialize()\x1b[39m (pid=7, ip=127.0.0.1)
    raise ConfigError(
raymoe.errors.ConfigError: 1000 bytes of KV cache hold no block
"""


def settings(**overrides: Any) -> DeploymentConfig:
    return load_config(
        None, {"model": "m", **{k.replace("__", "."): v for k, v in overrides.items()}}
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"groups": True}, "groups"),
        ({"groups": ({"device": "gpu0"},)}, "device"),
        ({"groups": ({"device": "cuda:"},)}, "device"),
        ({"groups": ({"resources": {"CPU": 1}},)}, "num_cpus"),
        ({"groups": ({"resources": {"GPU": 1}},)}, "num_gpus"),
        ({"groups": ({"resources": {"big": 0}},)}, "resources"),
        ({"groups": ({"resources": {"big": float("inf")}},)}, "resources"),
        ({"groups": ({"slowdown": float("inf")},)}, "slowdown"),
        ({"placement__interval_s": float("nan")}, "placement.interval_s"),
        ({"data_plane__slot_bytes": (1 << 30) + 1}, "data_plane.slot_bytes"),
        ({"routers__device": "gpu0"}, "routers.device"),
        ({"gateway__route_prefix": "demo"}, "gateway.route_prefix"),
        ({"gateway__route_prefix": "/demo/"}, "gateway.route_prefix"),
        ({"gateway__drain_s": -1}, "gateway.drain_s"),
    ],
)
def test_a_value_that_cannot_work_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        settings(**wrong)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3"])
def test_devices_that_can_work(device: str) -> None:
    assert settings(groups=({"device": device},)).groups[0].device == device


def test_a_deployment_that_runs_already_is_not_adopted() -> None:
    check_name_free(settings(name="b"), {"raymoe:a:controller", "raymoe:b:group:x:1"})
    with pytest.raises(ConfigError, match="'b' runs already"):
        check_name_free(settings(name="b"), {"raymoe:b:controller"})


@pytest.mark.parametrize(
    ("port", "prefixes", "named"),
    [
        (8001, {}, "--port 8001"),
        (8000, {"other": "/"}, "'other'.*gateway.route_prefix"),
        (8000, {"raymoe": "/x"}, "--name"),
    ],
)
def test_a_serve_that_cannot_take_it_in(port: int, prefixes: dict[str, str], named: str) -> None:
    running = SimpleNamespace(host="127.0.0.1", port=port)
    with pytest.raises(ConfigError, match=named):
        check_serve(settings(), running, prefixes)


def test_a_serve_that_can_take_it_in() -> None:
    running = SimpleNamespace(host="127.0.0.1", port=8000)
    check_serve(settings(gateway__route_prefix="/a"), running, {"other": "/", "third": None})


def test_the_url_has_the_route_prefix() -> None:
    assert base_url(settings()) == "http://127.0.0.1:8000"
    assert base_url(settings(gateway__host="::", gateway__port=9)) == "http://127.0.0.1:9"
    assert base_url(settings(gateway__host="::1", gateway__route_prefix="/a")).endswith("]:8000/a")


def test_the_error_of_a_router_is_one_sentence() -> None:
    assert lasting_error(["", DIED]) == "1000 bytes of KV cache hold no block"
    assert last_sentence(["Deploying", DIED]) == "1000 bytes of KV cache hold no block"


def test_an_error_that_may_pass_is_waited_for() -> None:
    passing = DIED.replace("ConfigError", "ExpertsUnavailable")
    assert lasting_error([passing]) is None
    assert last_sentence([passing]) == "1000 bytes of KV cache hold no block"
    assert last_sentence(["a\nKeyError: 'x'\n"]) == "KeyError: 'x'"


class Cluster:
    """Answers of a cluster, one a look."""

    def __init__(self) -> None:
        self.alive = True
        self.now: dict[str, Any] = {"ready": True, "failed": None, "text": ""}

    def progress(self) -> dict[str, Any]:
        if not self.now:
            raise ValueError("no such actor")
        return self.now

    def answers(self) -> bool:
        if not self.alive:
            raise ConnectionError("no GCS")
        return True


def test_the_watch_says_each_change_once(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster()
    watch = Watch(cluster.progress, cluster.answers)
    ready = cluster.now
    for now in (ready, ready, {**ready, "ready": False, "text": "groups up 1/2"}, {}, ready, ready):
        cluster.now = now
        watch.look()
        if now:
            watch.look()
    assert capsys.readouterr().out.splitlines() == [
        "not ready: groups up 1/2",
        "not ready: the placement controller does not answer",
        "ready again",
    ]
    assert watch.failed() is None


def test_the_watch_tells_that_the_controller_gave_up() -> None:
    cluster = Cluster()
    watch = Watch(cluster.progress, cluster.answers)
    cluster.now = {**cluster.now, "failed": "no group starts"}
    watch.look()
    assert watch.failed() == "no group starts"


def test_the_watch_gives_ray_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("actors.watch.time.monotonic", lambda: now[0])
    cluster = Cluster()
    watch = Watch(cluster.progress, cluster.answers)
    now[0] = 110.0
    watch.look()  # answers: the time counts from here
    cluster.alive = False
    watch.look()
    assert not watch.ray_gone(124.0)
    assert watch.ray_gone(126.0)


def test_drain_waits_for_open_requests() -> None:
    left = [2, 1, 0, 7]
    drain(settings(), in_flight=lambda: left.pop(0))
    assert left == [7]


def test_drain_ends_in_time_and_without_an_endpoint() -> None:
    asked: list[int] = []
    drain(settings(gateway__drain_s=0.2), in_flight=lambda: asked.append(1) or 1)
    assert asked
    drain(settings(), in_flight=lambda: None)


def test_no_endpoint_has_no_requests_that_can_be_seen() -> None:
    assert requests_in_flight(settings(gateway__port=1)) is None


def test_a_temp_dir_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"/nonexistent.*ray\.temp_dir"):
        LocalRay(RayConfig(temp_dir="/nonexistent"))


@pytest.fixture
def orphan(tmp_path: Path) -> Path:
    """A folder whose owner has died."""
    folder = tmp_path / "raymoe-dead"
    folder.mkdir()
    (folder / "secret").write_text("s")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / "pid").write_text(f"{ended.pid} 0.0")
    return folder


def test_what_a_killed_serve_left_is_removed(tmp_path: Path, orphan: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    proxy = subprocess.Popen([*sleep, str(orphan / "p" / "haproxy.cfg")])
    other = subprocess.Popen([*sleep, f"{orphan}-2/haproxy.cfg"])
    try:
        assert remove_leftovers(str(tmp_path)) == [orphan]
        assert not orphan.exists()
        proxy.wait(timeout=5)
        assert other.poll() is None
    finally:
        for process in (proxy, other):
            process.kill()
            process.wait()


def test_what_somebody_uses_is_left_alone(tmp_path: Path, orphan: Path) -> None:
    ours, unmarked = tmp_path / "raymoe-ours", tmp_path / "raymoe-unmarked"
    for folder in (ours, unmarked):
        folder.mkdir()
    mark_owner(ours)
    unmark_owner(orphan)  # kept for its logs
    assert remove_leftovers(str(tmp_path)) == []
    assert ours.exists() and unmarked.exists() and orphan.exists()


def test_a_pid_that_was_given_to_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "raymoe-x"
    folder.mkdir()
    (folder / "pid").write_text(f"{os.getpid()} {psutil.Process().create_time() - 1000}")
    assert remove_leftovers(str(tmp_path)) == [folder]


def test_no_logs_are_kept_when_ray_was_not_started() -> None:
    never = LocalRay(RayConfig())
    assert never.stop(keep_logs=True) is None
    assert not never.folder.exists()
