"""Ray talks much on the console; what an operator needs of it, raymoe says itself in one line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ray._private import worker

log = logging.getLogger("raymoe.ray")


def quiet_errors() -> None:
    """Sends Ray's paragraphs about dead workers and failed tasks to the log `raymoe.ray`.

    They come from all over the cluster, also when nothing is wrong (a group that is killed is
    started again); Ray's own log files have them in any case. Before `ray.init`.
    """
    worker.print_to_stdstream = _log


def _log(data: dict[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        log.info("%s: %s", data["pid"], line)


@contextlib.contextmanager
def quiet_serve() -> Iterator[None]:
    """Ray Serve logs a dozen lines a start through its own logger; ours say enough."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
