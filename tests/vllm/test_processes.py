"""vLLM as it is deployed: an engine process of its own, and two tensor-parallel workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engines import Text, differences, engine_of, generate, prompts
from tests.vllm.groups import Fleet
from tests.zoo import VOCAB, tiny_checkpoint

PROGRAM = """
import json, sys
from pathlib import Path
from tests.vllm.engines import generate, engine_of, prompts

if __name__ == "__main__":
    model, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    with engine_of(model, **options) as engine:
        print(json.dumps([text.ids for text in generate(engine, prompts({vocab}, 3))]))
"""


@pytest.mark.timeout(600)  # four processes that import vLLM
def test_two_ranks_in_processes_of_their_own(tmp_path: Path) -> None:
    """Each rank finds the plugin by its entry point and has its own links and control."""
    model = tiny_checkpoint("qwen2_moe", tmp_path, hidden_size=128, head_dim=32)
    options = {"skip_tokenizer_init": True}
    with engine_of(model, **options) as engine:
        reference = generate(engine, prompts(VOCAB, 3))
    fleet = Fleet(model, {"a": lambda _, e: e % 2 == 0, "b": lambda _, e: e % 2 == 1})
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(vocab=VOCAB))
    more = {
        **options,
        "tensor_parallel_size": 2,
        "load_format": "raymoe",
        "additional_config": {"raymoe": fleet.settings(tmp_path / "secret", name="engine")},
    }
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONPATH": os.getcwd(),
    }
    process = subprocess.Popen(
        [sys.executable, str(program), str(model), json.dumps(more)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    memory = set(os.listdir("/dev/shm"))
    try:
        said, _ = process.communicate(timeout=540)
        assert process.returncode == 0, said[-6000:]
        (line,) = [line for line in said.splitlines() if line.startswith("[[")]
        made = [Text(ids=tuple(ids), leads=()) for ids in json.loads(line)]
        assert differences(reference, made) == []
        reports = {r.name: r for r in fleet.control.take_reports()}
        assert sorted(reports) == ["engine-0", "engine-1"]
        assert all(report.counts is not None for report in reports.values())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        fleet.close()
        for name in set(os.listdir("/dev/shm")) - memory:  # of killed ranks; their end clears them
            if name.startswith("vllm_dist_"):
                Path("/dev/shm", name).unlink(missing_ok=True)
