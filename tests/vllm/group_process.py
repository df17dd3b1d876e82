"""What runs in the process of a group; imports no transformers, so that it starts fast."""

from __future__ import annotations

from collections.abc import Collection
from multiprocessing.connection import Connection

import torch

from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.identity import identity_of
from raymoe.links.server import ServerConfig

SECRET = "a secret of the tests only"
NODE = "n"

Held = Collection[tuple[int, int]]


def serve(spec_json: str, group_id: str, held: Held, pipe: Connection) -> None:
    """A group process: loads (layer, expert) pairs, then adds those it is sent, until None."""
    torch.set_num_threads(1)
    spec = ModelSpec.from_json(spec_json)
    config = DeploymentConfig(model=spec.path)
    shard = ExpertShard(spec, sum(spec.expert_bytes) * spec.experts)
    group = GroupRuntime(
        spec,
        group_id,
        1,
        shard,
        identity_of(config, spec),
        SECRET.encode(),
        node=NODE,
        config=ServerConfig(tcp_host=None),
    )
    more: Held | None = held
    while more is not None:
        for layer, expert in more:
            group.add_from_checkpoint(layer, expert)
        pipe.send(group.endpoint())
        more = pipe.recv()
    group.close()
