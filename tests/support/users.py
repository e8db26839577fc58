"""Calls made as somebody else: a forked child takes the ids, and its outcome comes back."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def run_as(
    uid: int,
    function: Callable[[], T],
    *,
    gid: int | None = None,
    groups: Sequence[int] = (),
    umask: int = 0o022,
) -> T:
    """Return what `function` returns in a process of `uid`; what it raises is raised here.

    Args:
        gid: Its group; by default the one with the user's number.
        groups: Its supplementary groups.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _answer(writer, uid, uid if gid is None else gid, groups, umask, function)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    assert answer, "the child died without an answer"
    value, error = pickle.loads(answer)
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _answer(
    writer: int,
    uid: int,
    gid: int,
    groups: Sequence[int],
    umask: int,
    function: Callable[[], object],
) -> None:
    """The life of the child; never returns."""
    try:
        os.umask(umask)
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        outcome: tuple[object, BaseException | None] = (function(), None)
    except BaseException as error:  # noqa: BLE001 - the parent is to see it, whatever it is
        outcome = (None, error)
    try:
        os.write(writer, pickle.dumps(outcome))
    finally:
        os._exit(0)


def errno_of(function: Callable[[], object]) -> int:
    """Return the errno that `function` fails with; 0 when it succeeds."""
    try:
        function()
    except OSError as error:
        return error.errno or 0
    return 0
