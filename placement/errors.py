"""What placement/ raises when the caller asked for something impossible."""

from __future__ import annotations


class PlacementError(ValueError):
    """The load, the fleet or the plan is impossible. One argument: a sentence saying what to do."""


class DoesNotFit(PlacementError):
    """The fleet is too small. Arguments: the sentence, and by how many bytes."""

    def __init__(self, message: str, missing_bytes: int) -> None:
        super().__init__(message, missing_bytes)
        self.message = message
        self.missing_bytes = missing_bytes

    def __str__(self) -> str:
        return self.message
