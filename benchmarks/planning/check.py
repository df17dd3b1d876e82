"""Is our EPLB the published one? Against DeepSeek's README example, and vLLM's default policy.

python -m benchmarks.planning.check       (with vLLM installed: compares with its code too)
"""

from __future__ import annotations

import numpy as np

from benchmarks.planning.eplb import eplb, eplb_hierarchical

README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)
README_PLAN = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def check_baseline() -> None:
    """Prints what was compared and what came of it."""
    same = eplb_hierarchical(README_LOAD, 16, 4, 2, 8).tolist() == README_PLAN
    print(f"EPLB's README example: {'reproduced' if same else 'NOT REPRODUCED'}")
    try:
        import torch
        from vllm.distributed.eplb.policy import EPLB_POLICIES  # type: ignore[import-not-found]
    except ImportError:
        print("vLLM is not installed here: not checked against its EPLB_POLICIES['default']")
        return
    policy = EPLB_POLICIES["default"]
    found = np.asarray(policy.rebalance_experts(torch.tensor(README_LOAD), 16, 4, 2, 8))
    print(f"vLLM's default policy: {'equal' if found.tolist() == README_PLAN else 'DIFFERENT'}")
    rng, equal = np.random.default_rng(0), 0
    for _ in range(50):
        load = rng.lognormal(0, 1, (3, 32))
        plan = np.asarray(policy.rebalance_experts(torch.tensor(load), 40, 1, 1, 8))
        equal += np.allclose(_loads(_shares(plan, 32, 8), load), _loads(eplb(load, 5, 8), load))
    print(f"vLLM's default policy, 3 x 32 experts on 8 groups: same group loads in {equal} of 50")


def _shares(plan: np.ndarray, experts: int, groups: int) -> np.ndarray:
    """plan int [L, slots], an expert for each slot -> share [L, E, G]."""
    share = np.zeros((len(plan), experts, groups))
    for layer, row in enumerate(plan):
        copies = np.bincount(row, minlength=experts)
        np.add.at(share[layer], (row, np.arange(len(row)) * groups // len(row)), 1 / copies[row])
    return share


def _loads(share: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Tokens of each layer's groups, sorted: which group has which number does not matter."""
    return np.sort(np.einsum("leg,le->lg", share, load), axis=1)


if __name__ == "__main__":
    check_baseline()
