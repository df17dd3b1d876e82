"""The links of a client: which are up, which are on their way out, and the epoll over both."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator

from raymoe.client.routes import Connection


class Connections:
    """Guarded by the client's lock, but for `wait`, which is the engine's thread's."""

    def __init__(self) -> None:
        self.live: dict[str, Connection] = {}  # by group id
        self.retiring: list[Connection] = []  # no longer in the table: closed once idle
        self._by_fd: dict[int, Connection] = {}
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self.wait = self._epoll.poll  # (timeout_s) -> [(descriptor, events)]
        self._closed = False

    def __iter__(self) -> Iterator[Connection]:
        return iter([*self.live.values(), *self.retiring])

    def add(self, connection: Connection) -> None:
        """A group has been reached."""
        self.live[connection.group_id] = connection
        self._by_fd[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)

    def retire(self, connection: Connection) -> None:
        """The table no longer lists this incarnation of its group."""
        del self.live[connection.group_id]
        connection.retiring = True
        self.retiring.append(connection)

    def close_idle(self) -> None:
        """Close the retiring links that have nothing out any more."""
        for connection in [c for c in self.retiring if c.idle]:
            self.forget(connection)

    def forget(self, connection: Connection) -> None:
        """Close the link, whatever is out on it."""
        self._drop(connection)
        if self.live.get(connection.group_id) is connection:
            del self.live[connection.group_id]
        if connection in self.retiring:
            self.retiring.remove(connection)

    def of(self, fd: int) -> Connection | None:
        """Whose descriptor it is; the wake-up's is nobody's, and is read empty."""
        connection = self._by_fd.get(fd)
        if connection is None and fd == self._wake_fd:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
        return connection

    def wake(self) -> None:
        """Make `wait` return."""
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Close every link."""
        self._closed = True
        for connection in list(self):
            self._drop(connection)
        self.live.clear()
        self.retiring.clear()
        self._epoll.close()
        os.close(self._wake_fd)

    def _drop(self, connection: Connection) -> None:
        if not connection.lost:
            connection.lost = True
            del self._by_fd[connection.fd]
            with contextlib.suppress(OSError):  # a link that ended has closed it already
                self._epoll.unregister(connection.fd)
            connection.link.close()
