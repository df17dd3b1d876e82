"""What became of the plans: for operators, and for the reconciler's own caution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class PlanRecord:
    """One plan that changed something.

    at_s       when, on the reconciler's clock
    trigger    what called for it: "start", "load", "groups", "speed", "memory", "drain",
               "operator"
    promised   part of the layers' time it was to save; None: nothing to compare with
    realised   the same, worked out again from the next window's counts; None: not known yet
    reasons    a sentence for each action
    """

    at_s: float
    trigger: str
    mode: str
    loads: int
    drops: int
    loaded_bytes: int
    loading_s: float
    promised: float | None = None
    realised: float | None = None
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "reasons": list(self.reasons)
        }
