"""A Ray cluster of our own on this machine: start it quietly, stop it without leaving anything.

`raymoe serve` without `--address` owns everything it starts. The process makes itself the reaper
of its orphaned descendants, so that the whole tree (raylet, workers, HAProxy) can be found and
ended even when a process in the middle has died.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import psutil
import ray

from actors.leftovers import PREFIX, mark_owner, remove_memory, unmark_owner
from raymoe.config import RayConfig
from raymoe.errors import ConfigError

_PR_SET_CHILD_SUBREAPER = 36
_SOCKET_PATH_LIMIT = 107  # bytes of a unix socket's path on Linux
_RAY_SOCKET_TAIL = 75  # what Ray appends to its temporary folder, at most


class LocalRay:
    """One private Ray instance: `start()`, then `stop()`, which leaves no process and no file."""

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._started = False
        self.folder = _make_folder(config.temp_dir)
        if len(str(self.folder)) + _RAY_SOCKET_TAIL > _SOCKET_PATH_LIMIT:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise ConfigError(
                f"Ray's temporary folder {self.folder} is too long for its sockets: give a path "
                f"of at most {_SOCKET_PATH_LIMIT - _RAY_SOCKET_TAIL - 16} bytes in ray.temp_dir"
            )

    def start(self, num_cpus: float, num_gpus: float, resources: dict[str, float]) -> None:
        """Starts Ray here with as many logical CPUs as the deployment asks for."""
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.environ.update(_environment(self.folder))
        self._started = True
        ray.init(
            address="local",
            num_cpus=int(num_cpus + 0.999),
            num_gpus=int(num_gpus + 0.999) or None,
            resources=resources or None,
            include_dashboard=False,
            object_store_memory=self._config.object_store_bytes,
            _temp_dir=str(self.folder / "r"),
            log_to_driver=False,
            logging_level="ERROR",
        )

    def stop(self, patience_s: float = 4.0, keep_logs: bool = False) -> Path | None:
        """Ends Ray and every process below this one, waits for them, removes the folder.

        With `keep_logs` Ray's own folder stays if Ray was started; the path is returned.
        """
        tree = _descendants()
        if ray.is_initialized():
            ray.shutdown()
        _end(tree, patience_s)
        return self._leave_folder(keep_logs)

    def kill(self, quiet_s: float = 0.7, keep_logs: bool = False) -> Path | None:
        """SIGKILLs every process below this one, until none has come up for `quiet_s`.

        For a start that is broken off, whose thread may still be starting processes, and for a
        Ray that does not answer. The folder: see `stop`.
        """
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < quiet_s:
            if _descendants():
                _end([], 0.0)
                quiet_since = time.monotonic()
            time.sleep(0.05)
        return self._leave_folder(keep_logs)

    def _leave_folder(self, keep_logs: bool) -> Path | None:
        remove_memory(self.folder)
        if not (keep_logs and self._started):
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        (self.folder / "secret").unlink(missing_ok=True)
        unmark_owner(self.folder)
        return self.folder / "r"


def _make_folder(temp_dir: str | None) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temp_dir)).absolute()
        mark_owner(folder)
    except OSError as e:
        where = temp_dir or tempfile.gettempdir()
        raise ConfigError(
            f"cannot make a folder in {where} (ray.temp_dir): {e.strerror or e}"
        ) from e
    return folder


def _environment(folder: Path) -> dict[str, str]:
    """Variables Ray and Serve read when they start; what the user has set wins."""
    proxy = folder / "p"
    wanted = {
        # One compute thread a process: with more, small operations wait for each other.
        "OMP_NUM_THREADS": "1",
        # Ray runs workers at nice 15 by default: anything else on the machine would win.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_METRICS_EXPORT_INTERVAL_MS": "10000",
        # The gateway writes its own HTTP; HAProxy only spreads connections.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        # Two more ports that are the same for every Serve by default.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "2",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def free_port() -> int:
    """A TCP port that nobody listens on now, below those the system gives to connections."""
    for port in random.sample(range(20000, 29000), 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ConfigError("no free TCP port found between 20000 and 29000")


def check_port_free(host: str, port: int) -> None:
    """Raises `ConfigError` when `host:port` cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as e:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({e.strerror or e}): choose another port with "
                "--port, or stop what uses it"
            ) from e


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _end(tree: list[psutil.Process], patience_s: float) -> None:
    """Waits for `tree` and whatever has joined it; SIGKILLs what is still there after that."""
    deadline = time.monotonic() + patience_s
    alive = _still_alive(tree)
    while alive and time.monotonic() < deadline:
        psutil.wait_procs(alive, timeout=0.2)
        alive = _still_alive(tree)
    for _ in range(20):
        if not alive:
            return
        for process in alive:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=0.5)
        alive = _still_alive(tree)


def _still_alive(tree: list[psutil.Process]) -> list[psutil.Process]:
    """Processes of `tree` and of today's descendants that still run; the dead are reaped."""
    seen = {p.pid: p for p in [*tree, *_descendants()]}
    alive = []
    for process in seen.values():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait(0)
            else:
                alive.append(process)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            continue
    return alive
