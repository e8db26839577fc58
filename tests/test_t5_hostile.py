"""Layers made by an enemy: whatever they hold, the server reaches nothing outside them and lives on.

Outside the layers lies a canary: a tree whose every open, read and change is watched (inotify(7)).
Its secrets must not show in the mount, and nothing done through the mount may reach it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.dump import Dump, diff_dumps, dump_tree
from tests.support.stack import Stack, Stacks
from tests.support.trees import HardLink, Node, Symlink, Tree, make_tree
from tests.support.users import errno_of
from unionfs.client import MountError

IN_ALL_EVENTS = 0xFFF  # linux/inotify.h
IN_NONBLOCK = os.O_NONBLOCK
SECRET = b"the canary's secret"
DEADLINE_S = 20.0

libc = ctypes.CDLL(None, use_errno=True)


class Canary:
    """A tree that nobody may touch, with a directory and files of the names that the layers use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        # The depth makes `..` from the layers, which lie beside it, meet it too.
        make_tree(path, {"file": SECRET, "dir/file": SECRET, "dir/dir/file": SECRET})
        self._before = dump_tree(path, ino=True)
        self._fd = libc.inotify_init1(IN_NONBLOCK)
        for found in (path, *path.rglob("*")):
            watch = libc.inotify_add_watch(self._fd, os.fsencode(found), IN_ALL_EVENTS)
            assert watch >= 0, os.strerror(ctypes.get_errno())

    def assert_untouched(self) -> None:
        ready, _, _ = select.select([self._fd], [], [], 0)
        assert not ready, f"the canary was touched: {os.read(self._fd, 4096)!r}"
        os.close(self._fd)
        assert diff_dumps(self._before, dump_tree(self.path, ino=True)) == []


@pytest.fixture
def canary(scratch: Path) -> Iterator[Canary]:
    made = Canary(scratch / "canary")
    yield made
    made.assert_untouched()


@contextmanager
def alive(s: Stack) -> Iterator[None]:
    """End a server that stands still, so that the test fails instead of standing still too."""
    assert s.mount is not None
    watchdog = threading.Timer(DEADLINE_S, os.kill, (s.mount.pid, signal.SIGKILL))
    watchdog.start()
    try:
        yield
        assert s.mount.is_serving(), "the server stood still"
    finally:
        watchdog.cancel()
        watchdog.join()


