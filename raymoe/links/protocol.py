"""The bytes of the data plane: one 64-byte header a message, and the layout of a slot.

Letters: N tokens in this message, n experts in it, P (token, expert) pairs in it, D hidden.

A request region holds, little-endian, in this order:

    expert_ids    int32 [n]     experts of the layer, in the order of their runs of pairs
    counts        int32 [n]     pairs of each expert; they sum to P
    token_of_pair int32 [P]     row of x that a pair reads; pairs are sorted by expert
    weights       float32 [P]   gate weights; only in PARTIAL mode
    padding to a multiple of 64 bytes
    x             wire dtype [N, D]

A reply region holds `out` in the wire dtype: [N, D] partial sums in PARTIAL mode, [P, D] one row a
pair in ROWS mode; for a NACK int32 [n] the experts that are not resident; for an ERROR UTF-8 text.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raymoe.errors import FrameError
from raymoe.native import native

PROTOCOL_VERSION = 1
COMPATIBLE_VERSIONS = (1,)  # N talks to N-1; there is no version 0

MAGIC = b"RMOE"
HEADER_BYTES = 64
MAX_TEXT_BYTES = 2048  # of an ERROR

# kinds
DISPATCH, REPLY, NACK, ERROR, PING, PONG = 1, 2, 3, 4, 5, 6
# modes
PARTIAL, ROWS = 0, 1

_HEADER = struct.Struct("<4sBBHIHHIIIQQQQI")
assert _HEADER.size == HEADER_BYTES
_unpack_from = _HEADER.unpack_from
_pack_into = _HEADER.pack_into


class Header(NamedTuple):
    """What every message begins with. Integers unless said.

    `seq` numbers the requests of a link (u32, wraps); `incarnation` is the group's. A reply repeats
    seq, slot, layer, mode, tokens and pairs of its request. In a reply `experts` counts the
    missing ones (NACK), `busy_ns` is the compute time of this request, `queued_pairs` and
    `queued_experts` the work that waited ahead when it was sent. In a PONG `payload_bytes` is the
    group's progress counter.
    """

    magic: bytes
    kind: int
    mode: int
    slot: int
    seq: int
    layer: int
    queued_experts: int
    tokens: int
    experts: int
    pairs: int
    payload_bytes: int
    epoch: int
    incarnation: int
    busy_ns: int
    queued_pairs: int

    def pack_into(self, buffer: bytearray | memoryview) -> None:
        """Write the 64 bytes at the start of `buffer`."""
        _pack_into(buffer, 0, *self)


def make_header(
    kind: int,
    *,
    mode: int = 0,
    slot: int = 0,
    seq: int = 0,
    layer: int = 0,
    queued_experts: int = 0,
    tokens: int = 0,
    experts: int = 0,
    pairs: int = 0,
    payload_bytes: int = 0,
    epoch: int = 0,
    incarnation: int = 0,
    busy_ns: int = 0,
    queued_pairs: int = 0,
) -> Header:
    """A header of this version; what is not given is 0."""
    return Header(
        MAGIC,
        kind,
        mode,
        slot,
        seq,
        layer,
        queued_experts,
        tokens,
        experts,
        pairs,
        payload_bytes,
        epoch,
        incarnation,
        busy_ns,
        queued_pairs,
    )


def unpack_header(buffer: bytes | bytearray | memoryview) -> Header:
    """The header at the start of `buffer` (64 bytes or more). FrameError when it is not one."""
    header = Header._make(_unpack_from(buffer))
    if header.magic != MAGIC:
        raise FrameError(f"not a raymoe frame: it begins with {header.magic!r}")
    return header


class Call(NamedTuple):
    """The shape of one dispatch message: N tokens, n experts, P pairs of one MoE layer."""

    layer: int
    mode: int
    tokens: int
    experts: int
    pairs: int
    epoch: int = 0

    @property
    def out_rows(self) -> int:
        """Rows of the reply: N in PARTIAL mode, P in ROWS mode."""
        return self.pairs if self.mode == ROWS else self.tokens


_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# numpy has no bfloat16: its rows travel as the 16 bits they are
_CARRIERS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}
WIRE_DTYPES = tuple(_TORCH_DTYPES)


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How one row travels: D elements of `dtype` (a name of WIRE_DTYPES)."""

    hidden: int
    dtype: str
    # plain attributes, not properties: they are read on the hot path
    torch_dtype: torch.dtype = field(init=False)
    carrier: np.dtype[Any] = field(init=False)  # numpy's stand-in for the wire dtype
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.dtype not in _TORCH_DTYPES:
            raise FrameError(f"wire dtype {self.dtype!r} is not one of {', '.join(WIRE_DTYPES)}")
        if self.hidden < 1:
            raise FrameError(f"hidden must be at least 1, not {self.hidden}")
        object.__setattr__(self, "torch_dtype", _TORCH_DTYPES[self.dtype])
        object.__setattr__(self, "carrier", _CARRIERS[self.dtype])
        object.__setattr__(self, "row_bytes", self.hidden * _CARRIERS[self.dtype].itemsize)

    def request_bytes(self, call: Call) -> int:
        """Bytes of a request of this shape, padding included."""
        _, mode, tokens, experts, pairs, _ = call
        return _rows_at(experts, pairs, mode) + tokens * self.row_bytes

    def reply_bytes(self, call: Call) -> int:
        """Bytes that a reply of this shape may take, whatever its kind."""
        _, mode, tokens, experts, pairs, _ = call
        rows_bytes = (pairs if mode == ROWS else tokens) * self.row_bytes
        return max(rows_bytes, 4 * experts, MAX_TEXT_BYTES)


