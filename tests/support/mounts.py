"""What the kernel says about mounts and processes below one folder, and how to end them.

Nothing here acts on a pattern: a mount is ended by its own path, a process by its own id.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

MEMORY_TYPES = frozenset({"tmpfs", "ramfs", "rootfs"})
STACKED_TYPES = frozenset({"overlay", "aufs", "fuse", "fuse.fuse-overlayfs", "fuse.mica-fuse"})
EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class MountPoint:
    """One line of /proc/self/mountinfo."""

    path: Path
    fs_type: str
    source: str


def mount_points() -> list[MountPoint]:
    """Return every mount of this namespace, in the order in which they were made."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        fs_type, source, *_ = after.split(b" ")
        path = Path(os.fsdecode(_unescape(before.split(b" ")[4])))
        found.append(MountPoint(path, os.fsdecode(fs_type), os.fsdecode(_unescape(source))))
    return found


def fs_type_of(path: Path) -> str:
    """Return the type of the file system that `path` lies on."""
    path = path.resolve()
    holders = [mount for mount in mount_points() if path.is_relative_to(mount.path)]
    # Of several mounts on one path the last one made is the one that shows.
    return max(enumerate(holders), key=lambda pair: (len(pair[1].path.parts), pair[0]))[1].fs_type


def end_mounts_below(top: Path) -> list[Path]:
    """Unmount, last made first, what is mounted below `top`; return where that was."""
    ended = [mount.path for mount in reversed(mount_points()) if mount.path.is_relative_to(top)]
    for path in ended:
        subprocess.run(["umount", "--lazy", "--", path], check=False, capture_output=True)
    return ended


def pids_that_name(top: Path) -> list[int]:
    """Return the processes with a path below `top` on their command line: servers, mostly."""
    wanted = os.fsencode(top) + b"/"
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(cmdline.parent.name)
        try:
            names_it = wanted in cmdline.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if names_it and pid != os.getpid():
            found.append(pid)
    return found


def end_processes_that_name(top: Path) -> None:
    """Kill, one by one, the processes with a path below `top` on their command line."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while (pids := pids_that_name(top)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
