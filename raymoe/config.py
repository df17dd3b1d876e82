"""What can be set, and its defaults: one tree of frozen, checked models.

The same tree comes from `raymoe serve --config FILE.yaml`, from command-line flags on top of it,
and from the `args` of `serve_app:build` in a Serve config. Unknown names fail. Units end a name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from raymoe.errors import ConfigError

GIB = 1 << 30
MIB = 1 << 20


_OWN_FIELDS = {"CPU": "num_cpus", "GPU": "num_gpus"}


def _torch_device(device: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {device!r}")
    return device


def _custom_resources(resources: dict[str, float]) -> dict[str, float]:
    for name, amount in resources.items():
        if name in _OWN_FIELDS:
            raise ValueError(f"{name} is asked for with {_OWN_FIELDS[name]}")
        if not name or amount <= 0:
            raise ValueError(f"needs a name and an amount above 0, got {name!r}: {amount}")
    return resources


def _route(prefix: str) -> str:
    if not re.fullmatch(r"/|(/[A-Za-z0-9._~-]+)+", prefix):
        raise ValueError(f"must be / or like /demo, without a slash at its end, got {prefix!r}")
    return prefix


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GroupsConfig(_Checked):
    """Expert groups of one kind: `count` Ray actors, one a device, alike in everything."""

    kind: str = Field("default", description="name of the kind, shown in status and metrics")
    count: int = Field(2, ge=1, le=4096, description="how many groups of this kind at start")
    min_count: int = Field(
        1, ge=0, le=4096, description="scaling never leaves fewer groups of this kind"
    )
    max_count: int | None = Field(
        None, ge=1, le=4096, description="scaling never makes more groups of this kind"
    )
    memory_bytes: int | None = Field(
        None, gt=0, description="expert bytes a group may hold; none: its share of the model + 25 %"
    )
    device: Annotated[str, AfterValidator(_torch_device)] = Field(
        "cpu", description="torch device of the experts: cpu, cuda or cuda:N"
    )
    num_cpus: float = Field(1.0, ge=0, description="Ray CPUs a group asks for")
    num_gpus: float = Field(0.0, ge=0, description="Ray GPUs a group asks for")
    resources: Annotated[dict[str, float], AfterValidator(_custom_resources)] = Field(
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


class RoutersAutoscaling(_Checked):
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


class RoutersConfig(_Checked):
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
    resources: Annotated[dict[str, float], AfterValidator(_custom_resources)] = Field(
        default_factory=dict, description="custom Ray resources a router asks for"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels a router asks for"
    )
    device: Annotated[str, AfterValidator(_torch_device)] = Field(
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


class GatewayConfig(_Checked):
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
    resources: Annotated[dict[str, float], AfterValidator(_custom_resources)] = Field(
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


class DataPlaneConfig(_Checked):
    """How tokens travel between routers and groups."""

    transport: Literal["auto", "tcp"] = Field(
        "auto",
        description="auto: shared memory within a node, TCP across nodes; tcp: TCP everywhere",
    )
    wire_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of hidden states on the wire"
    )
    mode: Literal["partial", "rows"] = Field(
        "partial",
        description="partial: groups weight and sum their pairs; rows: one row a pair comes back",
    )
    slot_bytes: int = Field(
        4 * MIB, ge=65536, le=GIB, description="bytes of one message slot of a link"
    )
    slots: int = Field(4, ge=2, le=64, description="message slots of a link")
    host: str = Field(
        "127.0.0.1", description="address the TCP ends listen on; `node`: the Ray node's address"
    )
    stall_limit_s: float = Field(
        600.0,
        gt=0,
        description="a request that waits for an expert without a ready replica ends after this",
    )


class AutoscaleConfig(_Checked):
    """How many groups there are, by how busy they are, between a kind's min_count and max_count."""

    enabled: bool = Field(False, description="add and retire groups as the load changes")
    target: float = Field(0.6, gt=0, lt=1, description="part of the groups' time in use to aim at")
    high: float = Field(0.8, gt=0, lt=1, description="groups busier than this: add some")
    low: float = Field(0.4, gt=0, lt=1, description="groups less busy than this: retire one")
    up_after_s: float = Field(10.0, ge=0, description="busy for so long before groups are added")
    down_after_s: float = Field(
        120.0, ge=0, description="little to do for so long before a group is retired"
    )
    cool_down_s: float = Field(60.0, ge=0, description="least time between two decisions")

    @model_validator(mode="after")
    def _in_order(self) -> AutoscaleConfig:
        if not self.low < self.target < self.high:
            raise ValueError("low < target < high is needed")
        return self


