"""vLLM under ray.serve.llm, with its experts in the groups of a running raymoe deployment.

    ray start --head
    raymoe serve --config deployment.yaml --address auto        # docs/vllm.md has the file
    python docs/examples/ray_serve_llm.py --model models/demo --secret-file /etc/raymoe/secret

Needs vLLM and what `ray[llm]` brings beside it, in every node's Python. The model then answers
twice: at raymoe's own endpoint, through raymoe's routers, and at `/vllm/v1/...` of the same
proxies. Both use the same groups, and the controller counts the load of both.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application


def engine_kwargs(experts: dict[str, Any], *, on_cpu: bool = False) -> dict[str, Any]:
    """vLLM's engine arguments; `experts`: additional_config["raymoe"], see docs/vllm.md."""
    by_device: dict[str, Any] = (
        {"enforce_eager": True, "dtype": "float32", "block_size": 32}
        if on_cpu
        # a full graph cannot wait for experts elsewhere
        else {"compilation_config": {"cudagraph_mode": "PIECEWISE"}, "dtype": "bfloat16"}
    )
    return {
        **by_device,
        "load_format": "raymoe",
        "additional_config": {"raymoe": experts},
        "max_model_len": 1024,
        "max_num_seqs": 64,
    }


def llm_config(model: Path, experts: dict[str, Any], *, on_cpu: bool = False) -> Any:
    """One model, one engine, as ray.serve.llm wants it."""
    from ray.serve.llm import LLMConfig

    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": str(model.resolve())},
        engine_kwargs=engine_kwargs(experts, on_cpu=on_cpu),
        accelerator_config={"kind": "cpu" if on_cpu else "gpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 1} if on_cpu else {"GPU": 1}},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        # on CPUs groups compute on the same cores
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if on_cpu else {}},
    )


def app(model: Path, experts: dict[str, Any], *, on_cpu: bool = False) -> Application:
    """The application: an OpenAI endpoint."""
    from ray.serve.llm import build_openai_app

    return build_openai_app({"llm_configs": [llm_config(model, experts, on_cpu=on_cpu)]})


def experts_of(deployment: str, secret_file: Path | None) -> dict[str, Any]:
    """Where the controller of a deployment in this Ray cluster listens, as the plugin wants it."""
    from actors.controller import find_controller

    controller = ray.get(find_controller(deployment).control_address.remote())
    found = {"controller": ":".join(map(str, controller)), "deployment": deployment}
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:  # then the engine is where the groups are: shared memory
        found["node"] = nodes[0]
    return found if secret_file is None else {**found, "secret_file": str(secret_file)}


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the deployment's checkpoint")
    parser.add_argument("--deployment", default="raymoe", help="the deployment's name")
    parser.add_argument("--secret-file", type=Path, help="its secret; none: from RAYMOE_SECRET")
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument("--cpu", action="store_true", help="with vLLM's CPU build")
    args = parser.parse_args()
    ray.init(args.address, namespace="raymoe")
    experts = experts_of(args.deployment, args.secret_file)
    serve.run(
        app(args.model, experts, on_cpu=args.cpu), name="vllm", route_prefix="/vllm", blocking=True
    )


if __name__ == "__main__":
    main()
