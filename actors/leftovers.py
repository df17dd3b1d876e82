"""What a `raymoe serve` that was killed has left: its proxy, its secret, its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from raymoe.vllm_plugin.traces import remove_traces

PREFIX = "raymoe-"
_OWNER = "pid"


def mark_owner(folder: Path) -> None:
    """Writes into the folder which process it belongs to: pid, and when that process began."""
    me = psutil.Process()
    (folder / _OWNER).write_text(f"{me.pid} {me.create_time()}")


def unmark_owner(folder: Path) -> None:
    """From now on the folder belongs to the user: nobody removes it."""
    (folder / _OWNER).unlink(missing_ok=True)


def remove_leftovers(temp_dir: str | None) -> list[Path]:
    """Ends the processes and removes the folders of this user whose owner is dead."""
    removed = []
    for folder in sorted(Path(temp_dir or tempfile.gettempdir()).glob(PREFIX + "*")):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.lstat().st_uid != os.getuid() or not _orphaned(folder):
                continue
            _end_processes_of(folder)
            remove_memory(folder)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def remove_memory(folder: Path) -> None:
    """Removes what the routers of an ended deployment have left in shared memory."""
    for router in folder.glob("r/session_*/vllm-*"):
        remove_traces(router)


def _orphaned(folder: Path) -> bool:
    """Its owner is known, and is dead. A folder without an owner's mark is left alone."""
    try:
        pid, began = (folder / _OWNER).read_text().split()
        return abs(psutil.Process(int(pid)).create_time() - float(began)) > 1
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError):
        return False


def _end_processes_of(folder: Path) -> None:
    spared = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    ended = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid in spared or process.uids().real != os.getuid():
                continue
            if any(_names(argument, folder) for argument in process.cmdline()):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=3)


def _names(argument: str, folder: Path) -> bool:
    """`--dir=/tmp/raymoe-a/r` names /tmp/raymoe-a; `/tmp/raymoe-ab` does not."""
    _, found, rest = argument.partition(str(folder))
    return bool(found) and (not rest or rest[0] in "/,: '\"")
