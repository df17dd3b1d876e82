"""What vLLM's processes make on a machine outside of their own memory, and who removes it.

vLLM removes its message rings (`/dev/shm/psm_*`, some hundred MB), the memory over which its ranks
reduce (`vllm_dist_*-cpushm_*`), its semaphores (`sem.mp-*`) and the file where its ranks meet
(`/tmp/vllm_dist_*`) at most when it is told to end and has the time; not when its processes are
killed, and that is how a router may end at any moment. So what there is stands in the router's
folder:

    owner       the router: process id, and when that process began
    traces-PID  one path a line, noted by the process of that id

Whoever finds the folder of a router that is dead removes what stands there: the next router on the
machine, the end of `raymoe serve`, and the next `raymoe serve` after one that was killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_OWNER = "owner"
_PROC = Path("/proc")
_MEMORY = r"/dev/shm/(?:psm_[0-9a-f]+|vllm_dist_[0-9a-f]+-[\w:\[\]-]+)"
_MAPPED = re.compile(_MEMORY)
_SEMAPHORE = re.compile(r" (\d+) +/dev/shm/sem\.")  # inode; mapped under the name it was made by
_OURS = re.compile(_MEMORY + r"|/dev/shm/sem\.mp-[a-z0-9_]+|/.*/vllm_dist_[0-9a-f]+")


def mark_owner(folder: Path) -> None:
    """From now on, what is noted in the folder belongs to this process."""
    began = _began(os.getpid())
    if began is not None:  # without /proc nobody is known to be dead
        (folder / _OWNER).write_text(f"{os.getpid()} {began}")


def note(folder: Path, paths: Iterable[str]) -> None:
    """Adds to what this process has noted; whole or not at all."""
    file = folder / f"traces-{os.getpid()}"
    known = set(file.read_text().splitlines()) if file.exists() else set()
    found = known | set(paths)
    if found != known:
        new = folder / f"new-{file.name}"
        new.write_text("\n".join(sorted(found)))
        new.replace(file)


def note_memory(folder: Path) -> None:
    """Notes all such memory that this process or one below it has mapped."""
    rings: set[str] = set()
    semaphores: set[int] = set()
    for pid in _tree(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            maps = (_PROC / str(pid) / "maps").read_text()
            rings |= set(_MAPPED.findall(maps))
            semaphores |= set(map(int, _SEMAPHORE.findall(maps)))
    note(folder, rings | _named(semaphores))


def remove_traces(folder: Path) -> None:
    """Removes what is noted in the folder. A process that has it mapped keeps it until it ends."""
    for file in folder.glob("traces-*"):
        with contextlib.suppress(OSError):
            for path in file.read_text().splitlines():
                if _OURS.fullmatch(path):
                    with contextlib.suppress(OSError):
                        os.unlink(path)


def remove_traces_of_dead(folders: Iterable[Path]) -> list[Path]:
    """The same for the folders whose owner is dead, and the folders themselves."""
    dead = [folder for folder in folders if _is_dead(folder)]
    for folder in dead:
        remove_traces(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return dead


def _is_dead(folder: Path) -> bool:
    """Its owner is known, and has ended. Without an owner's mark: nobody knows."""
    try:
        pid, began = (folder / _OWNER).read_text().split()
        return _began(int(pid)) != began
    except (OSError, ValueError):
        return False


def _stat(pid: int | str) -> list[str]:
    """/proc/PID/stat from the state on; the name before it may hold anything. OSError: no more."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _began(pid: int) -> str | None:
    """In ticks since the machine's start, so that no two processes of one pid have the same."""
    with contextlib.suppress(OSError):
        state, *rest = _stat(pid)
        if state not in "ZX":
            return rest[18]
    return None


def _tree(root: int) -> list[int]:
    below: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for entry in _PROC.iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    below.setdefault(int(_stat(entry.name)[1]), []).append(int(entry.name))
    tree = [root]
    for pid in tree:  # it grows
        tree += below.get(pid, [])
    return tree


def _named(inodes: set[int]) -> set[str]:
    """Python's semaphores among these."""
    found = set()
    for path in Path("/dev/shm").glob("sem.mp-*") if inodes else ():
        with contextlib.suppress(OSError):
            if path.stat().st_ino in inodes:
                found.add(str(path))
    return found
