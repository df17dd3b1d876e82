"""The network to a group is cut without any connection being closed, or carries noise; and is well
again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ExpertClient
from raymoe.group import GroupRuntime
from raymoe.links.link import Endpoint
from raymoe.table import RoutingTable
from tests.group.relay import Relay
from tests.group.small_model import EXPERTS, LAYERS, make_group, write_checkpoint
from tests.group.test_group import check, make_client, table_of, wait_until


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return write_checkpoint(Path(tmp_path_factory.mktemp("experts")))


@pytest.fixture
def groups(spec: ModelSpec) -> Iterator[list[GroupRuntime]]:
    """Two that hold everything."""
    made = [make_group(spec, name) for name in ("near", "far")]
    for group in made:
        for layer in range(LAYERS):
            for expert in range(EXPERTS - layer):
                group.add_from_checkpoint(layer, expert)
    yield made
    for group in made:
        group.close()


@pytest.fixture
def relay(groups: list[GroupRuntime]) -> Iterator[Relay]:
    (tcp,) = (e for e in groups[1].endpoint().endpoints if e.kind == "tcp")
    relay = Relay(tcp.address)
    yield relay
    relay.close()


def through(relay: Relay, routing: RoutingTable) -> RoutingTable:
    """The table with the far group behind the relay only."""
    far = routing.endpoints["far"]
    endpoint = Endpoint(kind="tcp", address=relay.address, node="elsewhere")
    return replace(
        routing, endpoints={**routing.endpoints, "far": replace(far, endpoints=(endpoint,))}
    )


@pytest.fixture
def client(groups: list[GroupRuntime], relay: Relay) -> Iterator[ExpertClient]:
    client = make_client(deadline_floor_s=0.3, first_deadline_s=1.0, connect_timeout_s=1.0)
    client.set_table(through(relay, table_of(groups)))
    wait_until(lambda: client.connected() == ("far", "near"))
    yield client
    client.close()


def test_pairs_go_to_another_replica_while_the_network_is_cut_and_back_when_it_is_not(
    spec: ModelSpec, groups: list[GroupRuntime], relay: Relay, client: ExpertClient
) -> None:
    for seed in range(4):
        check(client, spec, 32, seed % LAYERS, seed)
    wait_until(lambda: groups[1].report().pairs > 0)
    relay.cut.set()
    for seed in range(4, 10):  # each ends, and is right
        check(client, spec, 32, seed % LAYERS, seed)
    assert client.stats.deadlines > 0, "nothing but a deadline tells of a cut network"
    assert "far" not in client.connected()
    # what was held back arrives in the end: at a link that has been given up
    relay.cut.clear()
    wait_until(lambda: client.connected() == ("far", "near"))
    before, made = groups[1].report().pairs, relay.connections
    for seed in range(10, 16):
        check(client, spec, 32, seed % LAYERS, seed)
    wait_until(lambda: groups[1].report().pairs > before)
    assert made >= 2, "a new link, never the old one"


def test_a_group_that_answers_garbage_is_left_and_its_pairs_go_to_another(
    spec: ModelSpec, groups: list[GroupRuntime], relay: Relay, client: ExpertClient
) -> None:
    for seed in range(4):
        check(client, spec, 32, seed % LAYERS, seed)
    wait_until(lambda: groups[1].report().pairs > 0)
    relay.noise.set()
    for seed in range(4, 24):  # nothing of it gets into a sum
        check(client, spec, 32, seed % LAYERS, seed)
    assert client.stats.links_lost > 0
    relay.noise.clear()
    wait_until(lambda: client.connected() == ("far", "near"))
    before = groups[1].report().pairs
    for seed in range(24, 30):
        check(client, spec, 32, seed % LAYERS, seed)
    wait_until(lambda: groups[1].report().pairs > before)
