"""User namespaces to run commands in: a range of ids mapped by root, or one user's own id alone.

    with ranged() as inside:
        subprocess.run([*inside, "id"])     root of a namespace in which ids 0 to 65535 exist
    with single(uid, scratch) as inside:
        subprocess.run([*inside, "id"])     an ordinary user, who sees itself as root and nobody else

Both have a mount namespace of their own. Nothing of the machine is changed: where only root may open
/dev/fuse, the ordinary user gets a node of its own, which is gone with its namespace.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "MICA_TEST_USERNS"
"""Set for a test run inside a user namespace."""

PROJECT = Path(__file__).resolve().parents[2]
IDS = 65536

OWN_FUSE_DEVICE = """
mount -t tmpfs -o mode=755 none "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
umount --lazy "$1"
uid=$2
shift 2
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups unshare --user --map-root-user --mount "$@"
"""


def is_inside() -> bool:
    """Tell whether this very test run is one inside a user namespace."""
    return VARIABLE in os.environ


@contextmanager
def ranged() -> Iterator[list[str]]:
    """Yield the words that run a command as root of a namespace with a range of ids."""
    # It keeps the namespace until its standard input ends.
    command = ["unshare", "--user", "sh", "-c", "echo ready; cat"]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        assert keeper.stdout.readline() == b"ready\n"
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{keeper.pid}/{kind}").write_text(f"0 0 {IDS}\n")
        enter = ["nsenter", f"--user=/proc/{keeper.pid}/ns/user", "--setuid=0", "--setgid=0"]
        yield [*enter, "unshare", "--mount"]
    finally:
        keeper.stdin.close()
        keeper.wait()
        keeper.stdout.close()


@contextmanager
def single(uid: int, scratch: Path) -> Iterator[list[str]]:
    """Yield the words that run a command as `uid` in a namespace that knows no other user."""
    device = scratch / "dev"
    device.mkdir()
    yield ["unshare", "--mount", "sh", "-ec", OWN_FUSE_DEVICE, "sh", str(device), str(uid)]


def missing_for(uid: int) -> str | None:
    """Say why `uid` could not run the tests, if it could not."""
    needed = f"import pytest, pyfuse3, sys; sys.path.insert(0, {str(PROJECT)!r}); import unionfs"
    words = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    made = subprocess.run([*words, sys.executable, "-B", "-c", needed], capture_output=True)
    if made.returncode == 0:
        return None
    return f"needs a Python and a checkout that ordinary users may read ({made.stderr[-200:]!r})"