class PlacementConfig(_Checked):
    """Where experts go, and how they get there."""

    live: bool = Field(
        True, description="move and replicate experts as the load and the speeds change"
    )
    objective: Literal["time", "tokens"] = Field(
        "time",
        description="time: every group is busy for as long, by measured speeds; tokens: every "
        "group gets as many tokens, as if all were equally fast",
    )
    survive: Literal["none", "group", "node"] = Field(
        "none",
        description="plans leave memory for one of each expert when any one of these is lost",
    )
    copies: int = Field(
        1,
        ge=1,
        le=8,
        description="every expert is kept so many times, in different groups, where memory allows; "
        "2: a lost group costs no wait",
    )
    plan_interval_s: float = Field(
        10.0, gt=0, description="least time between two plans while the groups stay the same"
    )
    window_s: float = Field(2.0, gt=0, description="the load is counted over so long at least")
    horizon_s: float = Field(
        60.0, gt=0, description="for how long a plan is expected to serve: copies must pay by then"
    )
    margin: float = Field(
        0.01, ge=0, lt=1, description="least gain of a copy over its price, as a part of the time"
    )
    interval_bytes: int | None = Field(
        None, ge=0, description="most bytes one plan may copy for gain; none: no limit"
    )
    replica_bytes: int | None = Field(
        None, ge=0, description="most bytes that second and further replicas fill; none: all memory"
    )
    copy_bytes_per_s: float | None = Field(
        500e6,
        gt=0,
        description="a group takes in copies no faster while it serves (and no faster than leaves "
        "requests their cores); none: no limit",
    )
    reserve_experts: int = Field(
        2, ge=0, description="room for this many of the largest experts is kept free in a group"
    )
    interval_s: float = Field(1.0, gt=0, description="the controller looks at the fleet this often")
    unreachable_s: float = Field(
        10.0, gt=0, description="a group that does not answer for so long is ended and replaced"
    )
    restore_s: float = Field(
        0.1, ge=0, description="a group away for so long has its experts restored in others"
    )
    return_s: float = Field(
        60.0,
        ge=0,
        description="the same, when all of them have other replicas that serve: these copies wait "
        "for the group to be back",
    )
    ack_limit_s: float = Field(
        30.0,
        gt=0,
        description="a router that does not take a new table is not waited for longer before "
        "replicas are dropped: what it still asks for is refused and sent elsewhere",
    )
    pending_s: float = Field(
        30.0,
        ge=0,
        description="a start goes on without groups that get no resources for so long, when the "
        "others hold every expert",
    )
    orphan_ttl_s: float = Field(
        600.0, gt=0, description="a group that no controller asks after for so long ends itself"
    )
    load_timeout_s: float = Field(
        600.0,
        gt=0,
        description="start-up gives up when the experts are not loaded by then; a group whose "
        "process takes longer to come up is ended and started anew",
    )
    autoscale: AutoscaleConfig = AutoscaleConfig()


class LoggingConfig(_Checked):
    """What our processes log, and where. The console of `raymoe serve` stays as it is."""

    format: Literal["text", "json"] = Field(
        "text", description="text: for eyes; json: one JSON object a line"
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lines of a lower level are left out"
    )
    requests: bool = Field(
        False, description="a line when a request begins and when it ends, at gateway and router"
    )
    folder: str | None = Field(
        None,
        description="each process writes a file of its own there; none: standard error, which Ray "
        "keeps in its session folder",
    )


class RayConfig(_Checked):
    """The Ray cluster."""

    address: str | None = Field(None, description="cluster to join; none: start Ray locally")
    temp_dir: str | None = Field(None, description="Ray's temporary folder (a short path)")
    metrics: bool = Field(
        True, description="what /metrics shows is exported by Ray's own agents too, as ray_raymoe_*"
    )
    object_store_bytes: int = Field(
        100 * MIB, ge=80 * MIB, description="Ray's object store, when started locally"
    )


class VllmSettings(_Checked):
    """vLLM as the engine of the routers (docs/vllm.md)."""

    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of vLLM's engine by name, e.g. tensor_parallel_size, dtype",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="OpenMP threads of each of vLLM's workers on CPUs"
    )


