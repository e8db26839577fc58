"""The errors of the union file system.

Everything the core raises on purpose is an `OSError` with `errno` set, so that the FUSE adapter needs one rule.
"""

from __future__ import annotations

import errno
import os


class UnionError(OSError):
    """A request that the union file system refuses; `errno` is what the caller of the system call sees."""

    def __init__(self, number: int, what: str | None = None) -> None:
        super().__init__(number, what if what is not None else os.strerror(number))


class ReadOnlyStackError(UnionError):
    """A change was asked of a stack that has no upper layer (or was mounted read-only)."""

    def __init__(self) -> None:
        super().__init__(errno.EROFS)


class StaleNodeError(UnionError):
    """The kernel named an inode whose file is gone from the layers."""

    def __init__(self, ino: int) -> None:
        super().__init__(errno.ESTALE, f"inode {ino} is no longer in any layer")


class CorruptLayerError(UnionError):
    """The markers of a layer contradict each other; the object cannot be shown."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, what)


class SetupError(Exception):
    """A stack that cannot be mounted as asked: one line that says what, why and what to do."""