def _rows_at(experts: int, pairs: int, mode: int) -> int:
    """Offset of x in a request region."""
    return (8 * experts + pairs * (8 if mode == PARTIAL else 4) + 63) & ~63


class RequestArrays(NamedTuple):
    """numpy views of a request region in host memory; x in the wire's carrier dtype (Wire.carrier:
    bfloat16 as uint16). The client writes through them, the group reads."""

    expert_ids: NDArray[np.int32]  # [n]
    counts: NDArray[np.int32]  # [n]
    token_of_pair: NDArray[np.int32]  # [P]
    weights: NDArray[np.float32] | None  # [P], PARTIAL only
    x: NDArray[Any]  # [N, D]


_i4 = np.dtype("<i4")
_u4 = np.dtype("<u4")
_f4 = np.dtype("<f4")


def request_arrays(region: NDArray[np.uint8], call: Call, wire: Wire) -> RequestArrays:
    """Views of a request region (uint8, contiguous). The caller has checked that it fits."""
    _, mode, tokens, n, pairs, _ = call
    array = np.ndarray
    buffer: Any = region
    return RequestArrays(
        array((n,), _i4, buffer, 0),
        array((n,), _i4, buffer, 4 * n),
        array((pairs,), _i4, buffer, 8 * n),
        array((pairs,), _f4, buffer, 8 * n + 4 * pairs) if mode == PARTIAL else None,
        array((tokens, wire.hidden), wire.carrier, buffer, _rows_at(n, pairs, mode)),
    )


class RequestViews(NamedTuple):
    """torch views of a request region, as RequestArrays but x in the wire dtype."""

    expert_ids: torch.Tensor  # int32 [n]
    counts: torch.Tensor  # int32 [n]
    token_of_pair: torch.Tensor  # int32 [P]
    weights: torch.Tensor | None  # float32 [P], PARTIAL only
    x: torch.Tensor  # [N, D]


def request_views(region: torch.Tensor, call: Call, wire: Wire) -> RequestViews:
    """Typed torch views of a request region (uint8 [slot bytes], host memory)."""
    arrays = request_arrays(region.numpy(), call, wire)
    return RequestViews(
        torch.from_numpy(arrays.expert_ids),
        torch.from_numpy(arrays.counts),
        torch.from_numpy(arrays.token_of_pair),
        None if arrays.weights is None else torch.from_numpy(arrays.weights),
        as_tensor(arrays.x, wire),
    )


