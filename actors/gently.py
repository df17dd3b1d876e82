"""Work that can wait while others serve: in a thread of low priority.

A group that starts beside groups and routers that serve takes their cores for seconds: importing
torch alone is more than one. On Linux niceness is a thread's own, and a process without privileges
may raise it but never lower it again; so the thread ends with the work. On a machine with other
work, two busy processes on two cores kept 0.72 and 0.42 of their CPU time while a third imported
what a group needs, and 0.88 and 0.52 when it did so at niceness 5. Not for a process that serves:
a thread of low priority may be kept waiting while it holds Python's lock.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_NICE = 10  # a tenth of what others get on a core that is wanted by both: no start takes for ever


def gently(work: Callable[[], T]) -> T:
    """What `work()` returns, or raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with contextlib.suppress(OSError, AttributeError):  # no such thing on this system
                own = threading.get_native_id()
                nice = max(os.getpriority(os.PRIO_PROCESS, own), _NICE)
                os.setpriority(os.PRIO_PROCESS, own, nice)
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="gently")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def import_gently(*modules: str) -> None:
    """So that importing them again takes no time."""
    gently(lambda: [importlib.import_module(module) for module in modules])
