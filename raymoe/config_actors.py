"""Settings of groups, routers and gateways; to be imported from `raymoe.config`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from raymoe.config_base import MIB, Checked, custom_resources, torch_device


def _route(prefix: str) -> str:
    if not re.fullmatch(r"/|(/[A-Za-z0-9._~-]+)+", prefix):
        raise ValueError(f"must be / or like /demo, without a slash at its end, got {prefix!r}")
    return prefix


class GroupsConfig(Checked):
    """Expert groups of one kind: `count` Ray actors, one a device, alike in everything."""

    kind: str = Field("default", description="name of the kind, shown in status and metrics")
    count: int = Field(2, ge=1, le=4096, description="how many groups of this kind at start")
    min_count: int = Field(
        1, ge=0, le=4096, description="scaling never leaves fewer groups of this kind"
    )
    max_count: int | None = Field(
        None, ge=1, le=4096, description="scaling never makes more groups of this kind"
    )
    price: float = Field(
        1.0,
        gt=0,
        description="what a group of this kind costs, in any unit: autoscaling adds the kind that "
        "is fastest for its price, as measured",
    )
    memory_bytes: int | None = Field(
        None, gt=0, description="expert bytes a group may hold; none: its share of the model + 25 %"
    )
    device: Annotated[str, AfterValidator(torch_device)] = Field(
        "cpu", description="torch device of the experts: cpu, cuda or cuda:N"
    )
    num_cpus: float = Field(1.0, ge=0, description="Ray CPUs a group asks for")
    num_gpus: float = Field(0.0, ge=0, description="Ray GPUs a group asks for")
    resources: Annotated[dict[str, float], AfterValidator(custom_resources)] = Field(
        default_factory=dict, description="custom Ray resources a group asks for"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels a group asks for"
    )
    vllm_kernels: bool = Field(
        False,
        description="on CUDA: time vLLM's fused_experts beside raymoe's own kernels, for which a "
        "group imports vLLM (seconds, memory); on the CPU vLLM's kernel is timed in any case",
    )
    slowdown: float = Field(
        1.0, ge=1.0, description="for tests: the group takes this many times as long"
    )

    @model_validator(mode="after")
    def _count_within_bounds(self) -> GroupsConfig:
        most = self.count if self.max_count is None else self.max_count
        if not self.min_count <= self.count <= most:
            raise ValueError(
                f"count is {self.count}; it must lie between min_count ({self.min_count}) and "
                f"max_count ({self.max_count})"
            )
        return self


class RoutersAutoscaling(Checked):
    """Routers by how many requests there are: Ray Serve's autoscaling, with its names (its replicas
    are routers here). Off until `max_replicas` is set."""

    max_replicas: int | None = Field(
        None, ge=1, le=256, description="most routers; none: always `routers.count`"
    )
    min_replicas: int = Field(1, ge=1, le=256, description="fewest routers")
    target_ongoing_requests: float = Field(
        32.0,
        gt=0,
        description="requests, running or waiting, that each router is to have on average",
    )
    look_back_period_s: float = Field(
        30.0, gt=0, le=3600, description="they are averaged over so long"
    )
    upscale_delay_s: float = Field(
        30.0, ge=0, description="more routers are wanted for so long before there are more"
    )
    downscale_delay_s: float = Field(
        600.0, ge=0, description="fewer routers are wanted for so long before there are fewer"
    )

    @model_validator(mode="after")
    def _in_order(self) -> RoutersAutoscaling:
        if self.max_replicas is None:
            for name, field in type(self).model_fields.items():
                if getattr(self, name) != field.default:
                    raise ValueError(f"{name} has no effect: set max_replicas too")
        elif self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})"
            )
        return self


class RoutersConfig(Checked):
    """Router actors: the dense part, the gate, continuous batching."""

    count: int = Field(
        1, ge=1, le=256, description="how many routers share the groups; at start, if they scale"
    )
    autoscaling: RoutersAutoscaling = RoutersAutoscaling()
    drain_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="a router that is to end works on its open requests for so long at most; then "
        "other routers go on with them",
    )
    num_cpus: float = Field(1.0, ge=0, description="Ray CPUs a router asks for")
    num_gpus: float = Field(0.0, ge=0, description="Ray GPUs a router asks for")
    resources: Annotated[dict[str, float], AfterValidator(custom_resources)] = Field(
        default_factory=dict, description="custom Ray resources a router asks for"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels a router asks for"
    )
    device: Annotated[str, AfterValidator(torch_device)] = Field(
        "cpu", description="torch device of the dense part and its KV cache: cpu, cuda or cuda:N"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the dense part and its KV cache"
    )
    kv_bytes: int = Field(512 * MIB, gt=0, description="bytes of the paged KV cache")
    block_tokens: int = Field(16, ge=1, le=1024, description="tokens a KV block holds")
    max_batch: int = Field(64, ge=1, description="requests in one step at most")
    chunk_tokens: int = Field(512, ge=1, description="prefill tokens in one step at most")
    microbatch_tokens: int | None = Field(
        None,
        ge=0,
        description="steps of at least twice so many tokens run as two micro-batches that take "
        "turns, one computed while the other waits for experts; 0: never; none: 128 on CPUs, "
        "else 0",
    )
    prefix_cache: bool = Field(
        True, description="requests whose prompts begin alike share KV blocks of the beginning"
    )
    max_context_tokens: int | None = Field(
        None, ge=1, description="context limit; none: the model's own"
    )
    max_waiting: int | None = Field(
        None,
        ge=0,
        description="requests a router lets wait before it refuses more (429); none: as many as "
        "`max_batch`, so that whoever is let in waits for one batch to end at most",
    )

    @property
    def max_requests(self) -> int:
        """What a router takes in before it refuses: those that run and those that wait."""
        return self.max_batch + (self.max_batch if self.max_waiting is None else self.max_waiting)

    @property
    def most(self) -> int:
        """How many there can be at once."""
        return self.autoscaling.max_replicas or self.count

    @model_validator(mode="after")
    def _count_within_bounds(self) -> RoutersConfig:
        fewest, most = self.autoscaling.min_replicas, self.autoscaling.max_replicas
        if most is not None and not fewest <= self.count <= most:
            raise ValueError(
                f"count is {self.count}; it must lie between autoscaling.min_replicas ({fewest}) "
                f"and autoscaling.max_replicas ({most})"
            )
        return self


class GatewayConfig(Checked):
    """The OpenAI endpoint (Ray Serve ingress)."""

    host: str = Field("127.0.0.1", description="address the endpoint listens on")
    port: int = Field(8000, ge=1, le=65535, description="port the endpoint listens on")
    grpc_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="port for gRPC, on the same address; none: no gRPC (docs/grpc.md)",
    )
    route_prefix: Annotated[str, AfterValidator(_route)] = Field(
        "/",
        description="path before /v1 and all other routes; several deployments of one cluster "
        "need different ones",
    )
    count: int = Field(1, ge=1, le=256, description="gateway replicas")
    num_cpus: float = Field(0.5, ge=0, description="Ray CPUs a gateway asks for")
    resources: Annotated[dict[str, float], AfterValidator(custom_resources)] = Field(
        default_factory=dict, description="custom Ray resources a gateway asks for"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels a gateway asks for"
    )
    model_name: str | None = Field(
        None, description="name in /v1/models; none: the checkpoint folder's name"
    )
    max_in_flight: int = Field(
        512,
        ge=1,
        description="requests at once in one gateway before it answers 429; routers that are full "
        "refuse earlier (`routers.max_waiting`)",
    )
    router_wait_s: float = Field(
        30.0, ge=0, description="how long a request waits for a router before 503"
    )
    request_timeout_s: float = Field(
        600.0, gt=0, description="a request not finished by then ends with an error"
    )
    drain_s: float = Field(
        3.0, ge=0, le=10, description="how long a stop waits for open requests to finish"
    )
    admin_token_file: str | None = Field(
        None,
        description="file with the token that POST /scale and /drain need as `Authorization: "
        "Bearer TOKEN`; none: the variable RAYMOE_ADMIN_TOKEN, or no token is needed",
    )
