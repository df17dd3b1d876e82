"""Counter-based randomness: every draw is a function of where it is made, not of what came before.

A request continued by another router, or computed again after a preemption, therefore draws the
same numbers.
"""

from __future__ import annotations

import hashlib
import struct

_MASK = (1 << 64) - 1


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, fixed by its three arguments.

    Position is the token's index in prompt + output. BLAKE2b as a counter-mode generator: any
    seed is as good as any other, and one draw costs about a microsecond.
    """
    counter = struct.pack("<QQQ", seed & _MASK, choice & _MASK, position & _MASK)
    digest = hashlib.blake2b(counter, digest_size=8, person=b"raymoe").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
