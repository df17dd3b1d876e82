"""The import rules of the packages: reads every import, also those inside functions.

placement/    standard library and numpy
raymoe/       no ray; transformers only where a model's dense part or tokenizer is at hand
actors/       everything but serve_app
serve_app.py  everything; imported by nobody
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"placement", "raymoe", "actors", "serve_app", "tests", "benchmarks"}
STDLIB = set(sys.stdlib_module_names)

# package -> (modules it may import beside the standard library, folders with more of them)
ALLOWED = {
    "placement": ({"numpy", "placement"}, {}),
    "raymoe": (
        {"numpy", "torch", "safetensors", "pydantic", "pydantic_core", "msgpack", "yaml"}
        | {"placement", "raymoe"},
        {
            "raymoe/checkpoint": {"transformers", "huggingface_hub"},
            "raymoe/engine": {"transformers", "greenlet"},
            "raymoe/gateway": {"transformers", "tokenizers", "fastapi", "starlette", "jinja2"},
            "raymoe/cli.py": {"actors", "serve_app"},  # the command line reaches up to everything
            "raymoe/grammar": {"llguidance"},
            "raymoe/ui": {"fastapi", "starlette"},
            "raymoe/rpc": {"grpc", "grpc_health", "grpc_reflection", "google"},
            "raymoe/tracing.py": {"opentelemetry"},
            "raymoe/experts/grouped_triton.py": {"triton"},  # of torch with CUDA
            "raymoe/experts/vllm_cuda.py": {"vllm"},  # where the deployment asks for it
            "raymoe/plot_plan.py": {"matplotlib"},
            "raymoe/vllm_plugin": {"vllm"},
        },
    ),
    "actors": (
        {"numpy", "torch", "psutil", "ray", "fastapi", "starlette", "placement", "raymoe"}
        | {"actors"},
        {},
    ),
}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of every import of a file; relative imports are ours."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def wrong_imports(package: str, root: Path = ROOT) -> list[str]:
    """The imports of `package` that break its rule, as `file:line imports module`."""
    base, extra = ALLOWED[package]
    wrong = []
    for path in sorted((root / package).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        allowed = STDLIB | base
        for prefix, more in extra.items():
            if name == prefix or name.startswith(prefix + "/"):
                allowed = allowed | more
        wrong += [
            f"{name}:{line} imports {module}"
            for line, module in imports_of(path)
            if module not in allowed
        ]
    return wrong


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_down(package: str) -> None:
    assert wrong_imports(package) == []


def test_a_planted_import_is_found(tmp_path: Path) -> None:
    (tmp_path / "placement").mkdir()
    (tmp_path / "placement" / "bad.py").write_text("def f():\n    import torch\n")
    assert wrong_imports("placement", tmp_path) == ["placement/bad.py:2 imports torch"]


def test_ray_remote_stands_in_one_file() -> None:
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("actors", "raymoe", "placement")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "ray.remote" in path.read_text()
    ]
    assert found == ["actors/spawn.py"]


def test_group_processes_do_not_import_transformers() -> None:
    """An expert group must start without the 240 MiB and seconds that transformers costs."""
    import subprocess

    code = (
        "import sys, actors.expert_group; "
        "bad = {'transformers', 'fastapi', 'vllm'} & set(sys.modules); "
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
