"""What can be set, and its defaults: one tree of frozen, checked models.

The same tree comes from `raymoe serve --config FILE.yaml`, from command-line flags on top of it,
and from the `args` of `serve_app:build` in a Serve config. Unknown names fail. Units end a name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from raymoe.config_actors import GatewayConfig, GroupsConfig, RoutersAutoscaling, RoutersConfig
from raymoe.config_base import GIB, MIB, Checked
from raymoe.config_placement import AutoscaleConfig, PlacementConfig
from raymoe.errors import ConfigError

__all__ = [
    "AutoscaleConfig",
    "DataPlaneConfig",
    "DeploymentConfig",
    "GatewayConfig",
    "GroupsConfig",
    "LoggingConfig",
    "PlacementConfig",
    "RayConfig",
    "RoutersAutoscaling",
    "RoutersConfig",
    "VllmSettings",
    "load_config",
    "parse_config",
    "read_admin_token",
    "read_secret",
]


class DataPlaneConfig(Checked):
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


class LoggingConfig(Checked):
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


class RayConfig(Checked):
    """The Ray cluster."""

    address: str | None = Field(None, description="cluster to join; none: start Ray locally")
    temp_dir: str | None = Field(None, description="Ray's temporary folder (a short path)")
    metrics: bool = Field(
        True, description="what /metrics shows is exported by Ray's own agents too, as ray_raymoe_*"
    )
    object_store_bytes: int = Field(
        100 * MIB, ge=80 * MIB, description="Ray's object store, when started locally"
    )


class VllmSettings(Checked):
    """vLLM as the engine of the routers (docs/vllm.md)."""

    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments of vLLM's engine by name, e.g. tensor_parallel_size, dtype",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="OpenMP threads of each of vLLM's workers on CPUs"
    )


class DeploymentConfig(Checked):
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
