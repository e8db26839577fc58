"""The union file systems that are compared: how each is mounted, watched and unmounted.

A server is found by looking for the process that has the mount point among its arguments, which holds
for every peer and needs the help of none.
"""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.child import BenchError, run

UNMOUNT_S = 60.0
REPOSITORY = Path(__file__).resolve().parents[1]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stack:
    """What is mounted: lowers (topmost first), and fresh folders for one run."""

    base: Path
    lowers: Sequence[Path]
    upper: Path
    work: Path
    mountpoint: Path

    def options(self, *, relative: bool = False) -> str:
        """The overlay options; relative to `base` if wanted, since mount(2) takes one page of them."""
        start = self.base if relative else Path("/")
        lowers, upper, work = (
            [os.path.relpath(path, start) if relative else os.fspath(path) for path in paths]
            for paths in (self.lowers, [self.upper], [self.work])
        )
        return f"lowerdir={':'.join(lowers)},upperdir={upper[0]},workdir={work[0]}"


@dataclass(frozen=True, slots=True)
class Peer:
    """One union file system."""

    name: str
    argv: Callable[[Stack], list[str]]
    program: str
    is_fuse: bool = True
    env: Mapping[str, str] = field(default_factory=dict)

    def is_installed(self) -> bool:
        """Whether its program is on this machine."""
        return shutil.which(self.program) is not None

    def mount(self, stack: Stack) -> None:
        """Mount; returns when the mount serves.

        Raises:
            BenchError: The mount program failed, or left no mount.
        """
        run(self.argv(stack), cwd=None if self.is_fuse else stack.base, env=self.env)
        if not is_mounted(stack.mountpoint):
            msg = f"{self.name} said that it mounted but did not"
            raise BenchError(msg)


def _mica(stack: Stack) -> list[str]:
    return [sys.executable, "-m", "unionfs", "-o", stack.options(), os.fspath(stack.mountpoint)]


def _overlay(stack: Stack) -> list[str]:
    options = stack.options(relative=True)
    return ["mount", "-t", "overlay", "overlay", "-o", options, os.fspath(stack.mountpoint)]


def _fuse_overlayfs(stack: Stack) -> list[str]:
    return ["fuse-overlayfs", "-o", stack.options(), os.fspath(stack.mountpoint)]


def _unionfs_fuse(stack: Stack) -> list[str]:
    branches = [f"{stack.upper}=RW", *(f"{lower}=RO" for lower in stack.lowers)]
    options = "cow,allow_other,default_permissions,suid,dev,use_ino,max_files=16384"
    return ["unionfs-fuse", "-o", options, ":".join(branches), os.fspath(stack.mountpoint)]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("mica", _mica, sys.executable, env={"PYTHONPATH": os.fspath(REPOSITORY)}),
        Peer("overlay", _overlay, "mount", is_fuse=False),
        Peer("fuse-overlayfs", _fuse_overlayfs, "fuse-overlayfs"),
        Peer("unionfs", _unionfs_fuse, "unionfs-fuse"),
    )
}


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted there; asks the kernel, not the server."""
    wanted = os.fspath(mountpoint)
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == wanted for line in lines)


def server_pids(mountpoint: Path) -> list[int]:
    """The processes that have the mount point among their arguments."""
    wanted = os.fsencode(mountpoint)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in arguments:
            found.append(int(entry.name))
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time that the processes have used so far."""
    ticks = 0
    for pid in pids:
        # The name in parentheses may hold anything; utime and stime are fields 14 and 15 (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def rss_mib(pids: Sequence[int]) -> float:
    """Resident memory of the processes (VmRSS)."""
    kib = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                kib += int(line.split()[1])
    return kib / 1024


def unmount(mountpoint: Path) -> None:
    """Unmount, and wait until the server has gone; neither is left, whatever happens.

    Raises:
        BenchError: It stayed busy, or the server did not end within UNMOUNT_S and was killed.
    """
    pids = server_pids(mountpoint)
    deadline = time.monotonic() + UNMOUNT_S
    busy: BenchError | None = None
    while is_mounted(mountpoint):
        try:
            run(["umount", os.fspath(mountpoint)])
        except BenchError as e:
            if time.monotonic() > deadline:
                run(["umount", "-l", os.fspath(mountpoint)])
                busy = e
            time.sleep(0.1)
    lingering = [pid for pid in pids if not _ends(pid, deadline)]
    if busy is not None:
        raise busy
    if lingering:
        msg = f"the server (process {lingering[0]}) was still there {UNMOUNT_S:.0f} s after unmounting"
        raise BenchError(msg)


def _ends(pid: int, deadline: float) -> bool:
    """Wait for the end of a process; one that does not end by itself is killed."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return True
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll.poll(UNMOUNT_S * 1000)
        return False
    finally:
        os.close(pidfd)
