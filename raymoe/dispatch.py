"""Pairs of one layer's batch -> messages for groups, and replies -> rows. Pure array maths.

A batch of T tokens has P = T * K pairs; pair p belongs to token p // K and wants one expert.
Steps: count (E bins), give every pair a group, sort the pairs by (group, part, expert) and cut the
sorted list into messages. `part` numbers the stretches of consecutive tokens that fit one slot.
Nothing here loops over tokens or experts; the only loops are over messages. Where there
is a C compiler raymoe/arena.py does the same, and is tested against this file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from raymoe.arena import Arena

Ints = npt.NDArray[np.int64]
MessageArrays = tuple[Ints, Ints, Ints, Ints, Ints]
"""pairs, tokens, token_of_pair, experts, counts"""


class Message:
    """What one group is asked in one message. n experts, N tokens, P pairs of this message.

    Its arrays are made here by `cut_messages`, or lie in the arena of a native cut
    (raymoe/arena.py) and are looked at only where numpy needs them.
    """

    __slots__ = (
        "_arrays",
        "arena",
        "expert_count",
        "group",
        "number",
        "pair_count",
        "token_count",
    )

    def __init__(
        self,
        group: int,
        counts: tuple[int, int, int],
        arrays: MessageArrays | None,
        arena: Arena | None = None,
        number: int = 0,
    ) -> None:
        """counts (P, N, n); `arrays`, or an arena and the number of its record."""
        self.group = group
        self.pair_count, self.token_count, self.expert_count = counts
        self._arrays = arrays
        self.arena = arena
        self.number = number

    def _made(self) -> MessageArrays:
        if self._arrays is None:
            assert self.arena is not None
            self._arrays = self.arena.arrays(self.number)
        return self._arrays

    @property
    def pairs(self) -> Ints:
        """[P] numbers of the batch's pairs, sorted by expert."""
        return self._made()[0]

    @property
    def tokens(self) -> Ints:
        """[N] rows of the batch, ascending, each once."""
        return self._made()[1]

    @property
    def token_of_pair(self) -> Ints:
        """[P] index into `tokens`."""
        return self._made()[2]

    @property
    def experts(self) -> Ints:
        """[n] ascending."""
        return self._made()[3]

    @property
    def counts(self) -> Ints:
        """[n] pairs of each expert; sums to P."""
        return self._made()[4]


def _message(group: int, *arrays: Ints) -> Message:
    pairs, tokens, _, experts, _ = arrays
    return Message(group, (len(pairs), len(tokens), len(experts)), arrays)  # type: ignore[arg-type]


def count_experts(expert_of_pair: Ints, experts: int) -> Ints:
    """Pairs of each expert: int64 [E]."""
    return np.bincount(expert_of_pair, minlength=experts)


def spread_over_replicas(expert_of_pair: Ints, by_group: Ints) -> Ints:
    """Give every pair a group so that expert e sends `by_group[e, g]` pairs to group g.

    expert_of_pair int64 [P], by_group int64 [E, G] whose rows sum to the experts' pair counts
    -> int64 [P]. Pairs of one expert go to groups in ascending order, so neighbouring tokens
    share a group. Pairs of experts whose row is empty get -1.
    """
    experts, groups = by_group.nonzero()  # ascending by expert, then group
    group_of_sorted = groups.repeat(by_group[experts, groups])
    narrow = _narrow(expert_of_pair, len(by_group))
    if len(group_of_sorted) == len(expert_of_pair):
        group_of_pair = np.empty(len(expert_of_pair), dtype=np.int64)
        group_of_pair[narrow.argsort(kind="stable")] = group_of_sorted
        return group_of_pair
    group_of_pair = np.full(len(expert_of_pair), -1, dtype=np.int64)
    served = (by_group.sum(axis=1)[expert_of_pair] > 0).nonzero()[0]
    group_of_pair[served[narrow[served].argsort(kind="stable")]] = group_of_sorted
    return group_of_pair


