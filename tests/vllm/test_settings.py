"""What users say to the plugin, and the sentences they get; needs no vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymoe.errors import ConfigError
from raymoe.vllm_plugin.settings import read_settings
from raymoe.vllm_plugin.supported import check_config, check_version

HERE = {"controller": "10.0.0.1:7000"}


def test_settings_say_where_the_controller_is(tmp_path: Path) -> None:
    assert read_settings({"raymoe": HERE}).controller_address() == ("10.0.0.1", 7000)
    assert read_settings({"raymoe": {"controller": "[::1]:9"}}).controller_address() == ("::1", 9)
    file = tmp_path / "address"
    late = read_settings({"raymoe": {"controller_file": str(file)}})
    with pytest.raises(OSError, match="address"):
        late.controller_address()
    file.write_text("h:1\n")
    assert late.controller_address() == ("h", 1)
    config = read_settings({"raymoe": {**HERE, "deployment": "d", "wire_dtype": "bfloat16"}})
    deployment = config.deployment_config("/m")
    assert (deployment.name, deployment.model) == ("d", "/m")
    assert deployment.data_plane.wire_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "needs additional_config="),
        ({}, "needs additional_config="),
        ({"raymoe": 3}, "must be a mapping, got 3"),
        ({"raymoe": {}}, "either controller or controller_file is needed"),
        ({"raymoe": {**HERE, "controller_file": "f"}}, "either controller or controller_file"),
        ({"raymoe": {"controller": "here"}}, "host:port is needed, got 'here'"),
        ({"raymoe": {**HERE, "stall": 1}}, "stall: unknown setting"),
        ({"raymoe": {**HERE, "mode": "both", "stall_limit_s": 0}}, "mode: .*; stall_limit_s: "),
    ],
)
def test_wrong_settings_are_named(given: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_settings(given)


def engine_config(**changes: Any) -> SimpleNamespace:
    """As vLLM's defaults, with `part__field=value` changed."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "data_parallel_size": 1,
            "enable_eplb": False,
            "enable_expert_parallel": False,
            "pipeline_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "enable_dbo": False,
        },
        "model_config": {"quantization": None, "revision": None},
        "compilation_config": {"cudagraph_mode": None},
    }
    whole: dict[str, Any] = {"lora_config": None, "speculative_config": None}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        (parts[part] if field else whole)[field or part] = value
    return SimpleNamespace(**whole, **{n: SimpleNamespace(**p) for n, p in parts.items()})


FULL_GRAPHS = SimpleNamespace(has_full_cudagraphs=lambda: True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parallel_config__data_parallel_size": 2}, "start that many engines"),
        ({"parallel_config__enable_eplb": True}, "enable_eplb"),
        ({"parallel_config__enable_expert_parallel": True}, "enable_expert_parallel"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallel"),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config__quantization": "fp8"}, r"quantised weights \(fp8\)"),
        ({"model_config__revision": "v2"}, "revision"),
        ({"compilation_config__cudagraph_mode": FULL_GRAPHS}, "'cudagraph_mode': 'PIECEWISE'"),
    ],
)
def test_what_was_never_tried_is_refused(changes: dict[str, Any], sentence: str) -> None:
    check_config(engine_config(), 240.0, 300.0)
    with pytest.raises(ConfigError, match=sentence):
        check_config(engine_config(**changes), 240.0, 300.0)


def test_a_stall_must_end_before_vllm_ends_the_step() -> None:
    with pytest.raises(ConfigError, match="after 300 s"):
        check_config(engine_config(), 300.0, 300.0)


def test_old_vllm_is_for_gpus_only() -> None:
    check_version((0, 29), "cuda")
    check_version((0, 31), "cpu")
    with pytest.raises(ConfigError, match=r"this is 0\.30"):
        check_version((0, 30), "cpu")
