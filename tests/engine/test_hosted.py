"""A dense part on a device over groups: expert groups on the device too, links in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from placement.table import Table
from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.families import load_config, model_class
from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.engine.aside import SettingAside
from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.hosted import HostedExperts
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.links.handshake import Identity
from raymoe.links.link import SlotTerms
from raymoe.links.server import ServerConfig
from raymoe.table import RoutingTable
from tests.checkpoint.parity import NEAR_TIE
from tests.devices import DEVICES
from tests.engine.support import SMALL, Outcome, finish, generate, prompt, request
from tests.zoo import tiny_checkpoint

SECRET = b"a secret of the tests only"
NEW = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("hosted"))


def identity(spec: ModelSpec) -> Identity:
    return Identity(
        deployment="test", fingerprint=spec.fingerprint, wire_dtype="float32", hidden=spec.hidden
    )


@pytest.fixture
def groups(path: Path, device: str) -> Iterator[list[GroupRuntime]]:
    """Three groups; each holds all experts but a third of its own."""
    spec = read_spec(path)
    terms = SlotTerms(request_bytes=64 << 10, reply_bytes=64 << 10)
    made = [
        GroupRuntime(
            spec, name, 1, ExpertShard(spec, 1 << 30, device), identity(spec), SECRET, node="n",
            config=ServerConfig(inproc=True, terms=terms),
        )
        for name in "abc"
    ]  # fmt: skip
    for layer, experts in enumerate(spec.experts_of_layer):
        for expert in range(experts):
            for at, group in enumerate(made):
                if expert % 3 != at:
                    group.add_from_checkpoint(layer, expert)
    yield made
    for group in made:
        group.close()


def routing(groups: list[GroupRuntime], epoch: int) -> RoutingTable:
    resident = np.stack([group.shard.resident() for group in groups], axis=2)
    table = Table(
        term=1, epoch=epoch, group_ids=tuple(group.id for group in groups), resident=resident,
        share=resident / np.maximum(resident.sum(2, keepdims=True), 1),
        speed=np.full(len(groups), 1e6), alpha_s=np.zeros(len(groups)),
        gamma_s=np.zeros(len(groups)),
    )  # fmt: skip
    return RoutingTable(table=table, endpoints={group.id: group.endpoint() for group in groups})


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_the_stock_models_while_a_group_dies_and_experts_move(
    path: Path, device: str, groups: list[GroupRuntime]
) -> None:
    spec = read_spec(path)
    client = ExpertClient(
        identity(spec), SECRET, "n", ClientConfig(stall_limit_s=20.0, deadline_floor_s=10.0)
    )
    stock: Any = model_class(load_config(path)).from_pretrained(path, dtype="float32")
    stock = stock.eval().to(device)
    try:
        client.set_table(routing(groups, 1))
        aside = SettingAside(client)
        model = load_dense(spec, HostedExperts(aside, device), device=device)
        engine = Engine(model, aside, EngineConfig(**SMALL))
        names = [str(n) for n in range(4)]
        for n, name in enumerate(names):
            engine.add(request(name, prompt(5 + 9 * n, n), max_tokens=NEW))
        outcomes = {name: Outcome() for name in names}

        def steps(count: int) -> None:
            for _ in range(count):
                for event in engine.step():
                    outcomes[event.request_id].take(event)

        steps(4)
        groups[0].close()  # its last messages are never answered
        steps(3)
        gone = int(groups[1].shard.resident()[0].argmax())
        groups[2].add_from_checkpoint(0, gone)
        client.set_table(routing(groups[1:], 2))
        groups[1].drop(0, gone)
        steps(3)
        groups[1].add_from_peer(0, gone, groups[2].endpoint())
        finish(engine, outcomes)
        for n, name in enumerate(names):
            tokens, logits = generate(stock, prompt(5 + 9 * n, n), NEW)
            found = outcomes[name].tokens
            assert outcomes[name].finish == "length" and len(found) == NEW
            if found != tokens:
                at = next(at for at in range(NEW) if found[at] != tokens[at])
                best = logits[at].topk(2).values
                assert best[0] - best[1] < NEAR_TIE, f"prompt {n} differs at token {at}"
    finally:
        client.close()


@pytest.mark.parametrize("device", DEVICES)
def test_sums_come_back_to_the_device(device: str) -> None:
    class Doubling:
        def dispatch(self, layer: int, *given: torch.Tensor) -> torch.Tensor:
            assert all(each.device.type == "cpu" for each in given)
            return given[0] * 2 + given[1].sum() + given[2].sum()

        def combine(self, pending: torch.Tensor) -> torch.Tensor:
            return pending

    experts = HostedExperts(Doubling(), device)
    for tokens in (3, 50, 2):
        x = torch.randn(tokens, 8, device=device)
        ids, weights = torch.ones(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2)
        out = experts.combine(experts.dispatch(0, x, ids.to(device), weights.to(device)))
        assert out.device.type == device
        torch.testing.assert_close(out, x * 2 + 4 * tokens)
