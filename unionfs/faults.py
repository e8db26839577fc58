"""Named points at which a test can make the server fail or die.

Production cost: one comparison with None.  A fault is armed by the environment of the server,
`MICA_FAULT=POINT:ACTION[:COUNT]`, where ACTION is `kill` (SIGKILL to the server itself) or the name of an errno
(`EIO`, `ENOSPC` ...), and COUNT says at which passage it strikes (1, the first, by default).
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass

POINTS = (
    "copyup.staged",
    "copyup.data",
    "copyup.indexed",
    "copyup.published",
    "copyup.done",
    "copyup.data-in-place",
    "copyup.metacopy-cleared",
    "create.staged",
    "create.done",
    "mkdir.staged",
    "mkdir.done",
    "unlink.whiteout-staged",
    "unlink.done",
    "rmdir.whiteout-staged",
    "rmdir.exchanged",
    "rmdir.done",
    "rename.prepared",
    "rename.renamed",
    "rename.done",
    "link.prepared",
    "link.done",
    "setattr.done",
    "setxattr.done",
    "write.done",
    "read.lower",
)
"""Every point that a test may name, in the order of the operations that pass them."""


@dataclass(slots=True)
class _Armed:
    point: str
    action: str
    passes_left: int


_armed: _Armed | None = None


def arm(spec: str | None) -> None:
    """Arm the fault that `spec` describes; None or an empty string disarms.

    Raises:
        ValueError: The point or the action is not known.
    """
    global _armed  # noqa: PLW0603 - one process serves one mount, and the points must cost nothing
    if not spec:
        _armed = None
        return
    point, _, rest = spec.partition(":")
    action, _, count = rest.partition(":")
    if point not in POINTS:
        msg = f"no fault point {point!r}"
        raise ValueError(msg)
    if action != "kill" and not hasattr(errno, action):
        msg = f"no fault action {action!r}"
        raise ValueError(msg)
    _armed = _Armed(point, action, int(count or "1"))


def point(name: str) -> None:
    """Pass the point `name`; strikes when a test armed it.

    Raises:
        OSError: The errno that the test asked for.
    """
    if _armed is not None and _armed.point == name:
        _strike(_armed)


def _strike(armed: _Armed) -> None:
    armed.passes_left -= 1
    if armed.passes_left != 0:
        return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number: int = getattr(errno, armed.action)
    raise OSError(number, f"injected at {armed.point}")
