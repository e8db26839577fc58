"""A shorter way round pyfuse3's loop: trio with two parts replaced, for pyfuse3 alone.

pyfuse3 takes a `trio.Lock` and awaits `wait_readable` for each request; both go through trio's scheduler, an
epoll_ctl and an epoll_wait, which costs more than most requests do.  Here the lock is taken without a checkpoint when
it is free, and the device is polled for a moment before trio is asked.  pyfuse3 provides for a replacement of its
`trio` (its asyncio support does the same).

The rules: a poll that waits is used only while nothing else runs in this process, and after a streak of requests trio
gets its turn in any case.
"""

from __future__ import annotations

import select
import types
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

LINGER_MS = 1
"""How long the device is polled before trio is asked; a client that works sends its next request sooner."""
STREAK = 64
"""How many requests are answered before trio gets its turn."""


_SETTLING = 4


class QuickLock:
    """A lock that costs nothing while nobody else wants it.  Not fair: pyfuse3's readers are all alike."""

    def __init__(self) -> None:
        self._held = False
        self._waiters = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiters.park()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        self._waiters.unpark()


class EagerReader:
    """Waits for the device, trying the short way first."""

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        """`is_busy`: other work in this process needs the interpreter or the loop."""
        self._is_busy = is_busy
        self._poll = select.poll()
        self._fd = -1
        self._streak = 0
        self._settling = _SETTLING

    async def wait_readable(self, fd: int) -> None:
        """Return when `fd` can be read (or is about to fail).

        Raises:
            trio.ClosedResourceError: The file system ends.
        """
        if self._settling:
            # The handshake puts the device back in its place at the end of a step of trio's.
            self._settling -= 1
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.wait_readable(fd)
            return
        if fd != self._fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        if self._streak < STREAK and not self._is_busy() and self._poll.poll(LINGER_MS):
            self._streak += 1
            return
        self._streak = 0
        await trio.lowlevel.wait_readable(fd)


def eager_trio(is_busy: Callable[[], bool]) -> types.SimpleNamespace:
    """What pyfuse3 uses of trio, with the two parts replaced."""
    reader = EagerReader(is_busy)
    lowlevel = types.SimpleNamespace(
        wait_readable=reader.wait_readable,
        current_task=trio.lowlevel.current_task,
        current_trio_token=trio.lowlevel.current_trio_token,
        notify_closing=trio.lowlevel.notify_closing,
    )
    return types.SimpleNamespace(
        Lock=QuickLock,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        lowlevel=lowlevel,
    )
