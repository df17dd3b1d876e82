"""Messages carry every pair exactly once, each with its own token, weight and expert."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.dispatch import count_experts, cut_messages, spread_over_replicas

batches = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([1, 2, 3, 7, 40, 200]),
        "top_k": st.integers(1, 4),
        "experts": st.integers(1, 12),
        "groups": st.integers(1, 5),
        "message_tokens": st.sampled_from([1, 2, 5, 64, 1000]),
        "subset": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(batches)
def test_messages_carry_every_pair_once(batch: dict[str, int]) -> None:
    rng = np.random.default_rng(batch["seed"])
    total = batch["tokens"] * batch["top_k"]
    experts = rng.integers(0, batch["experts"], total)
    groups = rng.integers(0, batch["groups"], total)
    pairs = np.flatnonzero(rng.random(total) < 0.5) if batch["subset"] else np.arange(total)
    if not len(pairs):
        pairs = np.arange(1)
    messages = cut_messages(
        experts[pairs],
        groups[pairs],
        top_k=batch["top_k"],
        tokens=batch["tokens"],
        experts=batch["experts"],
        message_tokens=batch["message_tokens"],
        pairs=pairs if batch["subset"] else None,
    )
    sent = np.concatenate([message.pairs for message in messages])
    assert sorted(sent.tolist()) == pairs.tolist()
    for message in messages:
        assert len(message.tokens) <= batch["message_tokens"]
        assert (np.diff(message.tokens) > 0).all()
        assert (np.diff(message.experts) > 0).all()
        assert (message.counts > 0).all()
        tokens = message.tokens[message.token_of_pair]
        assert set(tokens.tolist()) == set(message.tokens.tolist())
        per_pair_expert = np.repeat(message.experts, message.counts)
        for pair, token, expert in zip(message.pairs, tokens, per_pair_expert, strict=True):
            assert token == pair // batch["top_k"]
            assert expert == experts[pair]
            assert message.group == groups[pair]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_spread_obeys_the_split(pairs: int, experts: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    expert_of_pair = rng.integers(0, experts, pairs)
    counts = count_experts(expert_of_pair, experts)
    assert counts.tolist() == [(expert_of_pair == e).sum() for e in range(experts)]
    lost = rng.random(experts) < 0.2
    by_group = np.stack([rng.multinomial(n, rng.dirichlet(np.ones(groups))) for n in counts])
    by_group[lost] = 0
    group_of_pair = spread_over_replicas(expert_of_pair, by_group)
    for e in range(experts):
        mine = group_of_pair[expert_of_pair == e]
        if lost[e]:
            assert (mine == -1).all()
            continue
        assert (np.diff(mine) >= 0).all()
        assert [(mine == g).sum() for g in range(groups)] == by_group[e].tolist()
