"""The baseline of benchmarks/planner.py is DeepSeek's greedy: its README example comes out."""

from __future__ import annotations

import numpy as np

from benchmarks.planning.eplb import eplb, eplb_hierarchical

LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)
README = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    assert eplb_hierarchical(LOAD, 16, 4, 2, 8).tolist() == README


def test_every_group_has_as_many_slots_and_every_copy_the_same_share():
    share = eplb(LOAD, 2, 8)
    np.testing.assert_allclose(share.sum(2), 1)
    assert ((share > 0).sum((0, 1)) <= 4).all()