def open_nofollow(path: bytes, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def append(path: bytes, mode: int) -> None:
    if stat.S_ISREG(mode):
        fd = open_nofollow(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, b"appended")
        finally:
            os.close(fd)


def change(path: bytes, mode: int) -> None:
    os.chown(path, 1, 1, follow_symlinks=False)
    if not stat.S_ISLNK(mode):
        os.chmod(path, 0o700)
    os.utime(path, ns=(1, 1), follow_symlinks=False)
    os.setxattr(path, "trusted.a", b"v", follow_symlinks=False)


def enter(path: bytes, mode: int) -> None:
    if stat.S_ISDIR(mode):
        os.close(open_nofollow(path + b"/made", os.O_CREAT | os.O_WRONLY))


def link(path: bytes, mode: int) -> None:
    if not stat.S_ISDIR(mode):
        os.link(path, path + b".link", follow_symlinks=False)


def move(path: bytes, _mode: int) -> None:
    os.rename(path, path + b".moved")


def remove(path: bytes, mode: int) -> None:
    (os.rmdir if stat.S_ISDIR(mode) else os.unlink)(path)


DEEDS: tuple[Callable[[bytes, int], None], ...] = (change, append, enter, link, move, remove)


def fail(error: OSError) -> None:
    raise error


def paths_of(top: Path) -> list[bytes]:
    """All paths below `top` whose parents are true directories, deepest first."""
    return [
        os.path.join(directory, name)
        for directory, directories, files in os.walk(os.fsencode(top), False, fail)
        for name in (*directories, *files)
    ]


def do_everything(s: Stack) -> None:
    """See and change all that the mount shows, never following a symbolic link."""
    for path in paths_of(s.merged):
        assert (path, read_quietly(path)) != (path, SECRET)
    for deed in DEEDS:
        for path in paths_of(s.merged):
            errno_of(lambda: deed(path, os.lstat(path).st_mode))  # noqa: B023


def read_quietly(path: bytes) -> bytes | None:
    try:
        mode = os.lstat(path).st_mode
        for name in os.listxattr(path, follow_symlinks=False):
            os.getxattr(path, name, follow_symlinks=False)
        if not stat.S_ISREG(mode):
            return None
        fd = open_nofollow(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)


def assert_harmless(s: Stack) -> None:
    """Mount the layers and do everything to them: they stay as they are, and the server lives."""
    before: list[Dump] = [dump_tree(lower) for lower in s.lowers]
    s.start()
    with alive(s):
        do_everything(s)
    s.remount()
    with alive(s):
        paths_of(s.merged)
        (s.merged / "last").write_text("still here")
    s.unmount()
    for lower, dump in zip(s.lowers, before, strict=True):
        assert diff_dumps(dump, dump_tree(lower)) == []


# --- symbolic links -------------------------------------------------------------------------------

# Layers lie at SCRATCH/stack0/lowerN, the canary at SCRATCH/canary.
WAYS_OUT = (
    "../../canary",
    "CANARY",
    "../../../../../../../../..",
    "/",
    "..",
    "self/../../../canary",
)


def way_out(way: str, canary: Canary) -> Symlink:
    return Symlink(way.replace("CANARY", str(canary.path)))


@pytest.mark.parametrize("way", WAYS_OUT)
def test_symlinks_lead_nowhere_from_any_place(stack: Stacks, canary: Canary, way: str) -> None:
    out = way_out(way, canary)
    inner: Tree = {"dir/file": "inner", "dir/dir/file": "inner", "file": "inner"}
    layers: list[Tree] = [
        {"dir/dir": out, "file": out, "top/": None},
        {"dir": out, "top/file": out, "top/dir": out},
        inner | {"top": out},
        {"dir": out, "file": HardLink("dir"), "top/dir/file": "inner"},
    ]
    assert_harmless(stack(layers, mounted=False))


def test_symlink_below_a_directory_adds_nothing_to_it(stack: Stacks, canary: Canary) -> None:
    s = stack([{"dir/own": ""}, {"dir": Symlink(str(canary.path / "dir"))}])
    assert os.listdir(s.merged / "dir") == ["own"]
    assert not (s.merged / "dir/file").exists()


@pytest.mark.parametrize("seen", [False, True], ids=["never seen", "seen before"])
@pytest.mark.parametrize("place", ["dir", "dir/dir"])
def test_directory_of_a_lower_replaced_by_a_symlink_under_the_mount(
    stack: Stacks, canary: Canary, place: str, *, seen: bool
) -> None:
    s = stack({"dir/file": "own", "dir/dir/file": "own"})
    if seen:
        dump_tree(s.merged)
    shutil.rmtree(s.lower / place)
    (s.lower / place).symlink_to(canary.path / place)
    with alive(s):
        do_everything(s)
        for path in ("dir/dir/file", "dir/file"):
            errno_of(lambda: append(bytes(s.merged / path), stat.S_IFREG))  # noqa: B023
    s.unmount()
    shutil.rmtree(s.upper)
    s.upper.mkdir()


@pytest.mark.parametrize("seen", [False, True], ids=["never seen", "seen before"])
def test_directory_of_the_upper_replaced_by_a_symlink_under_the_mount(
    stack: Stacks, canary: Canary, *, seen: bool
) -> None:
    s = stack({"dir/file": "own"}, upper={"dir/dir/file": "own"})
    if seen:
        dump_tree(s.merged)
    shutil.rmtree(s.upper / "dir")
    (s.upper / "dir").symlink_to(canary.path / "dir")
    with alive(s):
        if seen:
            for path in ("dir/dir/file", "dir/file"):
                errno_of(lambda: append(bytes(s.merged / path), stat.S_IFREG))  # noqa: B023
            errno_of(lambda: enter(bytes(s.merged / "dir/dir"), stat.S_IFDIR))
            errno_of(lambda: enter(bytes(s.merged / "dir"), stat.S_IFDIR))
            errno_of(lambda: os.unlink(s.merged / "dir/file"))
        else:
            do_everything(s)
    s.unmount()
    (s.upper / "dir").unlink(missing_ok=True)
    shutil.rmtree(s.upper)
    s.upper.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "read": lambda path: path.read_bytes(),
    "append": lambda path: append(bytes(path), stat.S_IFREG),
    "truncate": lambda path: os.truncate(path, 0),
    "overwrite": lambda path: path.write_bytes(b""),
    "chmod": lambda path: path.chmod(0o777),
    "chown": lambda path: os.chown(path, 5, 5),
    "utime": lambda path: os.utime(path, ns=(5, 5)),
    "setxattr": lambda path: os.setxattr(path, "user.a", b"v"),
    "link": lambda path: path.with_name("link").hardlink_to(path),
}


