"""The device functions of the grouped kernel (raymoe/experts/grouped.py), in Triton.

Letters: D hidden, F expert hidden, P pairs, N tokens, A active experts, M tiles. Imported only
where there is Triton, which comes with torch's CUDA builds.

The weights of an expert are found by address, as the C kernel finds them: replicas come and go
singly and lie where the allocator put them. So a message's experts need no tensor in common.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """`raymoe.experts.activations`, in float32."""
    if ACTIVATION == "silu":
        g = g * tl.sigmoid(g * ALPHA)
    elif ACTIVATION == "quick_gelu":
        g = g * tl.sigmoid(1.702 * g)
    elif ACTIVATION == "gelu":
        g = 0.5 * g * (1.0 + tl.math.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACTIVATION == "relu":
        g = tl.maximum(g, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        g = tl.maximum(g, 0.0)
        g = g * g
    return g


@triton.jit
def up_and_join(
    inner, x, rows, words, tiles_at, D, F,
    GATED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, LIMIT_AFTER: tl.constexpr, UP_SHIFT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inner [P, F] = join(x[rows] @ up): program (tile, block of F).

    words int64: addresses [A, 4] of up, down, up_bias, down_bias; from `tiles_at` on, tiles [M, 3]
    of (active expert, first pair, pairs).
    """
    kind: tl.constexpr = x.dtype.element_ty
    tile = words + tiles_at + 3 * tl.program_id(0)
    address = words + 4 * tl.load(tile)
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    up = tl.load(address).to(tl.pointer_type(kind))
    width = F
    if GATED:
        width = 2 * F
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    held, inside = m < count, n < F
    token = tl.load(rows + first + m, mask=held, other=0).to(tl.int64)
    from_x = x + token[:, None] * D + k[None, :]
    from_up = up + k[:, None] * width + n[None, :]
    from_up = tl.multiple_of(from_up, (16, 16))
    gate = tl.zeros((BM, BN), dtype=tl.float32)
    above = tl.zeros((BM, BN), dtype=tl.float32)
    for at in range(0, D, BK):
        left = k < D - at
        a = tl.load(from_x, mask=held[:, None] & left[None, :], other=0.0)
        weights = left[:, None] & inside[None, :]
        if GATED:
            b = tl.load(from_up, mask=weights, other=0.0)
            gate = tl.dot(a, b, gate, input_precision=PRECISION)
            b = tl.load(from_up + F, mask=weights, other=0.0)
        else:
            b = tl.load(from_up, mask=weights, other=0.0)
        above = tl.dot(a, b, above, input_precision=PRECISION)
        from_x += BK
        from_up += BK * width
    if BIAS:
        bias = tl.load(address + 2).to(tl.pointer_type(kind))
        if GATED:
            gate += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
            bias += F
        above += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if LIMIT >= 0:
            above = tl.minimum(tl.maximum(above, -LIMIT), LIMIT)
            if not LIMIT_AFTER:
                gate = tl.minimum(gate, LIMIT)
        gate = _activate(gate, ACTIVATION, ALPHA)
        if LIMIT >= 0 and LIMIT_AFTER:
            gate = tl.minimum(gate, LIMIT)
        joined = gate * (above + UP_SHIFT)
    else:
        joined = _activate(above, ACTIVATION, 1.0)
    to = inner + (first + m).to(tl.int64)[:, None] * F + n[None, :]
    tl.store(to, joined.to(kind), mask=held[:, None] & inside[None, :])


@triton.jit
def down(
    out, inner, words, tiles_at, D, F,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [P, D] = inner [P, F] @ down: program (tile, block of D)."""
    kind: tl.constexpr = inner.dtype.element_ty
    tile = words + tiles_at + 3 * tl.program_id(0)
    address = words + 4 * tl.load(tile)
    first, count = tl.load(tile + 1), tl.load(tile + 2)
    weight = tl.load(address + 1).to(tl.pointer_type(kind))
    m = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    held, inside = m < count, n < D
    pair = (first + m).to(tl.int64)
    from_inner = inner + pair[:, None] * F + k[None, :]
    from_weight = weight + k[:, None] * D + n[None, :]
    from_weight = tl.multiple_of(from_weight, (16, 16))
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for at in range(0, F, BK):
        left = k < F - at
        a = tl.load(from_inner, mask=held[:, None] & left[None, :], other=0.0)
        b = tl.load(from_weight, mask=left[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        from_inner += BK
        from_weight += BK * D
    if BIAS:
        bias = tl.load(address + 3).to(tl.pointer_type(kind))
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = out + pair[:, None] * D + n[None, :]
    tl.store(to, total.to(kind), mask=held[:, None] & inside[None, :])


@triton.jit
def weigh(out, of_pair, weights, order, bounds, D, BN: tl.constexpr):
    """out [N, D] = sums in float32 of weight * of_pair [P, D] over the pairs of each token.

    order int32 [P]: pairs by token; bounds int32 [N + 1]: where each token's begin. Program (token,
    block of D). Always in the same order, so that the same message gives the same sums.
    """
    token = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < D
    total = tl.zeros((BN,), dtype=tl.float32)
    for at in range(tl.load(bounds + token), tl.load(bounds + token + 1)):
        pair = tl.load(order + at).to(tl.int64)
        row = tl.load(of_pair + pair * D + n, mask=inside, other=0.0)
        total += tl.load(weights + pair) * row.to(tl.float32)
    to = out + token.to(tl.int64) * D + n
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)
