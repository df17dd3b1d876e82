"""Optional C for the hottest loops; everything works without it, in numpy and torch.

`native()` is the compiled library, or None where it cannot be compiled or RAYMOE_NATIVE=0 says not
to use it. Its functions take addresses: who calls them keeps the memory alive and has checked that
it is large enough.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from functools import lru_cache

from raymoe.native.build import BuildError, library

log = logging.getLogger(__name__)

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

Function = Callable[..., int]


class Native:
    """The functions of the C files. Those that take microseconds are called with the GIL held."""

    def __init__(self, path: str) -> None:
        handle = ctypes.PyDLL(path)
        self.cut = _function(handle, "raymoe_cut", _P, _P, _P, _I, _P, _I, _I, _I, _I, _I, _I)
        self.write = _function(handle, "raymoe_write", _P, _I, _P, _P, _P, _I)
        self.add = _function(handle, "raymoe_add", _P, _I, _P, _P, _I, _I, _I)
        self.tally = _function(handle, "raymoe_tally", _P, _P, _I)
        self.check = _function(handle, "raymoe_check", _P, _P, _I, _I, _I, _I, _I)
        self.norm = _function(handle, "raymoe_norm", _P, _P, _P, _I, _I, _F)
        self.rotate = _function(handle, "raymoe_rotate", _P, _P, _I, _I, _P, _P, _I, _I, _I)
        self.identity = _function(handle, "raymoe_identity", _P, _P, _P, _P, _P, _I, _I, _I)
        free = ctypes.CDLL(path)  # without the GIL
        self.decode = _function(
            free, "raymoe_decode", _P, *[_I] * 7, *[_P, _I, _I] * 3, *[_P] * 4, _F, _F, _P
        )
        self.experts = _function(free, "raymoe_experts", _P, _I, *[_P] * 5, *[_I] * 7)
        self.panels = _function(free, "raymoe_panels", _P, _P, *[_I] * 6)
        self.experts_scratch = _function(handle, "raymoe_experts_scratch", _I, _I)


def _function(handle: ctypes.CDLL, name: str, *arguments: type) -> Function:
    found = getattr(handle, name)
    found.argtypes, found.restype = arguments, _I
    return found  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def native() -> Native | None:
    """The library, loaded and if need be compiled at the first call (about a second)."""
    if os.environ.get("RAYMOE_NATIVE", "1") == "0":
        return None
    try:
        return Native(str(library()))
    except (BuildError, OSError, AttributeError) as why:
        log.warning("no native functions, numpy and torch are used instead: %s", why)
        return None
