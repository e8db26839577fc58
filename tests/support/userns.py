"""User namespaces to run commands in: a range of ids mapped by root, or one user's own id alone.

    with ranged() as inside:
        subprocess.run([*inside, "id"])     root of a namespace in which ids 0 to 65535 exist
    with single(uid, scratch) as inside:
        subprocess.run([*inside, "id"])     an ordinary user, who sees itself as root and nobody else

Both have a mount namespace of their own. Nothing of the machine is changed: where only root may open
/dev/fuse, or reach Python and the project, the ordinary user gets its own view of them, which is gone
with its namespace.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "MICA_TEST_USERNS"
"""Set for a test run inside a user namespace."""

PROJECT = Path(__file__).resolve().parents[2]
IDS = 65536


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
    place = scratch / "own"
    place.mkdir()
    script = "\n".join(["set -e", *_own_view(place), f"cd {shlex.quote(str(PROJECT))}"])
    user = f"--reuid {uid} --regid {uid} --clear-groups"
    script += f'\nexec setpriv {user} unshare --user --map-root-user --mount "$@"'
    yield ["unshare", "--mount", "sh", "-c", script, "sh"]


def _own_view(place: Path) -> list[str]:
    """The commands that make a FUSE device and the hidden folders reachable for everybody."""
    at = shlex.quote(str(place))
    first = [f"mount -t tmpfs -o mode=755 none {at}", f"mknod -m 666 {at}/fuse c 10 229"]
    first.append(f"mount --bind {at}/fuse /dev/fuse")
    covers, last = set(), []
    for number, path in enumerate(sorted({PROJECT, Path(sys.prefix), Path(sys.base_prefix)})):
        top = _hiding(path)
        if top is not None:
            there = shlex.quote(str(path))
            first.append(f"mkdir {at}/{number}; mount --bind {there} {at}/{number}")
            covers.add(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(top))}")
            last.append(f"mkdir -p {there}; mount --bind {at}/{number} {there}")
    return [*first, *sorted(covers), *last]


def _hiding(path: Path) -> Path | None:
    """The topmost folder above `path` that others than its owner cannot pass."""
    above = reversed(path.parents)
    return next((top for top in above if not top.stat().st_mode & stat.S_IXOTH), None)


def run_tests(inside: list[str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest inside, with `folder` for its scratch folders."""
    environment = {
        **os.environ,
        VARIABLE: "1",
        "MICA_TEST_DIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    return subprocess.run(
        [*inside, *pytest, *arguments],
        check=False,
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
