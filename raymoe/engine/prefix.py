"""Names of KV blocks by what is in them: all tokens from the start to the end of the block.

Keys and values of a position depend on the tokens up to it, on the model and on nothing else: an
engine has one model, its attention is causal, and rotary embeddings whose frequencies depend on
the company are not used (`facts.longest_context`). So equal names mean equal blocks.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array

from raymoe.engine.sequence import Sequence


class PrefixChain:
    """Chained hashes of full blocks: BLAKE2b of a block's tokens, keyed by the name before.

    The first key is random, so that nobody can make two prompts with the same names.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._root = secrets.token_bytes(16)

    def keys(self, sequence: Sequence, blocks: int) -> list[bytes]:
        """Names of the first `blocks` blocks, all of them full; remembered by the sequence."""
        known = sequence.keys
        size = self._block_tokens
        for start in range(len(known) * size, blocks * size, size):
            tokens = array("q", sequence.tokens[start : start + size])
            before = known[-1] if known else self._root
            known.append(hashlib.blake2b(tokens, digest_size=16, key=before).digest())
        return known[:blocks]

    def key_at(self, sequence: Sequence, position: int) -> bytes | None:
        """The name of the block of `position`, None when the tokens do not fill it."""
        block = position // self._block_tokens
        if (block + 1) * self._block_tokens > len(sequence.tokens):
            return None
        return self.keys(sequence, block + 1)[-1]

    def reusable(self, sequence: Sequence) -> int:
        """How many leading blocks a sequence may take from others instead of computing them.

        Its last token is computed in any case, for the logits, and so are prompt tokens whose log
        probabilities are wanted and not there yet.
        """
        tokens = len(sequence.tokens) - 1
        if sequence.sampling.prompt_logprobs is not None:
            read = len(sequence.prompt_logprobs)
            if read < sequence.prompt_tokens - 1:
                tokens = read
        return tokens // self._block_tokens
