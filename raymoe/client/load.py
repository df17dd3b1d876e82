"""How many pairs each expert was sent: counted by C or by numpy, handed over in one piece."""

from __future__ import annotations

import numpy as np

from raymoe.dispatch import Ints


class Load:
    """Guarded by the client's lock."""

    def __init__(self, layers: int, experts: int) -> None:
        self.shape = layers, experts
        self._counts: Ints = np.zeros(self.shape, np.int64)
        self._address: int = self._counts.ctypes.data

    def address(self, layer: int) -> int:
        """Where the int64 [E] of a layer lie."""
        return self._address + 8 * self.shape[1] * layer

    def add(self, layer: int, counts: Ints) -> None:
        """counts int64 [E]."""
        self._counts[layer] += counts

    def take(self) -> Ints:
        """int64 [L, E] since the last call."""
        counts = self._counts
        self._counts = np.zeros(self.shape, np.int64)
        self._address = self._counts.ctypes.data
        return counts