def cut_messages(
    expert_of_pair: Ints,
    group_of_pair: Ints,
    *,
    top_k: int,
    tokens: int,
    experts: int,
    message_tokens: int,
    pairs: Ints | None = None,
) -> list[Message]:
    """Messages that together carry every pair exactly once.

    expert_of_pair, group_of_pair: int64 [P], every group >= 0. `pairs` [P] numbers these pairs in
    the batch of `tokens` tokens (None: 0..P-1, the whole batch). No message spans more than
    `message_tokens` consecutive tokens of the batch.
    """
    if tokens == 1 and len(set(expert_of_pair.tolist())) == len(expert_of_pair):
        return _cut_one_token(expert_of_pair, group_of_pair, experts, pairs)
    total = len(expert_of_pair)
    token_of_pair = np.arange(total) if pairs is None else pairs
    if top_k > 1:
        token_of_pair = token_of_pair // top_k  # [P]
    box = group_of_pair
    parts = -(-tokens // message_tokens)
    if parts > 1:
        box = box * parts + token_of_pair // message_tokens
    key = box * experts + expert_of_pair  # [P] (group, part, expert)
    order = _narrow(key, None).argsort(kind="stable")
    key = key[order]
    token_of_pair = token_of_pair[order]
    if pairs is not None:
        order = pairs[order]

    # runs of one expert in one message; methods and slices, since np.diff, np.divmod and
    # np.flatnonzero cost 2-8 us each in Python: 36 -> 10 us for one token and one group, 57 -> 35
    # for 32 tokens and two (benchmarks/roundtrip.py)
    changes = (key[1:] != key[:-1]).nonzero()[0]
    runs = len(changes) + 1
    bounds = np.empty(runs + 1, np.int64)  # pairs bounds[i] to bounds[i + 1] are run i
    bounds[0] = 0
    np.add(changes, 1, out=bounds[1:-1])
    bounds[-1] = total
    run_key = key[bounds[:-1]]
    run_count = bounds[1:] - bounds[:-1]
    run_box = run_key // experts
    run_expert = run_key - run_box * experts
    edges = [0, *((run_box[1:] != run_box[:-1]).nonzero()[0] + 1).tolist(), runs]

    messages = []
    for a, b in pairwise(edges):
        first, last = bounds[a], bounds[b]
        rows, index = _unique_tokens(token_of_pair[first:last], tokens)
        messages.append(
            _message(
                int(run_box[a]) // parts,
                order[first:last],
                rows,
                index,
                run_expert[a:b],
                run_count[a:b],
            )
        )
    return messages


_ZERO = np.zeros(1, dtype=np.int64)
_ZEROS = np.zeros(256, dtype=np.int64)
_ONES = np.ones(256, dtype=np.int64)


def _cut_one_token(
    expert_of_pair: Ints, group_of_pair: Ints, experts: int, pairs: Ints | None
) -> list[Message]:
    """The messages of one token with distinct experts: each of its pairs is a run of its own.

    The loop over those few pairs beats the array maths: 4 us against 10 for one group, 7 against
    22 for four (benchmarks/roundtrip.py).
    """
    order = (group_of_pair * experts + expert_of_pair).argsort(kind="stable")
    sorted_experts = expert_of_pair[order]
    groups = group_of_pair[order].tolist()
    if pairs is not None:
        order = pairs[order]
    total = len(groups)
    zeros, ones = _ZEROS, _ONES
    if total > len(zeros):
        zeros, ones = np.zeros(total, np.int64), np.ones(total, np.int64)
    messages = []
    first = 0
    while first < total:
        group, last = groups[first], first + 1
        while last < total and groups[last] == group:
            last += 1
        count = last - first
        messages.append(
            _message(
                group,
                order[first:last],
                _ZERO,
                zeros[:count],
                sorted_experts[first:last],
                ones[:count],
            )
        )
        first = last
    return messages


def _unique_tokens(tokens_of_pairs: Ints, tokens: int) -> tuple[Ints, Ints]:
    """The distinct tokens in ascending order [N], and each pair's index among them [P].

    A mark per token instead of `np.unique`: 3 us against 14 at 8 pairs, 15 against 110 at 4,096.
    """
    marked = np.zeros(tokens, dtype=np.bool_)
    marked[tokens_of_pairs] = True
    rows = marked.nonzero()[0]
    if len(rows) == tokens:
        return rows, tokens_of_pairs
    rank = np.empty(tokens, dtype=np.int64)
    rank[rows] = np.arange(len(rows))
    return rows, rank[tokens_of_pairs]


def _narrow(key: Ints, bound: int | None) -> npt.NDArray[np.integer]:
    """The same keys as uint16 where they fit: numpy sorts those by radix, 8 times faster."""
    if len(key) < 64:
        return key
    if (int(key.max()) + 1 if bound is None else bound) <= 65536:
        return key.astype(np.uint16)
    return key
