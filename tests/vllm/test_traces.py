"""What a killed router of vLLM has left is known, and removed; needs no vLLM."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from actors.leftovers import remove_leftovers
from actors.local import LocalRay
from raymoe.config import RayConfig, parse_config
from raymoe.vllm_plugin.arguments import environment
from raymoe.vllm_plugin.traces import (
    mark_owner,
    note,
    note_memory,
    remove_traces,
    remove_traces_of_dead,
)

MAPS_A_RING = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""
OWNS = """
import sys
from pathlib import Path
from raymoe.vllm_plugin.traces import mark_owner, note
mark_owner(Path(sys.argv[1]))
note(Path(sys.argv[1]), sys.argv[2:])
print("noted", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["psm_{}", "vllm_dist_{}-tp:0-[0-1]-cpushm_0"])
def ring(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Memory as vLLM makes it; this process does not map it."""
    path = Path("/dev/shm", request.param.format(uuid.uuid4().hex[:8]))
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "raymoe-x" / "r" / "session_1" / "vllm-a"
    folder.mkdir(parents=True)
    return folder


def _started(program: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline(), "it has ended"
    return process


def _ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_rings_of_processes_below_are_noted_and_removed(folder: Path, ring: Path) -> None:
    process = _started(MAPS_A_RING, ring)
    try:
        note_memory(folder)
    finally:
        _ended(process)
    note_memory(folder)  # nothing more; what was noted stays
    assert str(ring) in (folder / f"traces-{os.getpid()}").read_text().splitlines()
    remove_traces(folder)
    assert not ring.exists()
    remove_traces(folder)  # again: nothing to do


def test_pythons_segments_are_called_so(folder: Path) -> None:
    """vLLM lets Python name its rings and semaphores."""
    assert shared_memory._SHM_NAME_PREFIX == "/psm_"  # type: ignore[attr-defined]
    lock = multiprocessing.get_context("spawn").Lock()
    note_memory(folder)
    noted = (folder / f"traces-{os.getpid()}").read_text()
    name = lock._semlock.name.removeprefix("/")  # type: ignore[attr-defined]
    assert f"/dev/shm/sem.{name}" in noted.splitlines()


def test_only_what_vllm_may_have_made_is_removed(folder: Path, tmp_path: Path) -> None:
    other, meeting = tmp_path / "other", tmp_path / f"vllm_dist_{uuid.uuid4().hex}"
    semaphore = Path(f"/dev/shm/sem.mp-{uuid.uuid4().hex[:8]}")
    for path in (other, meeting, semaphore):
        path.write_text("x")
    note(folder, [str(other), str(meeting), str(semaphore), "/dev/shm/psm_../x", ""])
    remove_traces(folder)
    assert other.exists() and not meeting.exists() and not semaphore.exists()


def test_what_a_router_that_lives_uses_stays_until_it_is_killed(folder: Path, ring: Path) -> None:
    router = _started(OWNS, folder, ring)
    try:
        assert remove_traces_of_dead([folder]) == []
        assert ring.exists()
    finally:
        _ended(router)
    assert remove_traces_of_dead([folder, folder.parent / "none"]) == [folder]
    assert not ring.exists() and not folder.exists()


def test_a_router_that_nobody_has_waited_for_is_dead_too(folder: Path, ring: Path) -> None:
    router = _started(OWNS, folder, ring)
    router.kill()
    os.waitid(os.P_PID, router.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
    assert remove_traces_of_dead([folder]) == [folder]
    _ended(router)


def test_a_pid_that_was_given_to_another_process(folder: Path, ring: Path) -> None:
    mark_owner(folder)
    note(folder, [str(ring)])
    assert remove_traces_of_dead([folder]) == []
    (folder / "owner").write_text(f"{os.getpid()} 1")
    assert remove_traces_of_dead([folder]) == [folder]


def test_a_folder_without_an_owner_is_left_alone(folder: Path, ring: Path) -> None:
    note(folder, [str(ring)])
    assert remove_traces_of_dead([folder]) == []
    assert ring.exists()


def test_the_end_of_a_deployment_removes_them(ring: Path) -> None:
    local = LocalRay(RayConfig())
    session = local.folder / "r" / "session_1" / "vllm-b"
    session.mkdir(parents=True)
    note(session, [str(ring)])
    local.stop()
    assert not ring.exists()


def test_a_serve_after_a_killed_one_removes_them(folder: Path, ring: Path, tmp_path: Path) -> None:
    note(folder, [str(ring)])
    dead = tmp_path / "raymoe-x"
    (dead / "pid").write_text(f"{os.getpid()} 1.0")
    assert remove_leftovers(str(tmp_path)) == [dead]
    assert not ring.exists()


def test_sockets_go_into_the_folder_when_their_paths_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    config = parse_config({"model": "m"}, source="test")
    fits, too_long = Path("/" + "a" * 69), Path("/" + "a" * 70)
    assert environment(config, fits)["VLLM_RPC_BASE_PATH"] == str(fits)
    assert "VLLM_RPC_BASE_PATH" not in environment(config, too_long)
    assert "VLLM_RPC_BASE_PATH" not in environment(config)
