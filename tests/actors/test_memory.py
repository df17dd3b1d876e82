"""What controllers keep in Ray's KV, here a dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.experimental import internal_kv

from actors.head import Head
from actors.memory import Memory


class Store:
    """Ray's KV. `meanwhile`: what somebody else does just after the next `get`."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.meanwhile: Callable[[], Any] | None = None

    def get(self, key: bytes) -> bytes | None:
        value = self.kept.get(key)
        work, self.meanwhile = self.meanwhile, None
        if work is not None:
            work()
        return value

    def put(self, key: bytes, value: bytes, overwrite: bool) -> bool:
        there = key in self.kept
        if overwrite or not there:
            self.kept[key] = value
        return there

    def delete(self, key: bytes, del_by_prefix: bool = False) -> int:
        gone = [k for k in self.kept if k == key or (del_by_prefix and k.startswith(key))]
        for k in gone:
            del self.kept[k]
        return len(gone)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(internal_kv, "_internal_kv_get", store.get)
    monkeypatch.setattr(internal_kv, "_internal_kv_put", store.put)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", store.delete)
    return store


def test_terms_grow(store: Store) -> None:
    memory = Memory("d", Head())
    assert memory.term() == 0
    assert [memory.next_term() for _ in range(3)] == [1, 2, 3]
    assert Memory("d", Head()).term() == 3 and Memory("other", Head()).term() == 0


@pytest.mark.parametrize("others", [1, 3])
def test_no_two_controllers_have_the_same_term(store: Store, others: int) -> None:
    first = Memory("d", Head())
    taken: list[int] = []
    store.meanwhile = lambda: taken.extend(Memory("d", Head()).next_term() for _ in range(others))
    taken.append(first.next_term())
    assert sorted(set(taken)) == list(range(1, others + 2))
    assert first.term() == Memory("d", Head()).term() == others + 1, "and all know the newest"


def test_the_word_of_an_older_one_that_comes_last_hides_no_newer_one(store: Store) -> None:
    memory = Memory("d", Head())
    for _ in range(3):
        memory.next_term()
    store.kept[b"raymoe:d:term"] = b"1"
    assert memory.term() == 3 and memory.next_term() == 4


def test_nothing_is_left_when_it_is_forgotten(store: Store) -> None:
    memory, other = Memory("d", Head()), Memory("d2", Head())
    memory.next_term()
    other.next_term()
    memory.keep_epoch(5)
    memory.keep_intent({"a": 1})
    assert memory.epoch() == 5 and memory.intent() == {"a": 1}
    memory.forget()
    assert memory.term() == memory.epoch() == 0 and memory.intent() is None
    assert other.term() == 1
