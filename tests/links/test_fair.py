"""Who is served next: arithmetic, no sockets."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from raymoe.links.fair import Fairness, FairQueue
from raymoe.links.protocol import PARTIAL, Call


@dataclass(frozen=True)
class Item:
    link_id: int
    call: Call
    arrived_s: float = 0.0


def item(link: int, tokens: int, *, pairs: int = 0, layer: int = 0, at: float = 0.0) -> Item:
    return Item(link, Call(layer, PARTIAL, tokens, 1, pairs or tokens), at)


def queue(**changes: float) -> FairQueue[Item]:
    settings = {"decode_tokens": 64, "quantum_pairs": 100, "max_wait_s": 1.0, "merge_pairs": 1}
    return FairQueue(Fairness(**(settings | changes)))  # type: ignore[arg-type]


def order(waiting: FairQueue[Item], now: float = 0.0) -> list[Item]:
    taken = []
    while len(waiting):
        taken += waiting.pop(now)
    return taken


def test_a_link_that_sends_much_does_not_hold_up_the_others() -> None:
    waiting = queue()
    hog = [item(1, 50) for _ in range(20)]
    for one in hog:
        waiting.push(one)
    small = [item(link, 50) for link in (2, 3)]
    for one in small:
        waiting.push(one)
    served = order(waiting)
    assert max(served.index(one) for one in small) <= 5  # a quantum of each before them
    assert len(served) == 22


def test_links_share_by_pairs_not_by_messages() -> None:
    waiting = queue()
    for _ in range(100):
        waiting.push(item(1, 50, pairs=100))
        for _ in range(4):
            waiting.push(item(2, 25, pairs=25))
    first = order(waiting)[:250]
    pairs = {link: sum(i.call.pairs for i in first if i.link_id == link) for link in (1, 2)}
    assert abs(pairs[1] - pairs[2]) <= 200


def test_decode_goes_before_prefill_until_prefill_has_waited() -> None:
    waiting = queue()
    prefill = [item(1, 500, at=0.0), item(1, 500, at=0.0)]
    decode = [item(2, 1, at=0.5) for _ in range(4)]
    for one in prefill + decode:
        waiting.push(one)
    assert waiting.pop(0.9) == [decode[0]]
    assert waiting.pop(1.1) == [prefill[0]]  # aged
    assert waiting.pop(1.1) == [decode[1]]  # but not two of them in a row
    assert waiting.pop(1.1) == [prefill[1]]
    assert order(waiting, 1.1) == decode[2:]


def test_small_requests_can_be_taken_alone() -> None:
    """In the midst of a large one: those of one layer together, and never another large one."""
    waiting = queue(merge_pairs=100)
    assert waiting.pop_decode() == []
    large = item(1, 500)
    waiting.push(large)
    assert waiting.pop_decode() == []
    small = [item(2, 4, layer=1), item(3, 4, layer=1), item(4, 4, layer=2)]
    for one in small:
        waiting.push(one)
    assert waiting.pop_decode() == small[:2]
    assert waiting.pop_decode() == small[2:]
    assert waiting.pop_decode() == []
    assert (len(waiting), waiting.pairs) == (1, 500)
    assert waiting.pop(0.0) == [large]
    waiting.push(small[0])  # the only one
    assert waiting.pop_decode() == small[:1]
    assert (len(waiting), waiting.pairs, waiting.experts) == (0, 0, 0)


def test_requests_of_one_layer_come_out_together_within_bounds() -> None:
    waiting = queue(merge_pairs=100)
    items = [item(1, 30, layer=1), item(2, 30, layer=1), item(3, 30, layer=2), item(4, 50, layer=1)]
    for one in items:
        waiting.push(one)
    together = waiting.pop(0.0)
    assert together == [items[0], items[1]]  # 50 more would be over 100
    assert order(waiting) == [items[2], items[3]]


def test_a_closed_link_is_forgotten() -> None:
    waiting = queue()
    waiting.push(item(1, 3))
    waiting.drop(2)
    waiting.drop(1)
    assert len(waiting) == 0 and waiting.pairs == 0 and waiting.experts == 0
    for one in (item(1, 3), item(2, 3), item(1, 300)):
        waiting.push(one)
    waiting.drop(1)
    assert order(waiting) == [item(2, 3)] and waiting.pairs == 0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(1, 300),
            st.integers(0, 2),
            st.sampled_from(["", "any", "small"]),
        ),
        max_size=60,
    ),
    st.integers(1, 400),
)
def test_everything_is_served_once_and_in_order_of_its_link(
    pushes: list[tuple[int, int, int, str]], merge: int
) -> None:
    waiting = queue(merge_pairs=merge)
    pushed, served = [], []
    for number, (link, tokens, layer, pop) in enumerate(pushes):
        one = item(link, tokens, layer=layer, at=float(number))
        pushed.append(one)
        waiting.push(one)
        if pop:
            small = pop == "small"
            batch = waiting.pop_decode() if small else waiting.pop(float(number))
            assert len({(i.call.layer, i.call.mode) for i in batch}) == 1 or (small and not batch)
            assert len(batch) == 1 or sum(i.call.pairs for i in batch) <= merge
            served += batch
    served += order(waiting, 1e9)
    assert sorted(served, key=lambda i: i.arrived_s) == pushed
    assert (len(waiting), waiting.pairs, waiting.experts) == (0, 0, 0)
    for link in range(5):
        for small in (True, False):
            mine = [i for i in served if i.link_id == link and (i.call.tokens <= 64) == small]
            assert mine == sorted(mine, key=lambda i: i.arrived_s)
