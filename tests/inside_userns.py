"""What is different in a user namespace; tests/test_t5_rootless.py runs this file inside of some."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.dump import Dump, diff_dumps, dump_tree
from tests.support.stack import Stack, Stacks, is_whiteout
from tests.support.trees import HardLink, Node, Symlink, Tree
from tests.support.users import errno_of

MIB = 1 << 20
LOWER: Tree = {
    "file": "text",
    "large": "x" * MIB,
    "dir/one": "1",
    "dir/sub/two": "2",
    "linked": "names",
    "also linked": HardLink("linked"),
    "link": Symlink("file"),
    "gone": "",
    "gone dir/inner": "",
    "attributes": Node("text", mode=0o640, xattrs={"user.a": b"1"}),
}


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("appended")


def remake_directory(m: Path) -> None:
    (m / "gone dir/inner").unlink()
    (m / "gone dir").rmdir()
    (m / "gone dir").mkdir()


def make_moved_directory(m: Path) -> None:
    (m / "dir").rename(m / "moved")
    (m / "dir").mkdir()
    (m / "moved/sub").rename(m / "dir/sub")


PLAIN: dict[str, Callable[[Path], object]] = {
    "unlink": lambda m: (m / "gone").unlink(),
    "opaque": remake_directory,
    "append": lambda m: append(m / "dir/one"),
    "rename a file": lambda m: (m / "file").rename(m / "dir/file"),
    "attribute": lambda m: os.setxattr(m / "attributes", "user.b", b"2"),
    "create": lambda m: (m / "dir/new").write_text("new"),
}
REDIRECTED: dict[str, Callable[[Path], object]] = {
    "rename a directory": lambda m: (m / "dir").rename(m / "moved"),
    "rename directories apart": make_moved_directory,
    "metadata alone": lambda m: (m / "large").chmod(0o600),
    "metadata, then rename": lambda m: (
        (m / "large").chmod(0o600),
        (m / "large").rename(m / "moved"),
    ),
    "linked": lambda m: append(m / "linked"),
    "linked, metadata alone": lambda m: (m / "linked").chmod(0o600),
}
DEEDS = PLAIN | REDIRECTED


def markers_of(path: Path) -> set[str]:
    return {name for name in os.listxattr(path, follow_symlinks=False) if "overlay" in name}


def assert_same(before: Dump, after: Dump) -> None:
    assert diff_dumps(before, after) == []


def as_lower_of(s: Stack) -> None:
    """Turn what was the upper into the topmost lower of a read-only stack."""
    s.unmount()
    s.lowers.insert(0, s.upper)
    s.is_read_only = True
    s.start()


def test_this_is_no_ordinary_root() -> None:
    assert Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    assert os.geteuid() == 0


def test_whiteout_is_a_device(stack: Stacks) -> None:
    s = stack(LOWER)
    (s.merged / "gone").unlink()
    assert is_whiteout(s.upper / "gone")


def test_opaque_marker_is_a_user_attribute(stack: Stacks) -> None:
    s = stack(LOWER)
    remake_directory(s.merged)
    assert os.getxattr(s.upper / "gone dir", "user.overlay.opaque") == b"y"


def test_redirect_is_a_user_attribute(stack: Stacks) -> None:
    s = stack(LOWER)
    (s.merged / "dir").rename(s.merged / "moved")
    assert os.getxattr(s.upper / "moved", "user.overlay.redirect") == b"/dir"


def test_metadata_copy_has_no_data_and_reads_the_data_below(stack: Stacks) -> None:
    s = stack(LOWER)
    (s.merged / "large").chmod(0o600)
    assert (s.upper / "large").stat().st_blocks < MIB // 512
    assert "user.overlay.metacopy" in markers_of(s.upper / "large")
    s.remount()
    assert (s.merged / "large").read_text() == "x" * MIB
    append(s.merged / "large")
    assert (s.upper / "large").read_text() == "x" * MIB + "appended"


def test_markers_are_hidden_and_a_users_own_are_escaped(stack: Stacks) -> None:
    s = stack(LOWER)
    (s.merged / "dir").rename(s.merged / "moved")
    assert markers_of(s.merged / "moved") == set()
    os.setxattr(s.merged / "moved/sub", "user.overlay.opaque", b"y")
    s.remount()
    assert os.listdir(s.merged / "moved/sub") == ["two"]
    assert os.getxattr(s.merged / "moved/sub", "user.overlay.opaque") == b"y"


@pytest.mark.parametrize("name", DEEDS)
def test_next_mount_shows_the_same(stack: Stacks, name: str) -> None:
    s = stack(LOWER)
    DEEDS[name](s.merged)
    shown = dump_tree(s.merged, ino=True)
    s.remount()
    assert_same(shown, dump_tree(s.merged, ino=True))


@pytest.mark.parametrize("name", [name for name in DEEDS if not name.startswith("linked")])
def test_upper_shows_the_same_as_a_layer_of_a_read_only_stack(stack: Stacks, name: str) -> None:
    s = stack(LOWER)
    DEEDS[name](s.merged)
    shown = dump_tree(s.merged, nlink=False)
    as_lower_of(s)
    after = dump_tree(s.merged, nlink=False)
    assert diff_dumps(shown, after, ignore=["links"]) == []


@pytest.mark.parametrize("name", PLAIN)
def test_upper_shows_the_same_under_overlayfs(stack: Stacks, name: str) -> None:
    # with userxattr overlayfs follows neither redirects nor metadata-only copies
    s = stack(LOWER, options=["metacopy=off", "redirect_dir=off"])
    PLAIN[name](s.merged)
    shown = dump_tree(s.merged, nlink=False)
    s.unmount()
    options = f"lowerdir={s.lower},upperdir={s.upper},workdir={s.work},userxattr"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", s.merged], check=True)
    try:
        seen = dump_tree(s.merged, nlink=False)
    finally:
        subprocess.run(["umount", s.merged], check=True)
    # overlayfs does not hide markers of other programs
    assert diff_dumps(shown, seen, ignore=["links", "xattrs"]) == []


def test_new_objects_belong_to_the_namespaces_root(stack: Stacks) -> None:
    s = stack(LOWER)
    (s.merged / "new").write_text("")
    (s.merged / "newer").mkdir()
    for name in ("new", "newer"):
        assert ((s.upper / name).stat().st_uid, (s.merged / name).stat().st_uid) == (0, 0)


def test_owner_outside_the_namespace_is_refused(stack: Stacks) -> None:
    s = stack(LOWER)
    assert errno_of(lambda: os.chown(s.merged / "file", 70_000, 70_000)) == errno.EINVAL
    assert (s.merged / "file").stat().st_uid == 0


def test_device_is_refused(stack: Stacks) -> None:
    s = stack(LOWER)
    number = os.makedev(1, 3)
    assert errno_of(lambda: os.mknod(s.merged / "null", 0o20666, number)) == errno.EPERM
    assert not (s.merged / "null").exists()


def test_trusted_attributes_are_refused(stack: Stacks) -> None:
    s = stack(LOWER)
    path = s.merged / "file"
    assert errno_of(lambda: os.setxattr(path, "trusted.a", b"1")) == errno.EPERM
    assert os.listdir(s.upper) == []
