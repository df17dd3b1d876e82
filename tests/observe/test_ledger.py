"""Counters over several gateways, read from any of them, while gateways and controllers come and
go: against the true sum, in random orders."""

from __future__ import annotations

import random
from typing import Any

from raymoe.observe.ledger import Ledger, merged, total

COUNT, HISTOGRAM = "raymoe_generation_tokens_total", "raymoe_e2e_request_latency_seconds"
IN_FLIGHT, ROUTERS = "raymoe_gateway_requests_in_flight", "raymoe_gateway_routers"
RUNNING = "raymoe_router_requests_running"


def entry(seq: int, count: float, **gauges: float) -> dict[str, Any]:
    values: dict[str, Any] = {COUNT: {(): count}, HISTOGRAM: {(): [count, 0.0, count / 2]}}
    return {"seq": seq, "values": {**values, **{f"raymoe_{k}": {(): v} for k, v in gauges.items()}}}


class Gateway:
    def __init__(self, name: str) -> None:
        self.name, self.count, self.seq = name, 0, 0
        self.known: dict[str, Any] = {}

    def ask(self, ledger: Ledger, now: float) -> float | None:
        """The total as this gateway shows it; None: not to be shown yet."""
        self.seq += 1
        self.known = merged(self.known, {self.name: entry(self.seq, self.count)})
        answer = ledger.exchange(self.name, self.known, now)
        self.known = merged(self.known, answer["entries"])
        if not answer["settled"]:
            return None
        value = total(self.known, answer["live"])[COUNT][()]
        assert isinstance(value, float | int)
        return value


def test_what_is_shown_never_falls_and_ends_as_the_true_sum() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        now, made = 0.0, 3
        ledger = Ledger(now, restarted=False)
        gateways = [Gateway(f"g{i}") for i in range(3)]
        ended = 0
        shown = -1.0
        for _ in range(300):
            now += rng.random()
            step = rng.random()
            if step < 0.02:  # a gateway ends, another starts
                gone = gateways.pop(rng.randrange(len(gateways)))
                gone.ask(ledger, now)  # it had spoken after its last request
                ended += gone.count
                gateways.append(Gateway(f"g{made}"))
                made += 1
            elif step < 0.04:  # the controller starts anew; every gateway beats within 2 s
                ledger = Ledger(now, restarted=True)
                for gateway in gateways:
                    assert gateway.ask(ledger, now + 2 * rng.random()) is None
                now += 2
            gateway = rng.choice(gateways)
            gateway.count += rng.randrange(5)
            value = gateway.ask(ledger, now)
            if value is not None:
                assert value >= shown, seed
                shown = value
        for gateway in gateways:
            last = gateway.ask(ledger, now + 10)
        assert last == ended + sum(gateway.count for gateway in gateways)


def test_gauges_are_those_of_living_gateways_and_histograms_add_up() -> None:
    ledger = Ledger(0.0, restarted=False)
    first = entry(1, 4, gateway_requests_in_flight=3, gateway_routers=2)
    first["values"][RUNNING] = {("r0",): 5}
    first["values"]["raymoe_of_a_later_version"] = {(): 1}
    second = entry(1, 6, gateway_requests_in_flight=4, gateway_routers=1)
    second["values"][RUNNING] = {("r0",): 4, ("r1",): 7}
    ledger.exchange("a", {"a": first}, 0.0)
    answer = ledger.exchange("b", {"b": second}, 1.0)
    values = total(answer["entries"], answer["live"])
    assert values[IN_FLIGHT] == {(): 7} and values[ROUTERS] == {(): 1}
    assert values[RUNNING] == {("r0",): 5, ("r1",): 7}
    assert values[HISTOGRAM] == {(): [10, 0.0, 5.0]}
    assert "raymoe_of_a_later_version" not in values
    later = ledger.values(10.5)  # the first has fallen silent
    assert later[IN_FLIGHT] == {(): 4} and later[COUNT] == {(): 10}
    assert ledger.exchange("b", {"a": entry(0, 1)}, 11.0)["entries"]["a"] is first, "older: ignored"
