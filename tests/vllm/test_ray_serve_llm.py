"""The example of docs/examples/ray_serve_llm.py: Ray builds its application, vLLM takes its engine.

It is not served here: that takes a Ray cluster and a minute. docs/vllm.md says how it was.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from raymoe.errors import ConfigError
from raymoe.vllm_plugin.loader import LOAD_FORMAT
from raymoe.vllm_plugin.settings import read_settings
from raymoe.vllm_plugin.supported import check_config

DEMO = Path("models/demo")
EXPERTS = {"controller": "10.0.0.1:40123", "deployment": "moe", "node": "n"}


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path("docs/examples/ray_serve_llm.py")
    spec = importlib.util.spec_from_file_location("ray_serve_llm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ray_builds_the_application(example: Any) -> None:
    """Ray looks at every argument: vLLM's own names, the accelerator, the placement group."""
    llm = example.llm_config(DEMO, EXPERTS, on_cpu=True)
    kwargs = llm.get_engine_config().get_initialization_kwargs()
    assert kwargs["load_format"] == "raymoe" and kwargs["model"] == str(DEMO.resolve())
    assert kwargs["additional_config"] == {"raymoe": EXPERTS}
    assert example.app(DEMO, EXPERTS, on_cpu=True)._bound_deployment is not None
    gpu = example.llm_config(DEMO, EXPERTS).get_engine_config()
    assert gpu.placement_bundles == [{"GPU": 1}]


def test_vllm_takes_the_engines_arguments(example: Any) -> None:
    """As Ray hands them over, with the model and the executor that Ray chooses."""
    from vllm import AsyncEngineArgs

    llm = example.llm_config(DEMO, EXPERTS, on_cpu=True)
    arguments = llm.get_engine_config().get_initialization_kwargs()
    config = AsyncEngineArgs(**arguments).create_engine_config()
    assert config.load_config.load_format == LOAD_FORMAT
    settings = read_settings(config.additional_config)
    assert settings.deployment == "moe" and settings.controller_address() == ("10.0.0.1", 40123)
    check_config(config, settings.stall_limit_s, 300)


def test_what_is_said_for_gpus_is_what_the_plugin_wants(example: Any) -> None:
    from vllm import AsyncEngineArgs

    on_gpu = example.engine_kwargs(EXPERTS)
    arguments = {"model": str(DEMO), "skip_tokenizer_init": True}
    taken = {**on_gpu, "compilation_config": {"cudagraph_mode": "FULL"}}
    config = AsyncEngineArgs(**arguments, **on_gpu).create_engine_config()
    check_config(config, 240, 300)
    mode = type(config.compilation_config.cudagraph_mode)
    config.compilation_config.cudagraph_mode = mode[taken["compilation_config"]["cudagraph_mode"]]
    with pytest.raises(ConfigError, match="full CUDA graphs"):
        check_config(config, 240, 300)
