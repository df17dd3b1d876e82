"""Compiling the C files beside this one, once for each source, compiler and processor.

The library lies in the user's cache folder; several processes may build it at once, each in a file
of its own, and the last rename wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno")
COMPILE_LIMIT_S = 60.0


class BuildError(Exception):
    """There is no library, and why: no compiler, it fails, no folder that is ours alone."""


def library() -> Path:
    """The path of the compiled library; compiles it when it is not there. BuildError."""
    compiler = find_compiler()
    sources = sorted(Path(__file__).parent.glob("*.c"))
    texts = [source.read_bytes() for source in sources]
    key = hashlib.sha256(b"\0".join([*texts, *_environment(compiler)])).hexdigest()[:24]
    target = cache_folder() / f"raymoe-{key}.so"
    if not target.exists():
        _compile(compiler, [str(source) for source in sources], target)
    return target


def find_compiler() -> str:
    """The C compiler of the system. BuildError without one."""
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError("there is no C compiler (cc, gcc or clang) on the PATH")


def _environment(compiler: str) -> list[bytes]:
    """What else the library depends on: `-march=native` makes it this processor's own."""
    flags = ""
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    known = [compiler, *FLAGS, platform.machine(), flags, sysconfig.get_platform()]
    return [part.encode() for part in known]


def cache_folder() -> Path:
    """A folder that only our user can write, since what lies there is run. BuildError."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "raymoe"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise BuildError(f"no cache folder: {error}") from error
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise BuildError(f"{folder} can be written by others than this user")
    return folder


def _compile(compiler: str, sources: list[str], target: Path) -> None:
    handle, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, "-o", name, *sources, "-lm"],
            capture_output=True,
            text=True,
            timeout=COMPILE_LIMIT_S,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        os.replace(name, target)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} failed: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed, as it should be
            os.unlink(name)
