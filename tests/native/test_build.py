"""Without a compiler, or where it must not be used, everything works in numpy and torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymoe.native import build

DISPATCH = """
import os
import numpy as np, torch
from raymoe.client import ExpertClient
from raymoe.native import native
from tests.client.scripted_group import *
ids = torch.tensor([[0, 1], [1, 0]])
batch = torch.randn(2, HIDDEN), ids, torch.rand(2, 2)
for name, value in (("RAYMOE_NATIVE", "0"), ("PATH", os.environ["XDG_CACHE_HOME"])):
    os.environ[name] = value  # switched off, then no compiler
    native.cache_clear()
    fleet = Fleet([ScriptedGroup("a", {(0, 0)}), ScriptedGroup("b", {(0, 1)})], 1, 2)
    client = ExpertClient(identity(), SECRET, "n", dial=fleet.dial)
    client.set_table(fleet.table(1))
    out = client.combine(client.dispatch(0, *batch))
    torch.testing.assert_close(out.double(), reference(0, *batch), rtol=1e-5, atol=1e-5)
    print(name, client.take_counts().tolist(), native())
    client.close()
    del os.environ[name]
"""


def test_without_the_library_numpy_dispatches(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DISPATCH],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["RAYMOE_NATIVE [[2, 2]] None", "PATH [[2, 2]] None"]


def test_the_library_is_built_once_and_again_for_another_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        compiler = build.find_compiler()
    except build.BuildError:
        pytest.skip("no C compiler here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # optimising takes seconds, and is not what this is about
    monkeypatch.setattr(build, "FLAGS", ("-std=gnu11", "-O0", "-fPIC", "-shared"))
    first = build.library()
    made = first.stat().st_mtime_ns
    assert build.library() == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]  # nothing left over
    other = tmp_path / "cc"
    other.symlink_to(compiler)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert build.library() != first


def test_a_folder_that_others_can_write_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "raymoe").mkdir()
    (tmp_path / "raymoe").chmod(0o777)
    with pytest.raises(build.BuildError, match="written by others"):
        build.cache_folder()


def test_a_compiler_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho this machine cannot >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(build.BuildError, match="this machine cannot"):
        build.library()
    assert not list((tmp_path / "cache" / "raymoe").iterdir())
