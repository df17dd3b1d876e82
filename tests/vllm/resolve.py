"""Whether every documented combination of vLLM, Python, Ray and transformers can be installed.

    python -m tests.vllm.resolve

asks the package index what `pip install 'raymoe[vllm]'` would install, for each row of docs/vllm.md
("Which versions"), by uv's resolver: it reads the packages' metadata, by ranges of wheels where the
index has no more, and downloads no wheel (50 MB in all, one or two minutes; later seconds). Exit
status 1 when a combination is not as documented. An index that cannot be asked is said, and no
failure: what it would have answered is not known.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = "x86_64-manylinux_2_35"
SHOWN = ("vllm", "ray", "torch", "transformers")
LIMIT_S = 120


@dataclass(frozen=True)
class Case:
    """`wants` beside raymoe[vllm]; `refused`: a word of the conflict that is documented."""

    python: str
    wants: tuple[str, ...]
    refused: str = ""


CASES = [
    *(
        Case(python, (f"vllm==0.{minor}.*",))
        for minor in (29, 30, 32, 33)
        for python in ("3.11", "3.12", "3.13")
    ),
    *(Case("3.11", (f"ray==2.{minor}.*", "vllm==0.33.*")) for minor in (58, 59)),
    *(Case(python, ("ray[llm]==2.60.*", "vllm==0.29.*")) for python in ("3.11", "3.12", "3.13")),
    # the extra leaves 0.31 out; this is why
    Case("3.12", ("vllm==0.31.*",), refused="transformers"),
]


def resolve(case: Case, uv: str) -> tuple[bool | None, str]:
    """Whether it is as documented, None when that could not be found out; and what to say of it."""
    requirements = [*_own(), *case.wants]
    index = os.environ.get("PIP_INDEX_URL")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.in"
        wanted.write_text("\n".join(requirements))
        command = [
            uv, "pip", "compile", "--quiet", str(wanted), "--no-build", "--no-header",
            "--no-annotate", "--python-version", case.python, "--python-platform", PLATFORM,
            "--cache-dir", str(Path(sys.prefix) / ".uv-cache"),
            *(["--default-index", index] if index else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return None, f"no answer within {LIMIT_S} s"
    if done.returncode == 0:
        found = dict(line.split("==") for line in done.stdout.split() if "==" in line)
        told = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
        return not case.refused, told
    why = " ".join(done.stderr.split())
    if "No solution found" not in why or "not found in the package registry" in why:
        return None, why[:400]
    return bool(case.refused) and case.refused in why, why[:400]


def _own() -> list[str]:
    """What raymoe needs, and vLLM in any version: 0.31 is to be tried."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = project["optional-dependencies"]["vllm"]
    return [*project["dependencies"], re.sub(r"!=[^,]*,?", "", vllm)]


def main() -> int:
    """Prints a line for each combination."""
    uv = find_uv_bin()  # not in the threads: sysconfig is set up by whoever asks first
    with ThreadPoolExecutor(4) as several:
        answers = list(several.map(partial(resolve, uv=uv), CASES))
    words = {True: "as documented", False: "NOT AS DOCUMENTED", None: "not checked"}
    for case, (right, told) in zip(CASES, answers, strict=True):
        print(f"{words[right]}: Python {case.python}, {', '.join(case.wants)}: {told}")
    return int(any(right is False for right, _ in answers))


if __name__ == "__main__":
    sys.exit(main())
