"""Cutting a batch into messages in C (raymoe/native/exchange.c), into memory that is used again.

4 us where `raymoe.dispatch.cut_messages` takes 20 for 32 tokens and one group; 50 where it takes
300 for 512 and four (benchmarks/roundtrip.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raymoe.dispatch import Ints, Message, MessageArrays
from raymoe.native import Native

_HEAD = 8
_RECORD = 8
MOST_WORDS = 1 << 24  # a cut that needs more is numpy's


class Arena:
    """The int32 words of one cut. Messages point into it: give it back when all are settled."""

    __slots__ = ("address", "boxes", "pairs", "words")

    def __init__(self, words: int) -> None:
        self.words: npt.NDArray[np.int32] = np.empty(words, np.int32)
        self.address: int = self.words.ctypes.data
        self.pairs = self.boxes = 0  # of the cut it holds

    def arrays(self, number: int) -> MessageArrays:
        """Of message `number`: copies, int64."""
        at = _HEAD + _RECORD * number
        _, first, pairs, tokens, run, runs, _, _ = self.words[at : at + _RECORD].tolist()
        start = _HEAD + _RECORD * self.boxes
        part = self.pairs

        def take(which: int, begin: int, count: int) -> Ints:
            begin += start + which * part
            return self.words[begin : begin + count].astype(np.int64)

        return (
            take(0, first, pairs),
            take(2, first, tokens),
            take(1, first, pairs),
            take(3, run, runs),
            take(4, run, runs),
        )


class Cutter:
    """Cuts batches into arenas of its own. Not thread-safe."""

    def __init__(self, native: Native) -> None:
        self._cut = native.cut
        self._free: list[Arena] = []

    def cut(
        self,
        expert_of_pair: int,
        groups_of: int,
        *,
        by_pair: bool,
        pairs: int,
        top_k: int,
        tokens: int,
        experts: int,
        groups: int,
        message_tokens: int,
        load: int | None = None,
    ) -> list[Message] | None:
        """As `cut_messages` for a whole batch; numbers that end in _of and `load` are addresses.

        expert_of_pair int64 [P]; groups_of int64, a group for each pair (`by_pair`) or for each
        expert; load int64 [E] is counted up. None when some pair has no group (-1) or the cut is
        too large: nothing has been counted then. IndexError for an expert out of range.
        """
        boxes = groups * -(-tokens // message_tokens)
        arena = self._take(_HEAD + boxes * (_RECORD + 2 + experts) + 7 * pairs)
        if arena is None:
            return None
        found = self._cut(
            arena.address, expert_of_pair, groups_of, by_pair, load, pairs, top_k, experts,
            groups, tokens, message_tokens,
        )  # fmt: skip
        if found < 0:
            self._free.append(arena)
            if found == -1:
                raise IndexError(f"an expert that is not one of 0..{experts - 1}")
            return None
        arena.pairs, arena.boxes = pairs, boxes
        records = arena.words[_HEAD : _HEAD + _RECORD * found].tolist()
        messages = []
        for number in range(found):
            group, _, p, n, _, runs, _, _ = records[_RECORD * number : _RECORD * (number + 1)]
            messages.append(Message(group, (p, n, runs), None, arena, number))
        return messages

    def give(self, arena: Arena) -> None:
        """No message of it is used any more."""
        self._free.append(arena)

    def _take(self, words: int) -> Arena | None:
        if words > MOST_WORDS:
            return None
        if self._free:
            arena = self._free.pop()
            if len(arena.words) >= words:
                return arena
        return Arena(max(4096, 1 << (words - 1).bit_length()))
