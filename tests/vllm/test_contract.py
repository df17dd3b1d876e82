"""The vLLM installed here is the one the plugin was written for."""

from __future__ import annotations

from pathlib import Path

import vllm

from tests.vllm.contract import CALLED, NAMED, WRITTEN, broken


def test_the_installed_vllm_keeps_what_the_plugin_relies_on() -> None:
    assert broken(Path(vllm.__file__).parent) == []


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    gone = broken(tmp_path)
    promises = len(CALLED) + sum(map(len, NAMED.values())) + sum(map(len, WRITTEN.values()))
    assert len(gone) == promises
    layers = tmp_path / "model_executor/layers/fused_moe"
    layers.mkdir(parents=True)
    (layers / "routed_experts.py").write_text(
        "class RoutedExperts:\n    def load_weights(self, tensors): ...\n"
        "class Novel(RoutedExperts): ...\n"
    )
    told = "\n".join(broken(tmp_path))
    assert "load_weights takes (self, tensors), not (self, weights)" in told
    assert "Novel is a new subclass of RoutedExperts" in told
