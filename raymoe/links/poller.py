"""Waiting for many links with one system call."""

from __future__ import annotations

import os
import select
import threading
import time

from raymoe.errors import PeerLost
from raymoe.links.link import Completion, Link


class LinkPoller:
    """An epoll over links. Belongs to the thread that owns the links; wake() may come from any.

    `spin_s`: poll() looks again and again for so long before it sleeps. It saves the 50-100 us that
    an idle core takes to wake, and costs a core: leave it 0 where processes >= cores.
    """

    def __init__(self, spin_s: float = 0.0) -> None:
        self._spin_s = spin_s
        self._epoll = select.epoll()
        self._links: dict[int, Link] = {}
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._closing = threading.Lock()
        self._closed = False

    def add(self, link: Link) -> None:
        """Wait for this link too."""
        fd = link.fileno()
        self._links[fd] = link
        self._epoll.register(fd, select.EPOLLIN)

    def discard(self, link: Link) -> None:
        """Forget a link, open or closed; nothing happens when it is not known."""
        for fd, known in self._links.items():
            if known is link:
                del self._links[fd]
                if link.fileno() == fd:  # a closed one has left the epoll by itself
                    self._epoll.unregister(fd)
                return

    def poll(
        self, timeout_s: float
    ) -> tuple[list[tuple[Link, Completion]], list[tuple[Link, PeerLost]]]:
        """(completions, links lost), as soon as there is one of either; empty after `timeout_s` or
        wake(). A lost link has been discarded."""
        epoll_poll = self._epoll.poll
        events = epoll_poll(0)
        if not events and timeout_s > 0:
            if self._spin_s:
                until = time.perf_counter() + min(self._spin_s, timeout_s)
                while not events and time.perf_counter() < until:
                    events = epoll_poll(0)
            if not events:
                events = epoll_poll(timeout_s)
        done: list[tuple[Link, Completion]] = []
        lost: list[tuple[Link, PeerLost]] = []
        for fd, _ in events:
            link = self._links.get(fd)
            if link is None:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                continue
            try:
                for completion in link.poll():
                    done.append((link, completion))
            except PeerLost as error:
                del self._links[fd]
                lost.append((link, error))
        return done, lost

    def wake(self) -> None:
        """Make a waiting poll() return."""
        with self._closing:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Give back the descriptors; the links stay open."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._links.clear()
                self._epoll.close()
                os.close(self._wake_fd)
