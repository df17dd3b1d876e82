"""The pool of KV blocks: who holds which, which may be shared, which are given up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Rows


class BlockPool:
    """Counts `blocks` blocks of `block_tokens` tokens each. Pure book-keeping, no tensors.

    Block 0 is never handed out: tables are padded with it, and it always holds zeros.

    A full block whose keys and values are final may be published under a key (`PrefixChain`);
    sequences with the same tokens then hold it together. A published block that nobody holds stays
    until its place is needed; the one that was let go of first goes first.
    """

    def __init__(self, blocks: int, block_tokens: int, extra_blocks: int = 0) -> None:
        """`extra_blocks` are what a sequence takes besides those of its tokens."""
        self._extra_blocks = extra_blocks
        self.block_tokens = block_tokens
        self.blocks = blocks
        # Popped from the end, so that low ids go first and neighbours often stay together.
        self._free = list(range(blocks - 1, 0, -1))
        self._fresh: list[int] = []
        self._holders = [0] * blocks
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, held by nobody

    @property
    def capacity_tokens(self) -> int:
        return max(0, self.blocks - 1 - self._extra_blocks) * self.block_tokens

    @property
    def free(self) -> int:
        """Blocks that can be taken: empty ones, and idle ones that would be given up."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.blocks - 1 - self.free

    @property
    def published(self) -> int:
        """Blocks that can be found by their key."""
        return len(self._block_of_key)

    def blocks_of(self, tokens: int) -> int:
        """How many blocks a sequence of `tokens` tokens takes."""
        return -(-tokens // self.block_tokens) + self._extra_blocks

    def can_take(self, count: int, besides: Iterable[int] = ()) -> bool:
        """Whether `count` blocks can be taken while the idle ones of `besides` stay."""
        return count + sum(block in self._idle for block in besides) <= self.free

    def take(self, count: int) -> list[int]:
        """`count` blocks; the caller has asked `can_take`."""
        assert self.can_take(count), (count, self.free)
        taken = [self._free.pop() if self._free else self._give_up() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        self._fresh.extend(taken)
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """One holder less of each. The later blocks of a prefix are of use to fewer: they go to
        the front of those to be given up."""
        for block in reversed(list(blocks)):
            assert self._holders[block] > 0, "a block was given back twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of_block:
                self._idle[block] = None
            else:
                self._free.append(block)

    def drain_fresh(self) -> list[int]:
        """Blocks taken since the last call: to be zeroed before a step reads them."""
        fresh, self._fresh = self._fresh, []
        return fresh

    # -- sharing -----------------------------------------------------------------------------

    def publish(self, block: int, key: bytes) -> None:
        """Let a held block be found; of two blocks with the same key the first one counts."""
        assert self._holders[block] > 0 and block not in self._key_of_block
        if key not in self._block_of_key:
            self._block_of_key[key] = block
            self._key_of_block[block] = key

    def find(self, keys: Rows[bytes]) -> list[int]:
        """Published blocks of the leading keys, up to the first that is not there."""
        found = []
        for key in keys:
            block = self._block_of_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """One holder more of each published block."""
        for block in blocks:
            assert block in self._key_of_block
            self._holders[block] += 1
            self._idle.pop(block, None)

    def _give_up(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of_key[self._key_of_block.pop(block)]
        return block
