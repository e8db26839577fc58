"""For others: start a mount, wait until it serves, end it.

The server is a process of its own (`python -m unionfs -f ...`), since one process can serve one mount.  This module
imports neither pyfuse3 nor trio's heavy parts and is what the runtime uses.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from unionfs import syscalls
from unionfs.options import escape_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_READY = b"ready"


class MountError(Exception):
    """The server could not mount, or could not be ended; its one line says why."""


class Mount:
    """A mount that a server process serves.

    Attributes:
        mountpoint: Where it is mounted.
        pid: The server.
    """

    def __init__(self, mountpoint: bytes, pid: int, log: IO[bytes]) -> None:
        """Made by `mount`."""
        self.mountpoint = mountpoint
        self.pid = pid
        self._log = log
        self._logged = ""
        self._pid_fd = os.pidfd_open(pid)
        self._status: int | None = None

    def log(self) -> str:
        """What the server has written to its log so far."""
        if not self._log.closed:
            self._logged = os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")
        return self._logged

    def is_serving(self) -> bool:
        """Whether the server still runs."""
        if self._status is not None:
            return False
        ready, _, _ = select.select([self._pid_fd], [], [], 0)
        return not ready

    def pidfd(self) -> int:
        """A descriptor that becomes readable when the server has exited (pidfd_open(2)); stays ours."""
        return self._pid_fd

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        """Wait until the server has exited and closed all its layers.

        Returns:
            Its exit status; the negative number of the signal that killed it.

        Raises:
            MountError: It still runs after `timeout_s`.
        """
        if self._status is None:
            ready, _, _ = select.select([self._pid_fd], [], [], timeout_s)
            if not ready:
                msg = f"the server {self.pid} still runs after {timeout_s} s"
                raise MountError(msg)
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
            os.close(self._pid_fd)
            self.log()
            self._log.close()
        return self._status

    def unmount(self, *, lazy: bool = False, timeout_s: float = 30.0) -> None:
        """Unmount, then wait until the server has exited.

        Raises:
            MountError: The mount is busy, or the server does not end.
        """
        try:
            unmount_path(self.mountpoint, lazy=lazy)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: it is unmounted already
                msg = f"{os.fsdecode(self.mountpoint)} cannot be unmounted: {error.strerror}"
                raise MountError(msg) from error
        self.wait_exit(timeout_s)

    def kill(self) -> None:
        """Kill the server, then take the dead mount away."""
        if self.is_serving():
            signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)
        self.wait_exit()
        with contextlib.suppress(OSError):
            unmount_path(self.mountpoint, lazy=True)


def unmount_path(mountpoint: bytes, *, lazy: bool = False) -> None:
    """Unmount a path, through fusermount3 where we may not do it ourselves.

    Raises:
        OSError: EBUSY, EINVAL (no mount) ...
    """
    try:
        syscalls.unmount(mountpoint, syscalls.MNT_DETACH if lazy else 0)
    except PermissionError as error:
        words = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", os.fsdecode(mountpoint)]
        if os.spawnvp(os.P_WAIT, words[0], words) != 0:
            raise error from None


def mount(
    mountpoint: Path,
    *,
    lower: Sequence[Path],
    upper: Path | None = None,
    work: Path | None = None,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
) -> Mount:
    """Start a server and wait until its mount serves.

    Args:
        lower: The read-only directories, topmost first.
        options: Further mount options, each as in `-o`.
        env: Added to the server's environment.

    Raises:
        MountError: It cannot be mounted; the message is the server's one line.
    """
    where = os.fsencode(mountpoint)
    words = [sys.executable, "-m", "unionfs", "-f"]
    words += ["-o", os.fsdecode(_stack_option(lower, upper, work))]
    for option in options:
        words += ["-o", option]
    words.append(os.fsdecode(where))
    reader, writer = os.pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the mount
    try:
        pid = _spawn(words, writer, log.fileno(), env or {})
    finally:
        os.close(writer)
    made = Mount(where, pid, log)
    try:
        _await_ready(made, reader, timeout_s)
    finally:
        os.close(reader)
    return made


def _stack_option(lower: Sequence[Path], upper: Path | None, work: Path | None) -> bytes:
    parts = [b"lowerdir=" + b":".join(escape_path(os.fsencode(path)) for path in lower)]
    if upper is not None:
        parts.append(b"upperdir=" + escape_path(os.fsencode(upper)))
    if work is not None:
        parts.append(b"workdir=" + escape_path(os.fsencode(work)))
    return b",".join(parts)


def _spawn(words: list[str], ready_fd: int, log_fd: int, env: Mapping[str, str]) -> int:
    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = dict(os.environ)
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = package_parent + (os.pathsep + path if path else "")
    environment["MICA_READY_FD"] = str(ready_fd)
    environment.update(env)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.set_inheritable(ready_fd, True)  # noqa: FBT003 - the signature of os
    try:
        return os.posix_spawn(
            words[0],
            words,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, log_fd, 1),
                (os.POSIX_SPAWN_DUP2, log_fd, 2),
            ],
            setpgroup=0,
        )
    finally:
        os.close(null)


def _await_ready(made: Mount, reader: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    ready, _, _ = select.select([reader], [], [], timeout_s)
    if ready and os.read(reader, len(_READY)) == _READY:
        return
    if not ready:
        made.kill()
        msg = f"the server did not serve within {timeout_s} s: {made.log()}"
        raise MountError(msg)
    made.wait_exit(max(1.0, deadline - time.monotonic()))
    last = [line for line in made.log().splitlines() if line.strip()][-1:]
    message = last[0].removeprefix("mica-fuse: ") if last else "the server died without a word"
    raise MountError(message)
