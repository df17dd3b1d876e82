"""One group of four three times as slow, traffic that turns to other experts: what planning by
measured speeds brings where experts take the time. The real decisions and the real split of each
batch; groups, loads and seconds are simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.publisher import with_terms
from actors.speeds import SpeedBook
from placement.fake import FakeFleet
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig, Reconciler
from placement.split import TableSplit
from tests.placement.fleets import fleet

LAYERS, EXPERTS, TOP_K, STREAMS = 3, 64, 4, 8
SLOWDOWN = np.array([1.0, 1.0, 1.0, 3.0])
ALPHA_S, PAIR_S, EXPERT_S, ROUTER_S = 2e-4, 5e-5, 1e-3, 3e-3  # decoding reads weights
IDS = ("g0", "g1", "g2", "g3")
DOMAIN_S = 20.0


@dataclass
class Rate:
    """Tokens/s before and after the traffic has turned."""

    first: float
    second: float


def play(live: bool, by_speed: bool) -> Rate:
    rng = np.random.default_rng(0)
    odds = rng.gumbel(size=(2, LAYERS, EXPERTS))  # what a domain likes
    mind = Reconciler(
        config=ReconcileConfig(
            plan=PlanConfig(horizon_s=60.0, margin=0.01), plan_every_s=5.0, live=live
        )
    )
    book = SpeedBook()
    spec = fleet(groups=4, layers=LAYERS, slots=90)
    fake = FakeFleet(spec, LAYERS, EXPERTS)
    now = 0.0
    _settle(mind, fake, now, None, 0.0)
    rates = []
    for domain in range(2):
        until, tokens = now + DOMAIN_S, 0
        while now < until:
            assert fake.table is not None
            measured = book.measured(dict.fromkeys(IDS, "a"))
            split = TableSplit(with_terms(fake.table, measured if by_speed else {}))
            counts, since = np.zeros((LAYERS, EXPERTS)), now
            told: dict[str, list[tuple[int, int, float]]] = {i: [] for i in IDS}
            while now < since + 2.0:
                step_s = ROUTER_S
                for layer in range(LAYERS):
                    luck = rng.gumbel(size=(STREAMS, EXPERTS))
                    ids = np.argsort(-(odds[domain, layer] + luck), axis=1)[:, :TOP_K]
                    chosen = np.bincount(ids.ravel(), minlength=EXPERTS)
                    counts[layer] += chosen
                    cut = split.split(layer, chosen)  # [E, G]
                    pairs, active = cut.sum(0), (cut > 0).sum(0)
                    took = ALPHA_S * (pairs > 0) + PAIR_S * pairs + EXPERT_S * active
                    took = took * SLOWDOWN
                    step_s += float(took.max())
                    for g in np.flatnonzero(pairs):
                        told[IDS[g]].append((int(pairs[g]), int(active[g]), float(took[g])))
                now += step_s
                tokens += STREAMS
            for group, samples in told.items():
                book.add(group, "a", samples, now)
            if by_speed:
                known = book.measured(dict.fromkeys(IDS, "a"))
                for g, group in enumerate(IDS):
                    if group in known:
                        fake.slow(group, known[group].speed / fake.fleet.groups[g].speed)
            _settle(mind, fake, now, counts, now - since)
        rates.append(tokens / DOMAIN_S)
    return Rate(*rates)


def _settle(
    mind: Reconciler, fake: FakeFleet, now: float, counts: np.ndarray | None, window_s: float
) -> None:
    """Decide and execute until nothing is left to do; loads take no time."""
    for _ in range(500):
        actions = mind.step(fake.snapshot(counts, window_s), now)
        counts, window_s = None, 0.0
        fake.execute(actions, now)
        fake.advance(now + 1.0)
        if not actions:
            return
    raise AssertionError("it does not come to rest")


def test_a_slow_group_holds_the_others_up_less_when_speeds_are_measured() -> None:
    static, blind, measured = play(False, False), play(True, False), play(True, True)
    assert measured.second > 1.3 * static.second
    assert measured.second > 1.2 * blind.second
    assert measured.first > 1.2 * static.first
    print(f"static {static}, blind to speeds {blind}, measured {measured}")