def as_tensor(rows: NDArray[Any], wire: Wire) -> torch.Tensor:
    """The same memory as a tensor of the wire dtype."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if wire.torch_dtype is torch.bfloat16 else tensor


def reply_array(region: NDArray[np.uint8], rows: int, wire: Wire) -> NDArray[Any]:
    """`out` [rows, D] of a reply region, in the carrier dtype."""
    buffer: Any = region
    return np.ndarray((rows, wire.hidden), wire.carrier, buffer)


def call_of(header: Header, wire: Wire, request_limit: int, reply_limit: int) -> Call:
    """The shape a DISPATCH header announces, once it is known to be possible and to fit.

    FrameError otherwise; nothing has been allocated or read by then.
    """
    _, _, mode, _, _, layer, _, tokens, experts, pairs, announced, epoch, _, _, _ = header
    call = Call(layer, mode, tokens, experts, pairs, epoch)
    if mode > ROWS:
        raise FrameError(f"unknown mode {mode}")
    if not 1 <= tokens <= pairs or not 1 <= experts <= pairs:
        raise FrameError(f"impossible shape: {tokens} tokens, {experts} experts, {pairs} pairs")
    size = wire.request_bytes(call)
    if size != announced:
        raise FrameError(f"{announced} bytes announced, the shape takes {size}")
    if size > request_limit:
        raise FrameError(f"a request of {size} bytes does not fit {request_limit}")
    if wire.reply_bytes(call) > reply_limit:
        raise FrameError(f"a reply of {wire.reply_bytes(call)} bytes does not fit {reply_limit}")
    return call


class PairArrays(NamedTuple):
    """A private copy of the small arrays of a request, checked."""

    expert_ids: NDArray[np.int32]  # [n]
    counts: NDArray[np.int32]  # [n]
    token_of_pair: NDArray[np.int32]  # [P]
    weights: NDArray[np.float32] | None  # [P], PARTIAL only


class Words:
    """Room for the private copy of one slot's small arrays, used again for every request in it."""

    __slots__ = ("address", "array")

    def __init__(self, count: int = 0) -> None:
        self.array: NDArray[np.int32] = np.empty(count, _i4)
        self.address: int = self.array.ctypes.data

    def take(self, region: NDArray[np.uint8], address: int, call: Call, experts: int) -> Words:
        """Copy the small arrays out of a request region (at `address`) and check the copy.

        A copy, because in shared memory the peer could still change what has been checked.
        Returns these words, or larger ones. FrameError when an id is not below `experts`, a token
        not below N, or the counts do not sum to P.
        """
        _, mode, tokens, n, pairs, _ = call
        count = 2 * n + (2 * pairs if mode == PARTIAL else pairs)
        words = self if len(self.array) >= count else Words(max(256, 2 * count))
        functions = native()
        if functions is None:
            buffer: Any = region
            words.array[:count] = np.ndarray((count,), _i4, buffer)
        elif not functions.check(
            words.address, address, n, pairs, tokens, experts, mode == PARTIAL
        ):
            return words
        check_words(words.array, call, experts)
        return words

    def arrays(self, call: Call) -> PairArrays:
        """Views of a copy that `take` has made."""
        _, mode, _, n, pairs, _ = call
        words, ends = self.array, 2 * n + pairs
        weights = words[ends : ends + pairs].view(_f4) if mode == PARTIAL else None
        return PairArrays(words[:n], words[n : 2 * n], words[2 * n : ends], weights)


_FEW_WORDS = 128


def check_words(words: NDArray[np.int32], call: Call, experts: int) -> None:
    """Check the small arrays of a request, as they lie in its region; FrameError."""
    _, _, tokens, n, pairs, _ = call
    ends = 2 * n + pairs
    unsigned = words[:ends].view(_u4)
    if ends <= _FEW_WORDS:  # Python's own max and sum: 2 us instead of 6
        listed = unsigned.tolist()
        highest, token = max(listed[:n]), max(listed[2 * n :])
        total = sum(listed[n : 2 * n])
    else:  # unsigned, so that one comparison also catches negative values
        highest = int(np.maximum.reduce(unsigned[:n]))
        token = int(np.maximum.reduce(unsigned[2 * n :]))
        total = int(np.add.reduce(unsigned[n : 2 * n], dtype=np.uint64))
    if highest >= experts:
        raise FrameError(f"expert {highest} of layer {call.layer} does not exist")
    if token >= tokens:
        raise FrameError(f"a pair names token {token} of {tokens}")
    if total != pairs:
        raise FrameError(f"the counts sum to {total}, not to the {pairs} pairs announced")


def rows_at(call: Call) -> int:
    """Offset of x in a request region."""
    return _rows_at(call.experts, call.pairs, call.mode)


def request_rows(region: NDArray[np.uint8], call: Call, wire: Wire) -> NDArray[Any]:
    """x [N, D] of a request region, in the carrier dtype."""
    _, mode, tokens, n, pairs, _ = call
    buffer: Any = region
    return np.ndarray((tokens, wire.hidden), wire.carrier, buffer, _rows_at(n, pairs, mode))
