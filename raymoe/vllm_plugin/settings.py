"""What a user says under `additional_config={"raymoe": {...}}`, which reaches every worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raymoe.config import DeploymentConfig, parse_config
from raymoe.errors import ConfigError

KEY = "raymoe"


class PluginSettings(BaseModel):
    """How an engine finds its experts. The secret comes from `secret_file` or RAYMOE_SECRET."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    controller: str | None = Field(None, description="host:port of the controller's control end")
    controller_file: str | None = Field(
        None, description="file that holds host:port; read at every attempt to connect"
    )
    deployment: str = Field("raymoe", description="name of the deployment whose experts are used")
    node: str = Field(
        "", description="id of this node; groups on the same one are reached by shared memory"
    )
    name: str | None = Field(
        None, description="how controller and groups call the engine; none: by host and process"
    )
    secret_file: str | None = Field(None, description="file with the deployment secret")
    wire_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of hidden states on the wire, as in the deployment"
    )
    mode: Literal["partial", "rows"] = Field(
        "partial",
        description="partial: groups weight and sum their pairs; rows: one row a pair comes back",
    )
    board: str | None = Field(
        None, description="set by a router of raymoe serve: the folder it shares with its workers"
    )
    stall_limit_s: float = Field(
        240.0,
        gt=0,
        description="a step that waits for an expert without a ready replica ends the engine after "
        "this; below vLLM's VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS (300)",
    )

    @model_validator(mode="after")
    def _one_way_to_the_controller(self) -> PluginSettings:
        if (self.controller is None) == (self.controller_file is None):
            raise ValueError("either controller or controller_file is needed")
        if self.controller is not None:
            host_and_port(self.controller)
        return self

    def controller_address(self) -> tuple[str, int]:
        """Where the controller listens now. OSError or ValueError when that is not known."""
        if self.controller is not None:
            return host_and_port(self.controller)
        assert self.controller_file is not None
        return host_and_port(Path(self.controller_file).read_text().strip())

    def deployment_config(self, model: str) -> DeploymentConfig:
        """The part of a deployment's config that an engine of it has to agree with."""
        return parse_config(
            {
                "model": model,
                "name": self.deployment,
                "secret_file": self.secret_file,
                "data_plane": {"wire_dtype": self.wire_dtype, "mode": self.mode},
            },
            source=f"additional_config[{KEY!r}]",
        )


def host_and_port(text: str) -> tuple[str, int]:
    """ "host:port" apart. ValueError when it is not that."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"controller: host:port is needed, got {text!r}")
    return host.strip("[]"), int(port)


def read_settings(additional_config: object) -> PluginSettings:
    """From vLLM's `additional_config`. Raises ConfigError naming every wrong field."""
    data = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if data is None:
        raise ConfigError(
            "load_format='raymoe' needs additional_config={'raymoe': {'controller': 'host:port'}}: "
            "where the controller of the experts listens"
        )
    if not isinstance(data, Mapping):
        raise ConfigError(f"additional_config['raymoe'] must be a mapping, got {data!r}")
    try:
        return PluginSettings.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(
            "wrong settings in additional_config['raymoe']: "
            + "; ".join(_sentence(e) for e in error.errors())
        ) from None


def _sentence(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    what = "unknown setting" if error["type"] == "extra_forbidden" else error["msg"]
    what = what.removeprefix("Value error, ")
    return f"{field}: {what}" if field else what
