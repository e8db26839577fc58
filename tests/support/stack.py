"""Layers, a mount over them, and the judgement at the end of every mounted test.

    def test_unlink_of_lower_file_leaves_whiteout(stack: Stacks) -> None:
        s = stack(lower={"a": "text", "d/": None})
        (s.merged / "a").unlink()
        assert is_whiteout(s.upper / "a")

When the test is over its mounts end, and for each: the server went without complaint, its upper has
no fault, its work directory is empty and its log holds no traceback and no error.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.trees import EMPTY, Tree, make_tree
from unionfs import client
from unionfs.check import check_upper

COMPLAINT = re.compile(r"Traceback \(most recent call last\)|\bERROR\b|\bCRITICAL\b")


class Stack:
    """Lower directories, an upper, a work directory, and where they are mounted over each other.

    Attributes:
        lowers: The lower directories, topmost first; `lower` is the topmost.
        upper: What changes are written to; empty and not part of the mount if `is_read_only`.
        merged: The mount point.
        mount: What the client returned for the current mount; None while unmounted.
    """

    def __init__(
        self,
        base: Path,
        lowers: Sequence[Tree],
        upper: Tree | None,
        options: Sequence[str],
        env: Mapping[str, str] | None,
    ) -> None:
        base.mkdir()
        self.base = base
        self.is_read_only = upper is None
        self.lowers = [base / f"lower{number}" for number in range(len(lowers))]
        self.upper = base / "upper"
        self.work = base / "work"
        self.merged = base / "merged"
        self.options = tuple(options)
        self.env = env
        self.mount: client.Mount | None = None
        self.allowed_complaints: list[str] = []
        self._logs: list[str] = []
        self._was_killed = False
        for directory in (*self.lowers, self.upper, self.work, self.merged):
            directory.mkdir()
        for directory, tree in zip(self.lowers, lowers, strict=True):
            make_tree(directory, tree)
        make_tree(self.upper, upper or EMPTY)

    @property
    def lower(self) -> Path:
        return self.lowers[0]

    def start(
        self, *, options: Sequence[str] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Mount; what is given here stands for this mount instead of what the stack was made with.

        Raises:
            unionfs.client.MountError: The server refused.
        """
        assert self.mount is None, "the stack is mounted already"
        self.mount = client.mount(
            self.merged,
            lower=self.lowers,
            upper=None if self.is_read_only else self.upper,
            work=None if self.is_read_only else self.work,
            options=self.options if options is None else options,
            env=self.env if env is None else env,
        )
        self._was_killed = False

    def unmount(self) -> None:
        """Unmount and wait until the server has gone; it must go with status 0."""
        mount = self._current()
        mount.unmount()
        status = mount.wait_exit(10.0)
        self._put_away(mount)
        assert status == 0, f"the server ended with status {status}: {self.log()}"

    def remount(self, *, options: Sequence[str] | None = None) -> None:
        """Unmount, if mounted, and mount again without the environment of the first mount."""
        if self.mount is not None:
            self.unmount()
        self.start(options=options, env={})

    def kill(self) -> None:
        """End the server at once, as a crash would, and take its dead mount away."""
        mount = self._current()
        mount.kill()
        self._put_away(mount)
        self._was_killed = True

    def allow_in_log(self, pattern: str) -> None:
        """Expect a complaint in the log: lines that match `pattern` are no fault of the server."""
        self.allowed_complaints.append(pattern)

    def log(self) -> str:
        """Return what the servers of this stack have written so far."""
        current = [] if self.mount is None else [self.mount.log()]
        return "".join(self._logs + current)

    def faults(self) -> list[str]:
        """Return what is amiss with the stack while it is not mounted."""
        found = []
        if not self.is_read_only:
            lowers = [os.fsencode(lower) for lower in self.lowers]
            faults = check_upper(os.fsencode(self.upper), lowers, os.fsencode(self.work))
            found += [f"check of the upper: {fault}" for fault in faults]
            staging = self.work / "work"
            left = sorted(staging.iterdir()) if staging.is_dir() else []
            found += [f"left in the work directory: {path.name}" for path in left]
        for line in self.log().splitlines():
            allowed = any(re.search(pattern, line) for pattern in self.allowed_complaints)
            if COMPLAINT.search(line) and not allowed:
                found.append(f"in the server's log: {line}")
        return found

    def finish(self) -> list[str]:
        """Unmount and return all faults; what a killed server left is for a mount to sweep."""
        if self.mount is None and self._was_killed:
            self.start(env={})
        if self.mount is not None:
            self.unmount()
        return self.faults()

    def _current(self) -> client.Mount:
        assert self.mount is not None, "the stack is not mounted"
        return self.mount

    def _put_away(self, mount: client.Mount) -> None:
        self._logs.append(mount.log())
        self.mount = None


class Stacks:
    """Makes the stacks of one test and judges them at its end."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._made: list[Stack] = []

    def __call__(
        self,
        lower: Tree | Sequence[Tree] = EMPTY,
        *,
        upper: Tree | None = EMPTY,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        mounted: bool = True,
    ) -> Stack:
        """Make the directories of a stack and mount it.

        Args:
            lower: One lower layer, or several, topmost first.
            upper: What the upper already holds; None for a stack without one.
            options: For the mount program, as after `-o`.
            env: Added to the server's environment.
            mounted: False leaves the mounting to `Stack.start`.
        """
        lowers: Sequence[Tree] = [lower] if isinstance(lower, Mapping) else lower
        base = self._scratch / f"stack{len(self._made)}"
        made = Stack(base, lowers, upper, options, env)
        self._made.append(made)
        if mounted:
            made.start()
        return made

    def finish(self) -> list[str]:
        """Unmount every stack and return the faults of all."""
        return [f"{made.base.name}: {fault}" for made in self._made for fault in made.finish()]

    def abandon(self) -> str:
        """End every server at once, judge nothing, and return what they wrote.

        For a test that failed: it may hold files open in its mounts, and half-done is not clean.
        """
        for made in self._made:
            if made.mount is not None:
                made.kill()
        return "".join(f"--- {made.base.name}\n{made.log()}" for made in self._made if made.log())


def is_whiteout(path: Path) -> bool:
    """Tell whether an upper's object is a whiteout in the form of a device."""
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