@pytest.mark.parametrize("name", CHANGES)
def test_file_of_the_upper_replaced_by_a_symlink_under_the_mount(
    stack: Stacks, canary: Canary, name: str
) -> None:
    s = stack(upper={"file": "own"})
    (s.merged / "file").stat()
    (s.upper / "file").unlink()
    (s.upper / "file").symlink_to(canary.path / "file")
    with alive(s):
        errno_of(lambda: CHANGES[name](s.merged / "file"))


def test_file_replaced_by_a_fifo_under_the_mount_is_not_waited_for(stack: Stacks) -> None:
    s = stack({"lower": "text"}, upper={"upper": "text"})
    for layer, name in ((s.lower, "lower"), (s.upper, "upper")):
        (s.merged / name).stat()
        (layer / name).unlink()
        os.mkfifo(layer / name)
    with alive(s):
        for name in ("lower", "upper"):
            assert errno_of((s.merged / name).read_bytes) != 0
            errno_of(lambda: append(bytes(s.merged / name), stat.S_IFREG))  # noqa: B023


# --- markers --------------------------------------------------------------------------------------

# A redirect says where a directory's lower parts, or a metacopy's data, are: inside the layers.
REDIRECTS = (
    b"..",
    b".",
    b"/",
    b"/..",
    b"../canary",
    b"../../canary/dir",
    b"/../../canary/dir",
    b"/dir/../../../canary",
    b"CANARY/dir",
    b"CANARY/file",
    b"/link/dir",
    b"/link/file",
    b"link",
    b"/link",
    b"//dir",
    b"/dir/",
    b"/dir/dir/file/x",
    b"",
    b"file\0",
    b"\xff" * 255,
    b"n" * 300,
    b"/" + b"d/" * 2000 + b"d",
)


def with_redirect(value: bytes, canary: Canary, *, metacopy: bool) -> list[Tree]:
    value = value.replace(b"CANARY", bytes(canary.path))
    xattrs = {"trusted.overlay.redirect": value, "trusted.overlay.opaque": b"n"}
    if metacopy:
        xattrs = {"trusted.overlay.redirect": value, "trusted.overlay.metacopy": b""}
    link = Symlink(str(canary.path))
    below: Tree = {"link": link, "dir/file": "inner", "dir/dir/file": "inner", "file": "inner"}
    above: Tree = {
        "odd": Node("" if metacopy else None, stat.S_IFDIR * (not metacopy), xattrs=xattrs)
    }
    return [above, below, {"odd": link, "dir": link}]


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("value", REDIRECTS, ids=[repr(value[:20]) for value in REDIRECTS])
def test_redirect_of_a_directory_stays_inside(
    stack: Stacks, canary: Canary, value: bytes, where: str
) -> None:
    layers = with_redirect(value, canary, metacopy=False)
    upper = layers.pop(0) if where == "upper" else {}
    s = stack(layers, upper=upper)
    with alive(s):
        do_everything(s)
    s.unmount()
    shutil.rmtree(s.upper)
    s.upper.mkdir()


