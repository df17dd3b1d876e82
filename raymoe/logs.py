"""Log lines of our processes: text for eyes, or one JSON object a line for machines.

    log.warning("lost group %s: %s", group, why, extra=fields(group=group))

What is true of every line of a process (its group, its router, the epoch in use) is given once, to
`configure`. Only the logger "raymoe" is touched; other libraries' lines go where they always go.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raymoe.config import LoggingConfig

Around = Callable[[], Mapping[str, Any]]
_ROOT = logging.getLogger("raymoe")
_handler: logging.Handler | None = None  # ours, if this process has been configured


def fields(**named: Any) -> dict[str, Any]:
    """`extra` of a log call: request_id, trace_id, epoch, group, ...; empty ones are left out."""
    return {"fields": {name: value for name, value in named.items() if value not in (None, "")}}


def configure(
    config: LoggingConfig, process: str, deployment: str, around: Around | None = None
) -> None:
    """How this process logs from now on; repeatable. process: "gateway", "router", "group", ...

    around: what is true of every line when it is written. A folder that cannot be written to is
    said on standard error, which is used instead.
    """
    global _handler
    handler, trouble = _open(config, process)
    always = {"process": process, "pid": os.getpid(), "deployment": deployment}
    formatter = JsonLines if config.format == "json" else TextLines
    handler.setFormatter(formatter(always, around))
    if _handler is not None:
        _ROOT.removeHandler(_handler)
        _handler.close()
    _handler = handler
    _ROOT.addHandler(handler)
    _ROOT.setLevel(config.level.upper())
    if trouble:
        _ROOT.error(trouble)


def _open(config: LoggingConfig, process: str) -> tuple[logging.Handler, str]:
    if config.folder is None:
        return logging.StreamHandler(sys.stderr), ""
    folder = Path(config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(folder / f"{process}-{os.getpid()}.log"), ""
    except OSError as e:
        sentence = f"no log can be written in {folder} (logging.folder): {e.strerror or e}"
        return logging.StreamHandler(sys.stderr), sentence


class _Lines(logging.Formatter):
    def __init__(self, always: Mapping[str, Any], around: Around | None = None) -> None:
        super().__init__()
        self._always, self._around = dict(always), around

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        around: Mapping[str, Any] = {}
        if self._around is not None:
            try:
                around = self._around()
            except Exception:  # a line without its surroundings is better than none
                around = {}
        return {**around, **getattr(record, "fields", {})}

    def _time(self, record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.msecs):03d}Z"


class JsonLines(_Lines):
    """{"time", "level", "process", "pid", "deployment", "logger", "message", further fields}"""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self._time(record),
            "level": record.levelname.lower(),
            **self._always,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in self._fields(record).items() if k not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextLines(_Lines):
    """Time, level, process, message, then name=value of the fields."""

    def format(self, record: logging.LogRecord) -> str:
        who = f"{self._always.get('process', '')}[{self._always.get('pid', '')}]"
        # no client's id may begin a line of its own
        told = " ".join(f"{k}={_word(v)}" for k, v in self._fields(record).items())
        line = f"{self._time(record)} {record.levelname:7} {who} {record.name}: "
        line += record.getMessage() + (f"  {told}" if told else "")
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _word(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)
