"""Who may do what, and what a change takes away: judged by doing the same on plain ext4.

`Pair` holds one tree twice: as the lower layer of a mount, and on the disk itself. A case passes when
the same calls lead to the same answers and the same metadata in both.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.stack import Stack, Stacks, is_whiteout
from tests.support.trees import Content, HardLink, Node, Symlink, Tree, make_tree
from tests.support.users import errno_of, run_as

ALICE, STAFF, OTHERS = 1000, 100, 200
CAPABILITY = "security.capability"
NET_RAW = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # linux/capability.h, revision 2
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


class Pair:
    """The same tree under a mount and on the disk."""

    def __init__(self, stack: Stacks, scratch: Path, tree: Tree, options: tuple[str, ...] = ()):
        self.plain = scratch / "plain"
        self.plain.mkdir()
        make_tree(self.plain, tree)
        self.stack: Stack = stack(tree, options=options)
        self.merged = self.stack.merged

    def same(self, act: Callable[[Path], object]) -> object:
        """What `act` answers on the mount, having answered the same on the disk."""
        expected, seen = outcome(act, self.plain), outcome(act, self.merged)
        assert seen == expected
        return seen


def outcome(act: Callable[[Path], object], root: Path) -> object:
    """The value of a call, or its errno."""
    try:
        return act(root)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def shown(path: Path) -> tuple[object, ...]:
    """Owner, mode and what else decides about access; no times, sizes or numbers."""
    status = path.lstat()
    names = sorted(os.listxattr(path, follow_symlinks=False))
    xattrs = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
    return oct(status.st_mode), status.st_uid, status.st_gid, xattrs


# --- set-user-id, set-group-id, capabilities -----------------------------------------------------

MODES = (0o4755, 0o2755, 0o6711, 0o2644, 0o6775, 0o4644, 0o7777)
PRIVILEGED: Tree = {
    f"{mode:o}": Node("some text", mode=mode, uid=ALICE, gid=STAFF, xattrs={CAPABILITY: NET_RAW})
    for mode in MODES
}


def write(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"x", 0)
    os.close(fd)


def write_nothing(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"")
    os.close(fd)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def open_only(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR))


def open_truncating(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def truncate_open(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, 3)
    os.close(fd)


def write_mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4) as area:
        area[:4] = b"mmap"


def copy_into(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.copy_file_range(fd, fd, 2, 0, 4)
    os.close(fd)


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": write,
    "write of nothing": write_nothing,
    "append": append,
    "open for writing": open_only,
    "O_TRUNC": open_truncating,
    "truncate": lambda path: os.truncate(path, 2),
    "truncate to the same size": lambda path: os.truncate(path, path.stat().st_size),
    "extending truncate": lambda path: os.truncate(path, 10_000),
    "ftruncate": truncate_open,
    "copy_file_range": copy_into,
    "chown to oneself": lambda path: os.chown(path, ALICE, STAFF),
    "chown of nothing": lambda path: os.chown(path, -1, -1),
    "chgrp": lambda path: os.chown(path, -1, OTHERS),
    "chmod": lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o7),
    "chmod with set-id bits": lambda path: path.chmod(0o6755),
    "utime": lambda path: os.utime(path, ns=(1, 2)),
    "rename": lambda path: path.rename(path.with_name("renamed-" + path.name)),
    "link": lambda path: os.link(path, path.with_name("link-" + path.name)),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"1"),
}


WHO = {"owner": (ALICE, STAFF), "root": (0, 0), "stranger": (1001, 1001)}
FUSE_DECIDES = {
    # The kernel's FUSE drops what is to be dropped itself, where ext4 refuses.
    ("chown of nothing", "stranger", 0o2644),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "-"))
def test_change_takes_the_same_privileges_as_on_ext4(
    stack: Stacks, scratch: Path, change: str
) -> None:
    tree: dict[str | bytes, Content] = {}
    for who in WHO:
        tree[f"{who}/"] = Node(mode=0o777)
        tree |= {f"{who}/{os.fsdecode(name)}": node for name, node in PRIVILEGED.items()}
    pair = Pair(stack, scratch, tree)
    for who, (uid, gid) in WHO.items():
        for mode in MODES:
            if (change, who, mode) in FUSE_DECIDES:
                continue
            name = f"{mode:o}"

            def act(root: Path, who: str = who, name: str = name) -> object:
                path = root / who / name
                # Asked for first, so that the kernel holds attributes that must not stay.
                path.stat()
                failed = errno_of(lambda: CHANGES[change](path))
                left = sorted(path.parent.glob(f"*{name}"))
                return failed, [shown(path) for path in left]

            def act_as(root: Path, uid: int = uid, gid: int = gid) -> object:
                groups = [OTHERS] if uid == ALICE else []
                return run_as(uid, lambda: act(root), gid=gid, groups=groups)

            case = change, who, oct(mode)
            assert (*case, outcome(act_as, pair.merged)) == (*case, outcome(act_as, pair.plain))


def test_mapped_write_keeps_set_id_bits_but_loses_capability(stack: Stacks) -> None:
    # On ext4 the capability would stay: the server cannot tell write-back of a mapping from write(2).
    s = stack(PRIVILEGED)
    for mode in MODES:
        write_mapped(s.merged / f"{mode:o}")
        kept = s.upper / f"{mode:o}"
        assert stat.S_IMODE(kept.stat().st_mode) == mode
        assert kept.read_bytes() == b"mmap text"
        assert os.listxattr(s.merged / f"{mode:o}") == []


def test_write_by_owner_takes_privileges_of_file_made_in_the_mount(stack: Stacks) -> None:
    s = stack(options=())
    target = s.merged / "new"
    target.write_text("text")
    os.chown(target, ALICE, STAFF)
    target.chmod(0o6755)
    os.setxattr(target, CAPABILITY, NET_RAW)
    run_as(ALICE, lambda: write(target), gid=STAFF)
    assert stat.S_IMODE((s.upper / "new").stat().st_mode) == 0o755
    assert CAPABILITY not in os.listxattr(s.upper / "new")


def test_open_for_writing_alone_keeps_capability_through_the_copy_up(stack: Stacks) -> None:
    s = stack(PRIVILEGED)
    os.close(os.open(s.merged / "4755", os.O_RDWR))
    assert os.getxattr(s.upper / "4755", CAPABILITY) == NET_RAW
    assert stat.S_IMODE((s.upper / "4755").stat().st_mode) == 0o4755


# --- umask ---------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o7666)),
    "mkdir": lambda path: os.mkdir(path, 0o3777),
    "fifo": lambda path: os.mkfifo(path, 0o666),
    "mknod": lambda path: os.mknod(path, stat.S_IFREG | 0o6777),
    "symlink": lambda path: os.symlink("target", path),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "bind": lambda path: bind(path),  # noqa: PLW0108 - it is defined below
}


def bind(path: Path) -> None:
    import socket  # noqa: PLC0415

    here = os.getcwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as endpoint:
        try:
            endpoint.bind(path.name)
        finally:
            os.chdir(here)


DIRECTORIES: dict[str, Node] = {
    "plain/": Node(mode=0o777),
    "setgid/": Node(mode=0o2777, gid=STAFF),
    "sticky/": Node(mode=0o1777),
}


@pytest.mark.parametrize("umask", [0, 0o027, 0o777])
def test_umask_is_applied_once(stack: Stacks, scratch: Path, umask: int) -> None:
    pair = Pair(stack, scratch, DIRECTORIES)
    for kind, make in MAKERS.items():
        for where in DIRECTORIES:

            def act(root: Path, make: Callable[[Path], object] = make, at: str = where + kind):
                failed = run_as(ALICE, lambda: errno_of(lambda: make(root / at)), umask=umask)
                return failed or shown(root / at)

            seen = pair.same(act)
            assert seen == errno.EPERM if kind == "device" else isinstance(seen, tuple)


def test_root_makes_the_same_modes(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, DIRECTORIES)
    for kind, make in MAKERS.items():
        for where in DIRECTORIES:

            def act(root: Path, make: Callable[[Path], object] = make, at: str = where + kind):
                run_as(0, lambda: make(root / at), umask=0o027)
                return shown(root / at)

            assert isinstance(pair.same(act), tuple)


# --- ACLs ----------------------------------------------------------------------------------------


def setfacl(path: Path, *arguments: str) -> None:
    subprocess.run(["setfacl", *arguments, "--", path], check=True, capture_output=True)


def getfacl(path: Path) -> str:
    words = ["getfacl", "--omit-header", "--numeric", "--absolute-names", "--", path]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def with_default_acl(root: Path, name: str) -> Path:
    path = root / name
    path.mkdir(exist_ok=True)
    path.chmod(0o2777)
    os.chown(path, 0, STAFF)
    path.chmod(0o2777)
    setfacl(path, "-d", "-m", "u::rwx,u:1001:rwx,g::rx,g:300:rw,m::rwx,o::x")
    return path


ACL_STEPS: dict[str, Callable[[Path], object]] = {
    "set": lambda path: setfacl(path, "-m", "u:1001:rw,g:300:r"),
    "set with mask": lambda path: setfacl(path, "-m", "u:1001:rwx,m::r"),
    "chmod changes the mask": lambda path: (
        setfacl(path, "-m", "u:1001:rwx"),
        path.chmod(0o640),
    ),
    "chmod back": lambda path: (
        setfacl(path, "-m", "u:1001:rwx"),
        path.chmod(0o600),
        path.chmod(0o670),
    ),
    "minimal one becomes the mode": lambda path: setfacl(path, "-m", "u::rwx,g::r,o::-"),
    "remove": lambda path: (setfacl(path, "-m", "u:1001:rw"), setfacl(path, "-b")),
    "remove an entry": lambda path: (
        setfacl(path, "-m", "u:1001:rw"),
        setfacl(path, "-x", "u:1001"),
    ),
    "chown keeps": lambda path: (setfacl(path, "-m", "u:1001:rw"), os.chown(path, 1002, 1003)),
    "rename keeps": lambda path: (
        setfacl(path, "-m", "u:1001:rw"),
        path.rename(path.with_name("away")),
        path.with_name("away").rename(path),
    ),
    "truncate keeps": lambda path: (setfacl(path, "-m", "u:1001:rw"), path.write_text("x")),
    "with set-group-id": lambda path: (path.chmod(0o2755), setfacl(path, "-m", "u:1001:rw")),
    "malformed": lambda path: os.setxattr(path, ACCESS, b"\2\0\0\0nonsense"),
    "removexattr": lambda path: (
        setfacl(path, "-m", "u:1001:rw"),
        os.removexattr(path, ACCESS),
    ),
    "removexattr of none": lambda path: os.removexattr(path, ACCESS),
    "getxattr of none": lambda path: os.getxattr(path, ACCESS),
    "default on a file": lambda path: os.setxattr(path, DEFAULT, struct.pack("<I", 2)),
}


@pytest.mark.parametrize("step", ACL_STEPS, ids=lambda name: name.replace(" ", "-"))
def test_acl_is_kept_as_on_ext4(stack: Stacks, scratch: Path, step: str) -> None:
    file = Node("text", mode=0o644, uid=ALICE, gid=OTHERS)
    tree = {"0/": Node(mode=0o777), "0/file": file, "1000/": Node(mode=0o777), "1000/file": file}
    pair = Pair(stack, scratch, tree)
    before = []
    for who in (0, ALICE):

        def act(root: Path, who: int = who) -> tuple[int, str]:
            path = root / str(who) / "file"
            failed = run_as(who, lambda: errno_of(lambda: ACL_STEPS[step](path)))
            return failed, getfacl(path)

        assert (who, outcome(act, pair.merged)) == (who, outcome(act, pair.plain))
        assert shown(pair.merged / f"{who}/file") == shown(pair.plain / f"{who}/file")
        before.append(shown(pair.merged / f"{who}/file"))
    pair.stack.remount()
    assert before == [shown(pair.merged / f"{who}/file") for who in (0, ALICE)]


@pytest.mark.parametrize("who", [0, ALICE], ids=["root", "user"])
@pytest.mark.parametrize("over_whiteout", [False, True], ids=["fresh", "over-whiteout"])
def test_default_acl_and_group_are_inherited(
    stack: Stacks, scratch: Path, who: int, over_whiteout: bool
) -> None:
    pair = Pair(stack, scratch, {"hall/": None, **{f"hall/{kind}": "old" for kind in MAKERS}})

    def make_all(root: Path) -> object:
        hall = with_default_acl(root, "hall")
        seen = []
        for kind, make in MAKERS.items():
            (hall / kind).unlink()
            if who != 0 and kind == "device":
                continue
            path = hall / kind if over_whiteout else hall / f"new-{kind}"
            if over_whiteout and root == pair.merged:
                assert is_whiteout(pair.stack.upper / "hall" / kind)
            run_as(who, lambda make=make, path=path: make(path), umask=0o077)
            seen.append((path.name, shown(path)))
        return seen

    assert pair.same(make_all)


def test_default_acl_of_a_lower_directory_is_inherited(stack: Stacks, scratch: Path) -> None:
    s = stack({"hall/": None, "hall/old": "text"}, mounted=False)
    plain = scratch / "plain"
    plain.mkdir()
    with_default_acl(s.lower, "hall")
    hall = with_default_acl(plain, "hall")
    s.start()
    for kind, make in MAKERS.items():
        make(s.merged / "hall" / kind)
        make(hall / kind)
        assert shown(s.merged / "hall" / kind) == shown(hall / kind)


def test_directory_over_whiteout_passes_default_acl_on(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, {"hall/": None, "hall/sub/": None, "hall/sub/old": "x"})

    def act(root: Path) -> object:
        hall = with_default_acl(root, "hall")
        (hall / "sub/old").unlink()
        (hall / "sub").rmdir()
        (hall / "sub").mkdir()
        (hall / "sub/file").write_text("x")
        (hall / "sub/deeper").mkdir()
        return [shown(hall / name) for name in ("sub", "sub/file", "sub/deeper")]

    assert isinstance(pair.same(act), list)


def test_acl_of_a_lower_file_survives_copy_up(stack: Stacks) -> None:
    s = stack({"file": "text"}, mounted=False)
    setfacl(s.lower / "file", "-m", "u:1001:rw,g:300:r,m::rw")
    before = shown(s.lower / "file")
    s.start()
    (s.merged / "file").write_text("changed")
    assert shown(s.merged / "file") == before
    assert os.getxattr(s.upper / "file", ACCESS) == dict(before[3])[ACCESS]  # type: ignore[call-overload]


def test_acl_decides_about_access(stack: Stacks) -> None:
    s = stack({"file": Node("text", mode=0o600)})
    setfacl(s.merged / "file", "-m", "u:1001:r")
    assert run_as(1001, (s.merged / "file").read_text) == "text"
    assert run_as(1001, lambda: errno_of(lambda: write(s.merged / "file"))) == errno.EACCES
    assert run_as(1002, lambda: errno_of((s.merged / "file").read_text)) == errno.EACCES


def test_acl_change_takes_effect_at_once(stack: Stacks) -> None:
    s = stack({"file": Node("text", mode=0o600)})
    setfacl(s.merged / "file", "-m", "u:1001:r")
    assert run_as(1001, (s.merged / "file").read_text) == "text"
    setfacl(s.merged / "file", "-x", "u:1001")
    assert run_as(1001, lambda: errno_of((s.merged / "file").read_text)) == errno.EACCES


def test_chmod_masks_what_an_acl_grants(stack: Stacks) -> None:
    s = stack({"file": Node("text", mode=0o600)})
    setfacl(s.merged / "file", "-m", "u:1001:rw")
    (s.merged / "file").chmod(0o600)
    assert run_as(1001, lambda: errno_of((s.merged / "file").read_text)) == errno.EACCES


# --- permission checks ---------------------------------------------------------------------------

ROOMS: Tree = {
    "secret": Node("root's", mode=0o600),
    "readable": Node("all's", mode=0o644),
    "group": Node("staff's", mode=0o640, gid=STAFF),
    "mine": Node("alice's", mode=0o600, uid=ALICE, gid=ALICE),
    "locked/": Node(mode=0o700),
    "locked/inside": "x",
    "passable/": Node(mode=0o711),
    "passable/inside": Node("x", mode=0o644),
    "sticky/": Node(mode=0o1777),
    "sticky/roots": Node("x", mode=0o666),
    "sticky/alices": Node("x", mode=0o666, uid=ALICE),
    "open/": Node(mode=0o777),
    "open/roots": Node("x", mode=0o600),
    "open/dir/": Node(mode=0o755),
    "open/dir/inside": "x",
    "program": Node("#!/bin/sh\n", mode=0o744),
}
ATTEMPTS: dict[str, Callable[[Path], object]] = {
    "read secret": lambda top: (top / "secret").read_bytes(),
    "write readable": lambda top: write(top / "readable"),
    "read readable": lambda top: (top / "readable").read_bytes(),
    "read by group": lambda top: (top / "group").read_bytes(),
    "write by group": lambda top: write(top / "group"),
    "truncate readable": lambda top: os.truncate(top / "readable", 0),
    "write mine": lambda top: write(top / "mine"),
    "enter locked": lambda top: (top / "locked/inside").stat(),
    "list locked": lambda top: os.listdir(top / "locked"),
    "list passable": lambda top: os.listdir(top / "passable"),
    "read in passable": lambda top: (top / "passable/inside").read_bytes(),
    "create in root's": lambda top: (top / "passable/new").touch(),
    "unlink in sticky, root's": lambda top: (top / "sticky/roots").unlink(),
    "unlink in sticky, own": lambda top: (top / "sticky/alices").unlink(),
    "rename in sticky, root's": lambda top: (top / "sticky/roots").rename(top / "open/moved"),
    "unlink in open, root's": lambda top: (top / "open/roots").unlink(),
    "rename root's directory": lambda top: (top / "open/dir").rename(top / "open/renamed"),
    "move root's directory": lambda top: (top / "open/dir").rename(top / "sticky/dir"),
    "link to root's": lambda top: os.link(top / "readable", top / "open/linked"),
    "chmod root's": lambda top: (top / "readable").chmod(0o666),
    "chmod mine": lambda top: (top / "mine").chmod(0o640),
    "give mine away": lambda top: os.chown(top / "mine", 1001, -1),
    "give mine to a group of others": lambda top: os.chown(top / "mine", -1, 300),
    "give mine to my group": lambda top: os.chown(top / "mine", -1, STAFF),
    "utime of root's": lambda top: os.utime(top / "readable", ns=(1, 1)),
    "utime of root's to now": lambda top: os.utime(top / "sticky/roots"),
    "set user attribute of root's": lambda top: os.setxattr(top / "readable", "user.a", b"1"),
    "set trusted attribute of mine": lambda top: os.setxattr(top / "mine", "trusted.a", b"1"),
    "set security attribute of mine": lambda top: os.setxattr(top / "mine", "security.a", b"1"),
    "set capability of mine": lambda top: os.setxattr(top / "mine", CAPABILITY, NET_RAW),
    "set acl of root's": lambda top: os.setxattr(top / "readable", ACCESS, struct.pack("<I", 2)),
    "set user attribute of mine": lambda top: os.setxattr(top / "mine", "user.a", b"1"),
    "user attribute in sticky": lambda top: os.setxattr(top / "sticky", "user.a", b"1"),
    "access": lambda top: [os.access(top / "program", how) for how in (os.R_OK, os.W_OK, os.X_OK)],
    "execute": lambda top: os.execv(top / "program", ["program"]),
    "device": lambda top: os.mknod(top / "open/dev", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "set-group-id of others' group": lambda top: (
        (top / "open/g").touch(),
        (top / "open/g").chmod(0o2755),
        oct((top / "open/g").stat().st_mode),
    ),
}


def attempt(what: str, top: Path) -> object:
    value = ATTEMPTS[what](top)
    return value if isinstance(value, bytes | str | list | tuple) and "stat" not in what else None


def test_ordinary_user_may_do_what_it_may_on_ext4(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, ROOMS)
    for what in ATTEMPTS:

        def act(top: Path, what: str = what) -> object:
            return run_as(
                ALICE, lambda: outcome(lambda top: repr(attempt(what, top)), top), groups=[STAFF]
            )

        assert (what, outcome(act, pair.merged)) == (what, outcome(act, pair.plain))


# --- extended attributes -------------------------------------------------------------------------

THINGS: Tree = {
    "file": Node("text", mode=0o666),
    "dir/": Node(mode=0o777),
    "link": Symlink("file"),
    "fifo": Node(kind=stat.S_IFIFO, mode=0o666),
}
NAMES = ("user.a", "trusted.a", "security.a", "security.selinux", "system.a", "nothing.a", "user.")
MARKERS = (
    "trusted.overlay.opaque",
    "trusted.overlay.redirect",
    "trusted.overlay.metacopy",
    "trusted.overlay.origin",
    "trusted.overlay.mica.origin",
    "trusted.overlay.whiteout",
    "trusted.overlay.overlay.opaque",
    "user.overlay.opaque",
    "user.overlay.redirect",
    "user.overlay.overlay.x",
    "user.overlay.whiteout",
    "user.fuseoverlayfs.opaque",
    "user.fuseoverlayfs.origin",
)


def keep(path: Path, name: str) -> object:
    os.setxattr(path, name, b"value", follow_symlinks=False)
    return os.getxattr(path, name, follow_symlinks=False), os.listxattr(path, follow_symlinks=False)


@pytest.mark.parametrize("thing", ["file", "dir", "link", "fifo"])
def test_namespaces_are_kept_as_on_ext4(stack: Stacks, scratch: Path, thing: str) -> None:
    pair = Pair(stack, scratch, THINGS)
    for name in NAMES:
        pair.same(lambda root, name=name: keep(root / thing, name))
        assert shown(pair.merged / thing) == shown(pair.plain / thing)
    for name in NAMES:
        pair.same(lambda root, name=name: os.removexattr(root / thing, name, follow_symlinks=False))
        assert shown(pair.merged / thing) == shown(pair.plain / thing)


def test_create_and_replace_flags_are_obeyed(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, THINGS)
    create, replace = os.XATTR_CREATE, os.XATTR_REPLACE
    for thing in ("file", "dir"):
        answers = [
            pair.same(lambda root, at=thing, how=how: os.setxattr(root / at, "user.b", b"1", how))
            for how in (replace, create, create, replace)
        ]
        assert answers == ["ENODATA", None, "EEXIST", None]


def test_large_values_round_trip_or_fail_as_on_ext4(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, THINGS)
    for size in (0, 1, 1000, 3900, 5000, 70_000):
        pair.same(lambda root, size=size: os.setxattr(root / "file", "user.big", b"v" * size))
        pair.same(lambda root: os.getxattr(root / "file", "user.big"))


@pytest.mark.parametrize("thing", ["file", "dir"])
def test_users_own_marker_names_round_trip(stack: Stacks, thing: str) -> None:
    s = stack({"file": "text", "dir/": None, "dir/below": "text"})
    path = s.merged / thing
    for name in MARKERS:
        os.setxattr(path, name, os.fsencode(name))
    for _ in range(2):
        assert sorted(os.listxattr(path)) == sorted(MARKERS)
        assert all(os.getxattr(path, name) == os.fsencode(name) for name in MARKERS)
        s.remount()
    for name in MARKERS:
        os.removexattr(path, name)
        assert errno_of(lambda name=name: os.getxattr(path, name)) == errno.ENODATA
    assert os.listxattr(path) == []


@pytest.mark.parametrize("value", [b"y", b"x", b"/other", b""])
def test_users_cannot_forge_a_marker(stack: Stacks, value: bytes) -> None:
    tree: dict[str | bytes, Content] = {"other/": None, "other/x": "y"}
    for name in MARKERS:
        tree |= {f"{name}/": None, f"{name}/file": "text", f"{name}/empty": ""}
        tree |= {f"{name}/dir/": None, f"{name}/dir/below": "text"}
    s = stack(tree)
    for name in MARKERS:
        for thing in ("", "file", "empty", "dir"):
            os.setxattr(s.merged / name / thing, name, value)
    s.remount()
    assert sorted(os.listdir(s.merged)) == sorted([*MARKERS, "other"])
    for name in MARKERS:
        top = s.merged / name
        assert (name, sorted(os.listdir(top))) == (name, ["dir", "empty", "file"])
        assert (name, (top / "file").read_text()) == (name, "text")
        assert (name, (top / "empty").read_text()) == (name, "")
        assert (name, (top / "dir/below").read_text()) == (name, "text")


def test_names_that_only_resemble_markers_are_stored_as_they_are(stack: Stacks) -> None:
    s = stack({"file": "text"})
    names = ["trusted.overlay", "trusted.overlayX", "user.overlayX.opaque"]
    for name in names:
        os.setxattr(s.merged / "file", name, b"y")
    assert sorted(os.listxattr(s.merged / "file")) == names
    assert [os.getxattr(s.upper / "file", name) for name in names] == [b"y"] * 3


def test_markers_are_hidden(stack: Stacks) -> None:
    s = stack({"dir/": None, "dir/file": "text" * 9999, "file": "text", "other": HardLink("file")})
    (s.merged / "dir/file").chmod(0o600)
    (s.merged / "dir").rename(s.merged / "moved")
    (s.merged / "file").write_text("new")
    for path in ("", "moved", "moved/file", "file", "other"):
        assert os.listxattr(s.merged / path) == []
    marked = {name for path in ("moved", "moved/file") for name in os.listxattr(s.upper / path)}
    assert {"trusted.overlay.redirect", "trusted.overlay.metacopy"} <= marked
    for name in marked:
        failed = errno_of(lambda name=name: os.getxattr(s.merged / "moved/file", name))
        assert failed == errno.ENODATA


def test_escaped_attributes_survive_copy_up(stack: Stacks) -> None:
    escaped = {"trusted.overlay.overlay.opaque": b"y", "user.overlay.overlay.a": b"b"}
    s = stack({"file": Node("text", xattrs=escaped)})
    (s.merged / "file").write_text("new")
    assert os.getxattr(s.merged / "file", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(s.merged / "file", "user.overlay.a") == b"b"
    assert {name: os.getxattr(s.upper / "file", name) for name in escaped} == escaped


def test_trusted_names_are_listed_for_root_alone(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, THINGS)
    for name in ("user.a", "trusted.a", "security.a"):
        pair.same(lambda root, name=name: os.setxattr(root / "file", name, b"1"))
    for who in (0, ALICE):

        def names(root: Path, who: int = who) -> list[str]:
            return run_as(who, lambda: sorted(os.listxattr(root / "file")))

        assert ("trusted.a" in pair.same(names)) == (who == 0)  # type: ignore[operator]


def test_user_cannot_read_trusted_attributes(stack: Stacks, scratch: Path) -> None:
    pair = Pair(stack, scratch, THINGS)
    pair.same(lambda root: os.setxattr(root / "file", "trusted.a", b"1"))

    def read(root: Path) -> object:
        return run_as(ALICE, lambda: os.getxattr(root / "file", "trusted.a"))

    assert pair.same(read) == "ENODATA"


def test_setxattr_on_symlink_does_not_follow(stack: Stacks) -> None:
    s = stack({"link": Symlink("file"), "file": "text"})
    os.setxattr(s.merged / "link", "trusted.a", b"1", follow_symlinks=False)
    assert os.getxattr(s.upper / "link", "trusted.a", follow_symlinks=False) == b"1"
    assert os.listxattr(s.merged / "link", follow_symlinks=False) == ["trusted.a"]
    assert os.listxattr(s.merged / "file") == []
    assert not (s.upper / "file").exists()


def test_whiteout_device_cannot_be_made(stack: Stacks) -> None:
    s = stack({"file": "text", "dir/": None})
    (s.merged / "file").unlink()
    for name in ("new", "file", "dir/new"):
        whiteout = stat.S_IFCHR | 0o600
        with pytest.raises(PermissionError):
            os.mknod(s.merged / name, whiteout, 0)
    assert os.listdir(s.merged) == ["dir"]