@pytest.mark.parametrize("value", REDIRECTS, ids=[repr(value[:20]) for value in REDIRECTS])
def test_redirect_of_a_metacopy_stays_inside(stack: Stacks, canary: Canary, value: bytes) -> None:
    layers = with_redirect(value, canary, metacopy=True)
    layers[0] = {"odd": layers[0]["odd"]}  # type: ignore[index]
    s = stack(layers, mounted=False)
    os.truncate(s.lower / "odd", 1000)
    s.allow_in_log("metadata without data")
    assert_harmless(s)


def test_entry_that_cannot_be_shown_is_listed_beside_the_others(stack: Stacks) -> None:
    metacopy = Node("", xattrs={"trusted.overlay.metacopy": b""})
    s = stack([{"file": metacopy, "other": "text"}, {}], mounted=False)
    os.truncate(s.lower / "file", 1000)
    s.allow_in_log("metadata without data")
    s.start()
    assert sorted(os.listdir(s.merged)) == ["file", "other"]
    assert errno_of((s.merged / "file").stat) == errno.EIO
    assert (s.merged / "other").read_text() == "text"
    assert sorted(os.listdir(s.merged)) == ["file", "other"]


DATA = {
    "a fifo": Node(kind=stat.S_IFIFO),
    "a device": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 5)),
    "a block device": Node(kind=stat.S_IFBLK, rdev=os.makedev(0, 0)),
    "a socket": Node(kind=stat.S_IFSOCK),
    "a symlink": Symlink("../../canary/file"),
    "a directory": None,
}


@pytest.mark.parametrize("kind", DATA)
def test_data_of_a_metacopy_is_a_regular_file_or_none(
    stack: Stacks, canary: Canary, kind: str
) -> None:
    metacopy = Node("", xattrs={"trusted.overlay.metacopy": b""})
    name = "file/" if DATA[kind] is None else "file"
    s = stack([{"file": metacopy}, {name: DATA[kind]}], mounted=False)
    s.allow_in_log("metadata without data")
    os.truncate(s.lower / "file", 1000)
    s.start()
    with alive(s):
        assert errno_of((s.merged / "file").read_bytes) == errno.EIO
        assert errno_of(lambda: append(bytes(s.merged / "file"), stat.S_IFREG)) == errno.EIO


VALUES = (
    b"",
    b"n",
    b"yy",
    b"y\0",
    b"Y",
    b"\xff",
    b"x",
    b"/",
    b"U+99999999999999999999",
    b"z" * 2000,
)


@pytest.mark.parametrize("value", VALUES, ids=[repr(value[:20]) for value in VALUES])
def test_markers_of_any_value_do_no_harm(stack: Stacks, canary: Canary, value: bytes) -> None:
    names = (
        "opaque",
        "redirect",
        "metacopy",
        "origin",
        "impure",
        "nlink",
        "whiteout",
        "mica.origin",
    )
    odd = {f"{space}.overlay.{name}": value for space in ("trusted", "user") for name in names}
    xattrs = {**odd, "user.fuseoverlayfs.opaque": value, "user.fuseoverlayfs.origin": value}
    if len(value) > 100:  # one block holds all attributes of a file
        xattrs = {"trusted.overlay.redirect": value}
    tree: Tree = {
        "file": Node("text", xattrs=xattrs),
        "empty": Node("", xattrs=xattrs),
        "dir": Node(kind=stat.S_IFDIR, xattrs=xattrs),
    }
    below: Tree = {"dir/file": "below", "dir/link": Symlink(str(canary.path)), "file": "below"}
    s = stack([tree, below], mounted=False)
    s.allow_in_log("metadata without data")
    assert_harmless(s)


ODD_NAMES = (
    ".wh.",
    ".wh..",
    ".wh...",
    ".wh..wh.",
    ".wh..wh..opq",
    ".wh..wh.aufs",
    ".wh.\n",
    ".wh.-",
)


