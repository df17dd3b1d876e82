"""Settings: every wrong one is refused by name, and the page about them is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from raymoe.config import load_config, read_secret
from raymoe.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: a\ngroups: 3\ngateway: {port: 9000, max_in_flight: 7}\n")
    config = load_config(str(file), {"gateway.port": 9001})
    assert (config.model, config.gateway.port, config.gateway.max_in_flight) == ("a", 9001, 7)
    assert [g.count for g in config.groups] == [3]


def test_groups_flag_replaces_the_kinds_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: a\ngroups: [{kind: big, count: 2}]\n")
    assert [g.count for g in load_config(str(file), {"groups": 5}).groups] == [5]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "model"),
        ({"groups": 0}, "groups"),
        ({"groups": ()}, "groups"),
        ({"groups": ({"kind": "a"}, {"kind": "a"})}, "kinds"),
        ({"groups": ({"kind": "a", "memory_byte": 1},)}, "memory_byte"),
        ({"groups": ({"kind": "a", "slowdown": 0.5},)}, "slowdown"),
        ({"gateway.port": 70000}, "gateway.port"),
        ({"gateway.prot": 8000}, "gateway.prot"),
        ({"data_plane.transport": "pigeon"}, "data_plane.transport"),
        ({"name": "Not A Name"}, "name"),
        ({"routers.count": 0}, "routers.count"),
        ({"routers": {"count": 3, "autoscaling": {"max_replicas": 2}}}, "count is 3"),
        ({"routers": {"autoscaling": {"min_replicas": 2, "max_replicas": 4}}}, "count is 1"),
        ({"routers": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "is above"),
        ({"routers": {"autoscaling": {"upscale_delay_s": 1}}}, "set max_replicas"),
        ({"routers": {"autoscaling": {"max_replica": 2}}}, "routers.autoscaling.max_replica"),
        ({"ray.object_store_bytes": 1}, "object_store_bytes"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], named: str) -> None:
    base = {} if not settings else {"model": "m"}
    with pytest.raises(ConfigError, match=named):
        load_config(None, {**base, **settings})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(str(file), {})


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_config("/nonexistent/c.yaml", {})


def test_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("0123456789abcdef\n")
    assert read_secret(load_config(None, {"model": "m", "secret_file": str(file)})).endswith(b"f")
    config = load_config(None, {"model": "m"})
    monkeypatch.setenv("RAYMOE_SECRET", "too short")
    with pytest.raises(ConfigError, match="16 bytes or more") as caught:
        read_secret(config)
    assert "too short" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the secret file"):
        read_secret(load_config(None, {"model": "m", "secret_file": str(tmp_path / "none")}))


def test_the_page_of_settings_is_true() -> None:
    spec = importlib.util.spec_from_file_location("make_config", ROOT / "docs/make_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "config.md").read_text() == module.render(), (
        "docs/config.md is out of date: run `python docs/make_config.py`"
    )
