"""Where a client's time goes: the parts add up to the whole."""

from __future__ import annotations

import numpy as np
import pytest

from tests.client.test_expert_client import answer, check, draw_batch, make_client, random_fleet


def test_layers_and_groups_add_up_to_the_totals() -> None:
    rng = np.random.default_rng(5)
    fleet = random_fleet(rng, 3, 8, 2, [answer, answer])
    client = make_client(fleet)
    try:
        client.set_table(fleet.table(1))
        for layer, tokens in ((0, 4), (2, 9), (0, 1), (2, 30)):
            check(client, layer, draw_batch(rng, tokens, 2, 8))
        stats = client.stats
        assert [row[0] for row in stats.layers] == [2, 0, 2]
        assert stats.layers[1] == [0, 0.0, 0.0, 0.0]
        for column, total in ((1, stats.dispatch_s), (2, stats.wait_s), (3, stats.combine_s)):
            assert sum(row[column] for row in stats.layers) == pytest.approx(total)
        assert stats.batches == 4
        assert sum(stats.pairs.values()) == 2 * (4 + 9 + 1 + 30)
        assert set(stats.pairs) == set(stats.busy_s) == set(stats.answers) <= {"g0", "g1"}
        assert all(stats.busy_s[one] <= stats.latency_s[one] for one in stats.answers)
    finally:
        client.close()