@pytest.mark.parametrize("kind", ["file", "symlink", "directory", "fifo"])
def test_odd_whiteout_names_do_no_harm(stack: Stacks, canary: Canary, kind: str) -> None:
    odd: dict[str, Tree] = {
        "file": dict.fromkeys(ODD_NAMES, ""),
        "symlink": {name: Symlink(str(canary.path)) for name in ODD_NAMES},
        "directory": {f"{name}/dir/file": "" for name in ODD_NAMES},
        "fifo": {name: Node(kind=stat.S_IFIFO) for name in ODD_NAMES},
    }
    made = odd[kind]
    deeper = {f"dir/{name}": content for name, content in made.items()}
    s = stack([{**made, **deeper}, {"dir/file": "below", "file": "below"}], mounted=False)
    assert_harmless(s)


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_whiteout_of_no_name_hides_nothing(stack: Stacks, name: str) -> None:
    s = stack([{f"dir/{name}": ""}, {"dir/file": ""}])
    assert os.listdir(s.merged / "dir") == ["file"]
    assert not (s.merged / "dir" / name).exists()


OTHER_DEVICES = {
    "character 1:3": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3)),
    "character 0:1": Node(kind=stat.S_IFCHR, rdev=os.makedev(0, 1)),
    "character 1:0": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 0)),
    "block 0:0": Node(kind=stat.S_IFBLK, rdev=os.makedev(0, 0)),
}


@pytest.mark.parametrize("kind", OTHER_DEVICES)
def test_device_that_is_no_whiteout_is_shown(stack: Stacks, kind: str) -> None:
    node = OTHER_DEVICES[kind]
    s = stack([{"name": node}, {"name": "below"}])
    found = (s.merged / "name").lstat()
    assert (stat.S_IFMT(found.st_mode), found.st_rdev) == (node.kind, node.rdev)
    assert os.listdir(s.merged) == ["name"]
    (s.merged / "name").chmod(0o600)
    assert (s.upper / "name").lstat().st_rdev == node.rdev


# --- the work directory ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["work", "links"])
def test_work_directory_that_leads_out_is_refused(stack: Stacks, canary: Canary, name: str) -> None:
    s = stack(mounted=False)
    (s.work / name).symlink_to(canary.path)
    with pytest.raises(MountError, match="cannot be written"):
        s.start()
    (s.work / name).unlink()


def test_leftovers_are_swept_without_following_them(stack: Stacks, canary: Canary) -> None:
    s = stack(mounted=False)
    tree: Tree = {"#1": Symlink(str(canary.path)), "#2/link": Symlink("../../../../canary/dir")}
    (s.work / "work").mkdir()
    make_tree(s.work / "work", tree)
    s.start()
    assert os.listdir(s.work / "work") == []


# --- a layer that holds the mount point -----------------------------------------------------------


def test_root_directory_as_a_lower_with_the_mount_point_inside(stack: Stacks) -> None:
    s = stack(mounted=False)
    s.lowers = [Path("/")]
    s.start()
    with alive(s):
        inside = s.merged / s.merged.relative_to("/")
        assert os.listdir(inside) == []
        assert sorted(os.listdir(s.merged / "etc")) == sorted(os.listdir("/etc"))
        (inside / "new").write_text("text")
        assert os.listdir(inside) == ["new"]
        assert (s.upper / inside.relative_to(s.merged) / "new").read_text() == "text"
        assert os.listdir(s.merged / "proc") == []


def test_lower_that_holds_its_own_upper_and_work_directory(stack: Stacks) -> None:
    s = stack({"dir/file": "text"}, mounted=False)
    s.lowers = [s.base]
    s.start()
    with alive(s):
        (s.merged / "upper/new").write_text("text")
        (s.merged / "lower0/dir/file").write_text("changed")
        assert os.listdir(s.merged / "merged") == []
        subprocess.run(["find", s.merged], check=True, capture_output=True, timeout=DEADLINE_S)
