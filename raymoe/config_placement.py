"""Settings of placement; to be imported from `raymoe.config`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raymoe.config_base import Checked


class AutoscaleConfig(Checked):
    """How many groups there are, by how busy they are, between a kind's min_count and max_count."""

    enabled: bool = Field(False, description="add and retire groups as the load changes")
    target: float = Field(0.6, gt=0, lt=1, description="part of the groups' time in use to aim at")
    high: float = Field(
        0.8, gt=0, lt=1, description="all groups together busier than this: add some"
    )
    low: float = Field(
        0.4, gt=0, lt=1, description="the busiest group less busy than this: retire one"
    )
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


class PlacementConfig(Checked):
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
