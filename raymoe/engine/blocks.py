"""The pool of KV blocks: which are free, and who may have them."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Counts `blocks` blocks of `block_tokens` tokens each. Pure book-keeping, no tensors.

    Block 0 is never handed out: tables are padded with it, and it always holds zeros.
    """

    def __init__(self, blocks: int, block_tokens: int, extra_blocks: int = 0) -> None:
        """`extra_blocks` are what a sequence takes besides those of its tokens."""
        self._extra_blocks = extra_blocks
        self.block_tokens = block_tokens
        self.blocks = blocks
        # Popped from the end, so that low ids go first and neighbours often stay together.
        self._free = list(range(blocks - 1, 0, -1))
        self._fresh: list[int] = []

    @property
    def capacity_tokens(self) -> int:
        return max(0, self.blocks - 1 - self._extra_blocks) * self.block_tokens

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.blocks - 1 - len(self._free)

    def blocks_of(self, tokens: int) -> int:
        """How many blocks a sequence of `tokens` tokens takes."""
        return -(-tokens // self.block_tokens) + self._extra_blocks

    def can_take(self, count: int) -> bool:
        return count <= len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks; the caller has asked `can_take`."""
        assert self.can_take(count), (count, len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        self._fresh.extend(taken)
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        self._free.extend(reversed(list(blocks)))
        assert len(self._free) < self.blocks, "a block was given back twice"

    def drain_fresh(self) -> list[int]:
        """Blocks taken since the last call: to be zeroed before a step reads them."""
        fresh, self._fresh = self._fresh, []
        return fresh