class DeploymentConfig(_Checked):
    """One deployment: one model, its groups, routers and gateway."""

    model: str = Field(description="checkpoint folder or Hugging Face id")
    engine: Literal["embedded", "vllm"] = Field(
        "embedded",
        description="what runs the dense part in the routers: raymoe's own engine, or vLLM",
    )
    vllm: VllmSettings = VllmSettings()
    name: str = Field(
        "raymoe",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$",
        description="deployment name: part of actor names, routes of control, metrics",
    )
    groups: tuple[GroupsConfig, ...] = Field(
        (GroupsConfig(),), description="expert groups by kind (a number: that many, alike)"
    )
    experts_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="dtype that experts are held and computed in; bfloat16 halves their bytes, and "
        "is slow on CPUs",
    )
    routers: RoutersConfig = RoutersConfig()
    gateway: GatewayConfig = GatewayConfig()
    data_plane: DataPlaneConfig = DataPlaneConfig()
    placement: PlacementConfig = PlacementConfig()
    logging: LoggingConfig = LoggingConfig()
    ray: RayConfig = RayConfig()
    secret_file: str | None = Field(
        None,
        description="file with the deployment secret, the same on every node; none: the variable "
        "RAYMOE_SECRET, else one is made for a local start",
    )

    @model_validator(mode="before")
    @classmethod
    def _number_of_groups(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("groups"), bool):
            raise ValueError("groups: a number or a list of kinds is needed, not true or false")
        if isinstance(data, dict) and isinstance(data.get("groups"), int):
            return {**data, "groups": ({"count": data["groups"]},)}
        return data

    @model_validator(mode="after")
    def _kinds_are_distinct(self) -> DeploymentConfig:
        kinds = [g.kind for g in self.groups]
        if not kinds:
            raise ValueError("groups: at least one kind of group is needed")
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"groups: the kinds must differ, got {kinds}")
        return self

    @model_validator(mode="after")
    def _settings_of_the_engine(self) -> DeploymentConfig:
        if self.engine == "embedded" and self.vllm.engine_args:
            raise ValueError("vllm.engine_args: only with engine: vllm")
        if self.engine == "embedded" and self.vllm.threads != 1:
            raise ValueError("vllm.threads: only with engine: vllm")
        default = RoutersConfig.model_fields["block_tokens"].default
        if self.engine == "vllm" and self.routers.block_tokens != default:
            raise ValueError(
                "routers.block_tokens: with engine: vllm say it in vllm.engine_args.block_size"
            )
        if self.engine == "vllm" and self.routers.microbatch_tokens is not None:
            raise ValueError(
                "routers.microbatch_tokens: vLLM runs its steps as one; leave it out with "
                "engine: vllm"
            )
        if self.engine == "vllm" and self.routers.device != "cpu":
            raise ValueError(
                "routers.device: vLLM runs where its build runs; leave it out with engine: vllm "
                "(and ask for GPUs with routers.num_gpus)"
            )
        return self

    @property
    def served_model_name(self) -> str:
        """The name clients ask for."""
        return self.gateway.model_name or Path(self.model.rstrip("/")).name


def load_config(path: str | None, overrides: dict[str, Any]) -> DeploymentConfig:
    """The config of a YAML or JSON file (or of nothing) with `overrides` on top.

    `overrides` has dotted names, e.g. {"gateway.port": 8001}. Raises `ConfigError` with one
    sentence a wrong field.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text())
        except OSError as e:
            raise ConfigError(f"cannot read the config file {path}: {e.strerror}") from e
        except yaml.YAMLError as e:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of settings, e.g. `model: ./my-model`")
        data = loaded
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{path}: {parent} must be a mapping")
        node[leaf] = value
    return parse_config(data, source=path or "command line")


def parse_config(data: dict[str, Any], source: str) -> DeploymentConfig:
    """Checked config from plain data; raises `ConfigError` naming every wrong field."""
    try:
        return DeploymentConfig.model_validate(data)
    except ValidationError as e:
        wrong = []
        for error in e.errors():
            field = ".".join(str(p) for p in error["loc"]) or "config"
            what = error["msg"].removeprefix("Value error, ")
            if error["type"] == "extra_forbidden":
                what = "unknown setting"
            elif error["type"] == "missing":
                what = "must be set"
            if field == "model" and error["type"] == "missing":
                what += ": a checkpoint folder or a Hugging Face id"
            named = not error["loc"] or what.startswith(field)
            wrong.append(what if named else f"{field}: {what}")
        raise ConfigError(f"wrong settings in {source}: " + "; ".join(wrong)) from e


def read_admin_token(config: DeploymentConfig) -> str | None:
    """The token of the admin routes, from `gateway.admin_token_file` or RAYMOE_ADMIN_TOKEN; None
    when none is set. Raises `ConfigError`."""
    path = config.gateway.admin_token_file
    if path is None:
        return os.environ.get("RAYMOE_ADMIN_TOKEN", "").strip() or None
    try:
        token = Path(path).read_text().strip()
    except OSError as e:
        raise ConfigError(f"cannot read the admin token file {path}: {e.strerror}") from e
    if not token:
        raise ConfigError(f"the admin token file {path} is empty: write a token, or unset it")
    return token


def read_secret(config: DeploymentConfig) -> bytes:
    """The deployment secret, from `secret_file` or RAYMOE_SECRET; raises `ConfigError`."""
    if config.secret_file is not None:
        try:
            secret = Path(config.secret_file).read_bytes().strip()
        except OSError as e:
            raise ConfigError(
                f"cannot read the secret file {config.secret_file}: {e.strerror}"
            ) from e
        where = config.secret_file
    else:
        secret = os.environ.get("RAYMOE_SECRET", "").encode().strip()
        where = "RAYMOE_SECRET"
    if len(secret) < 16:
        raise ConfigError(
            f"{where} must hold the deployment secret, 16 bytes or more, on every node of the "
            "cluster; make one with `python -c 'import secrets; print(secrets.token_hex(32))'`"
        )
    return secret
