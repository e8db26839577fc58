"""Random calls by several users on mica and on kernel overlayfs, over the same populated layers.

After every call that may change something both trees must look the same, and every object that mica
showed before must still have its inode number. At the end of a run the whole trees, contents and
attributes included, must agree, the upper that mica wrote must be without faults, and each upper
must show the same tree under the other implementation.

`MICA_TWIN_EXAMPLES=500 pytest tests/test_t5_twin.py` looks longer and elsewhere.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support import twin
from tests.support.dump import PHANTOM, Dump, diff_dumps
from tests.support.twin import KernelSide, MicaSide, Node, Op, Outcome, Side
from unionfs.check import check_upper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = [pytest.mark.root, pytest.mark.fuse]

EXAMPLES = int(os.environ.get("MICA_TWIN_EXAMPLES", "0"))
"""None asked for: a short run that tries the same every time."""
SHORT_EXAMPLES, STEPS = 25, 40

QUESTIONS = frozenset({"read", "hread", "hstat", "getxattr", "listxattr", "stat", "access"})
"""Verbs after which the trees need not be compared again."""


# --- what the calls are made of -----------------------------------------------------------------

names = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"\xff\xfe", b"n" * 255])
lower_paths = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join)
users = st.sampled_from([0, 0, 0, 1000, 1001])
owners = st.sampled_from([0, 1000, 1000, 1001])
file_modes = st.sampled_from([0o644, 0o666, 0o777, 0o600, 0o4755, 0o2775, 0o6777, 0o2666, 0])
dir_modes = st.sampled_from([0o777, 0o777, 0o755, 0o1777, 0o2777, 0o700, 0o3775])
umasks = st.sampled_from([0o022, 0, 0o077])
contents = st.sampled_from([b"", b"x", b"mica\n", b"y" * 4096, b"z" * 5000])
sizes = st.sampled_from([0, 1, 3, 4096, 6000])
offsets = st.sampled_from([0, 2, 4095, 10_000])
link_targets = st.sampled_from([b"a", b"b", b"c", b"a/b", b"b/c", b".", b"missing", b"a/missing"])
old_times = st.sampled_from([0, 1, 10**9, 123_456_789_123_456_789])
handles = st.integers(0, 2)
follow = st.sampled_from([True, True, False])


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as the attribute spells it (linux/posix_acl_xattr.h): (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
PLAIN_ACL = acl((USER_OBJ, 6, NOBODY), (GROUP_OBJ, 4, NOBODY), (OTHER, 0, NOBODY))
NAMED_ACL = acl(
    (USER_OBJ, 7, NOBODY),
    (USER, 6, 1001),
    (GROUP_OBJ, 5, NOBODY),
    (GROUP, 7, 100),
    (MASK, 6, NOBODY),
    (OTHER, 0, NOBODY),
)
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # linux/capability.h, revision 2

attributes = st.sampled_from(
    [
        ("user.mica", b"one"),
        ("user.mica", b""),
        ("user.other", b"v" * 300),
        ("user.overlay.mine", b"y"),
        ("trusted.mica", b"two"),
        ("trusted.overlay.opaque", b"y"),
        ("trusted.overlayX", b"no marker"),
        ("security.capability", CAPABILITY),
        ("system.posix_acl_access", PLAIN_ACL),
        ("system.posix_acl_access", NAMED_ACL),
        ("system.posix_acl_default", NAMED_ACL),
        ("system.posix_acl_access", b"nonsense"),
    ]
)
lower_attributes = st.sampled_from(
    [
        (),
        (),
        (("user.mica", b"lower"),),
        (("trusted.mica", b"lower"),),
        (("security.capability", CAPABILITY),),
        (("system.posix_acl_access", NAMED_ACL),),
    ]
)
open_flags = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        os.O_WRONLY | os.O_CREAT,
        os.O_WRONLY | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_APPEND,
        os.O_RDONLY | os.O_TRUNC,
        os.O_RDONLY | os.O_NOFOLLOW,
        os.O_RDONLY | os.O_DIRECTORY,
    ]
)
held_flags = st.sampled_from([os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_APPEND])
write_flags = st.sampled_from([0, os.O_APPEND, os.O_TRUNC, os.O_CREAT, os.O_CREAT | os.O_EXCL])


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    kind = draw(
        st.sampled_from(
            [
                "directory",
                "directory",
                "directory",
                "file",
                "file",
                "file",
                "symlink",
                "link",
                "whiteout",
                "fifo",
                "device",
            ]
        )
    )
    data = b""
    if kind == "file":
        data = draw(contents)
    elif kind == "symlink":
        data = draw(link_targets)
    elif kind == "link":
        data = draw(lower_paths)
    return Node(
        kind,
        draw(lower_paths),
        mode=draw(dir_modes if kind == "directory" else file_modes),
        owner=draw(owners),
        data=data,
        xattrs=draw(lower_attributes),
        mtime_s=draw(st.integers(1, 100)),
        opaque=kind == "directory" and draw(st.integers(0, 5)) == 5,
    )


POPULATION = (
    Node("directory", b"a", 0o777),
    Node("file", b"a/a", 0o666, 1000, b"lower\n", (("user.mica", b"lower"),)),
    Node("link", b"a/b", data=b"a/a"),
    Node("directory", b"a/c", 0o2777, 1000),
    Node("file", b"a/c/a", 0o4755, 1000, b"w" * 5000),
    Node("symlink", b"a/c/b", owner=1000, data=b"a"),
    Node("directory", b"b", 0o777, 1001),
    Node("file", b"b/a", 0o644, 1001, b"owned"),
    Node("link", b"b/b", data=b"a/a"),
    Node("directory", b"b/c", 0o755, 1001),
    Node("fifo", b"b/c/a", 0o666),
    Node("file", b"c", 0o666, 1000, b"at the top"),
)
"""What the lowest layer holds where the drawn nodes leave room, so that no tree is bare."""

layers = st.lists(nodes(), max_size=12)
stacks = st.tuples(
    st.lists(layers, max_size=2), layers.map(lambda drawn: [*drawn, *POPULATION])
).map(lambda drawn: [*drawn[0], drawn[1]])

numbers = st.integers(0, 40)
known = st.tuples(st.just("known"), numbers, st.just(b""))
leaf = st.tuples(st.just("leaf"), numbers, st.just(b""))
directory = st.tuples(st.just("directory"), numbers, st.just(b""))
fresh = st.tuples(st.just("fresh"), numbers, names)
below = st.tuples(st.just("below"), numbers, names)
"""A new name below anything at all: a file, a symlink, a directory."""
somewhere = st.one_of(known, known, known, known, fresh, below)
content = st.one_of(leaf, leaf, leaf, leaf, somewhere)
folder = st.one_of(directory, directory, directory, somewhere)
unused = st.one_of(fresh, fresh, fresh, known)
Where = tuple[str, int, bytes]


# --- the machine --------------------------------------------------------------------------------


class Twins(RuleBasedStateMachine):
    """Two sides, the calls made on both, and what must be equal."""

    def __init__(self, ground: Path) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(dir=ground))
        self.base.chmod(0o755)
        self.cast = twin.Cast()
        self.sides: list[Side] = []
        self.tree: Dump = {}
        self.phantoms: set[bytes] = set()
        self.held: set[int] = set()
        self.sound = False

    @initialize(stack=stacks)
    def start(self, stack: Sequence[Sequence[Node]]) -> None:
        self.kernel = KernelSide(self.base / "k", stack)
        self.sides.append(self.kernel)
        self.mica = MicaSide(self.base / "m", stack)
        self.sides.append(self.mica)
        self.kernel.mount()
        self.mica.mount()
        self.look(lambda path: path)
        self.sound = True

    def teardown(self) -> None:
        try:
            if self.sound:
                self.finish()
        finally:
            self.cast.__exit__()
            twin.let_go(*self.sides)
            shutil.rmtree(self.base)

    # what is compared

    def both(self, verb: str, *args: Any, uid: int = 0) -> bool:
        """Make one call on both sides, compare what can be seen of it, say if it succeeded."""
        op = Op(verb, args, uid)
        note(repr(op))
        self.sound = False
        theirs, ours = (self.cast.call(side, op) for side in (self.kernel, self.mica))
        if not self.same(verb, theirs, ours):
            pytest.fail(f"{op!r}: overlayfs {theirs!r}, mica {ours!r}")
        if verb in ("open", "hold") or (verb == "write" and args[2] == b""):
            self.even_out_times()
        if verb not in QUESTIONS:
            self.look(functools.partial(self.moved, op, succeeded=ours.error is None))
        self.sound = True
        return ours.error is None

    def same(self, verb: str, theirs: Outcome, ours: Outcome) -> bool:
        if verb == "listdir" and isinstance(theirs.value, list) and isinstance(ours.value, list):
            return set(theirs.value) - self.phantoms == set(ours.value) - self.phantoms
        if theirs.error != ours.error:
            return (verb, theirs.error, ours.error) in twin.ALLOWED_OUTCOMES
        return theirs == ours

    def look(self, moved: Callable[[bytes], bytes | None]) -> None:
        """Compare both trees, and mica's inode numbers with those it had before."""
        kernel, mica = (self.cast.dump(side, "snapshot") for side in (self.kernel, self.mica))
        self.phantoms = {
            path.rpartition(b"/")[2] for path in kernel if kernel[path].kind == PHANTOM
        }
        faults = diff_dumps(twin.settled(kernel, phantoms=False), twin.settled(mica))
        faults += twin.steady_numbers(self.tree, mica, moved)
        if faults:
            pytest.fail("overlayfs -> mica:\n" + "\n".join(faults))
        self.tree = mica

    def even_out_times(self) -> None:
        """Undo what overlayfs does beside opening (see twin.ALLOWED_FIELDS): mica keeps the time."""
        kernel, mica = (self.cast.dump(side, "snapshot") for side in (self.kernel, self.mica))
        for path in mica.keys() & self.tree.keys() & kernel.keys():
            kept = mica[path].mtime_ns
            is_kept = mica[path].kind == "file" and kept == self.tree[path].mtime_ns
            if is_kept and kept is not None and kept < twin.OLD_NS < (kernel[path].mtime_ns or 0):
                self.cast.call(self.kernel, Op("utimens", (path, (kept, kept), False)))

    def moved(self, op: Op, path: bytes, *, succeeded: bool) -> bytes | None:
        """Where the object that was at `path` is after `op`; None if that is not certain."""
        if op.verb != "rename" or not succeeded:
            return path
        old, new, flags = op.args
        if not (self.is_plain(old) and self.is_plain(new)):
            return None
        if path == old or path.startswith(old + b"/"):
            return bytes(new + path[len(old) :])
        if path == new or path.startswith(new + b"/"):
            return bytes(old + path[len(new) :]) if flags & twin.RENAME_EXCHANGE else None
        return path

    def is_plain(self, path: bytes) -> bool:
        """Whether no symlink stands between the root and the last name of `path`."""
        parents = path.split(b"/")[:-1]
        return all(
            self.tree[b"/".join(parents[: depth + 1])].kind == "directory"
            for depth in range(len(parents))
            if b"/".join(parents[: depth + 1]) in self.tree
        )

    def finish(self) -> None:
        """The whole trees, the upper's soundness, and each upper under the other implementation."""
        note("finish")
        kernel, mica = (self.cast.dump(side) for side in (self.kernel, self.mica))
        self.agree("overlayfs -> mica", twin.settled(kernel, phantoms=False), twin.settled(mica))
        for side in (self.kernel, self.mica):
            self.cast.release(side)
            side.unmount()
        for side, work in ((self.kernel, None), (self.mica, bytes(self.mica.work))):
            faults = check_upper(bytes(side.upper), [bytes(lower) for lower in side.lowers], work)
            if faults:
                pytest.fail(f"upper written by {side.name}:\n" + "\n".join(map(str, faults)))
        assert list((self.mica.work / "work").iterdir()) == []
        for side, own, other in ((self.mica, mica, KernelSide), (self.kernel, kernel, MicaSide)):
            reader = twin.swapped(side, other)
            self.sides.append(reader)
            reader.mount()
            foreign = self.cast.dump(reader)
            reader.unmount()
            pair = twin.exchangeable(own, foreign, side.upper)
            self.agree(f"upper written by {side.name}, read by {reader.name}", *pair)

    @staticmethod
    def agree(title: str, first: Dump, second: Dump) -> None:
        faults = diff_dumps(first, second)
        if faults:
            pytest.fail(f"{title}:\n" + "\n".join(faults))

    # where the calls go

    def at(self, where: Where) -> bytes:
        """The path that a drawn place means in the tree as it is now."""
        form, number, name = where
        paths = [path for path in self.tree if path]
        if form in ("directory", "fresh"):
            paths = [path for path in paths if self.tree[path].kind == "directory"]
        elif form == "leaf":
            paths = [path for path in paths if self.tree[path].kind != "directory"]
        if form in ("known", "leaf", "directory"):
            return paths[number % len(paths)] if paths else b"a"
        parent = ([b"", *paths])[number % (len(paths) + 1)]
        return parent + b"/" + name if parent else name

    # files and their contents

    @rule(where=content, flags=open_flags, mode=file_modes, umask=umasks, uid=users)
    def open(self, where: Where, flags: int, mode: int, umask: int, uid: int) -> None:
        self.both("open", self.at(where), flags, mode, umask, uid=uid)

    @rule(where=unused, mode=file_modes, umask=umasks, uid=users)
    def create(self, where: Where, mode: int, umask: int, uid: int) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        self.both("open", self.at(where), flags, mode, umask, uid=uid)

    @rule(
        where=content,
        flags=write_flags,
        data=contents,
        offset=st.one_of(st.none(), offsets),
        uid=users,
    )
    def write(self, where: Where, flags: int, data: bytes, offset: int | None, uid: int) -> None:
        self.both("write", self.at(where), flags, data, offset, uid=uid)

    @rule(where=content, uid=users)
    def read(self, where: Where, uid: int) -> None:
        self.both("read", self.at(where), uid=uid)

    @rule(where=content, size=sizes, uid=users)
    def truncate(self, where: Where, size: int, uid: int) -> None:
        self.both("truncate", self.at(where), size, uid=uid)

    @rule(handle=handles, where=leaf, flags=held_flags)
    def hold(self, handle: int, where: Where, flags: int) -> None:
        if self.both("hold", handle, self.at(where), flags):
            self.held.add(handle)

    @precondition(lambda self: self.held)
    @rule(number=handles, data=contents, offset=offsets)
    def write_held(self, number: int, data: bytes, offset: int) -> None:
        self.both("hwrite", self.one_held(number), data, offset)
        self.both("hstat", self.one_held(number))

    @precondition(lambda self: self.held)
    @rule(number=handles, offset=offsets)
    def read_held(self, number: int, offset: int) -> None:
        self.both("hread", self.one_held(number), 8192, offset)
        self.both("hstat", self.one_held(number))

    @precondition(lambda self: self.held)
    @rule(number=handles, size=sizes, mode=file_modes)
    def change_held(self, number: int, size: int, mode: int) -> None:
        self.both("htruncate", self.one_held(number), size)
        self.both("hchmod", self.one_held(number), mode)
        self.both("hstat", self.one_held(number))

    def one_held(self, number: int) -> int:
        return sorted(self.held)[number % len(self.held)]

    # names

    @rule(where=unused, mode=dir_modes, umask=umasks, uid=users)
    def mkdir(self, where: Where, mode: int, umask: int, uid: int) -> None:
        self.both("mkdir", self.at(where), mode, umask, uid=uid)

    @rule(
        where=unused,
        kind=st.sampled_from([(stat.S_IFIFO, 0), (stat.S_IFCHR, 0), (stat.S_IFCHR, 0x103)]),
        mode=file_modes,
        umask=umasks,
        uid=users,
    )
    def mknod(self, where: Where, kind: tuple[int, int], mode: int, umask: int, uid: int) -> None:
        self.both("mknod", self.at(where), kind[0] | mode, kind[1], umask, uid=uid)

    @rule(text=link_targets, where=unused, uid=users)
    def symlink(self, text: bytes, where: Where, uid: int) -> None:
        self.both("symlink", text, self.at(where), uid=uid)

    @rule(source=content, where=unused, uid=users)
    def link(self, source: Where, where: Where, uid: int) -> None:
        self.both("link", self.at(source), self.at(where), uid=uid)

    @rule(where=content, uid=users)
    def unlink(self, where: Where, uid: int) -> None:
        self.both("unlink", self.at(where), uid=uid)

    @rule(where=folder, uid=users)
    def rmdir(self, where: Where, uid: int) -> None:
        self.both("rmdir", self.at(where), uid=uid)

    @rule(old=somewhere, new=somewhere, uid=users)
    def rename(self, old: Where, new: Where, uid: int) -> None:
        self.both("rename", self.at(old), self.at(new), 0, uid=uid)

    @rule(old=known, new=unused)
    def move(self, old: Where, new: Where) -> None:
        self.both("rename", self.at(old), self.at(new), twin.RENAME_NOREPLACE)

    @rule(old=somewhere, new=somewhere, uid=users)
    def exchange(self, old: Where, new: Where, uid: int) -> None:
        self.both("rename", self.at(old), self.at(new), twin.RENAME_EXCHANGE, uid=uid)

    # attributes

    @rule(where=somewhere, mode=st.one_of(file_modes, dir_modes), uid=users)
    def chmod(self, where: Where, mode: int, uid: int) -> None:
        self.both("chmod", self.at(where), mode, uid=uid)

    @rule(
        where=somewhere,
        uid=users,
        owner=owners,
        group=st.sampled_from([-1, 0, 100, 1000]),
        follow=follow,
    )
    def chown(self, where: Where, uid: int, owner: int, group: int, follow: bool) -> None:
        self.both("chown", self.at(where), owner, group, follow, uid=uid)

    @rule(where=somewhere, times=st.tuples(old_times, old_times), follow=follow, uid=users)
    def utimens(self, where: Where, times: tuple[int, int], follow: bool, uid: int) -> None:
        self.both("utimens", self.at(where), times, follow, uid=uid)

    @rule(where=somewhere, uid=users)
    def touch(self, where: Where, uid: int) -> None:
        self.both("touch", self.at(where), uid=uid)

    @rule(
        where=known,
        attribute=attributes,
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
        follow=follow,
        uid=users,
    )
    def setxattr(
        self, where: Where, attribute: tuple[str, bytes], flags: int, follow: bool, uid: int
    ) -> None:
        path = self.at(where)
        self.both("setxattr", path, *attribute, flags, follow, uid=uid)
        self.both("getxattr", path, attribute[0], follow, uid=uid)
        self.both("listxattr", path, follow, uid=uid)

    @rule(where=known, attribute=attributes, follow=follow, uid=users)
    def removexattr(
        self, where: Where, attribute: tuple[str, bytes], follow: bool, uid: int
    ) -> None:
        self.both("removexattr", self.at(where), attribute[0], follow, uid=uid)

    @rule(where=known, attribute=attributes, uid=users)
    def questions(self, where: Where, attribute: tuple[str, bytes], uid: int) -> None:
        path = self.at(where)
        self.both("stat", path, uid=uid)
        self.both("access", path, os.R_OK, uid=uid)
        self.both("access", path, os.W_OK, uid=uid)
        self.both("access", path, os.X_OK, uid=uid)
        self.both("getxattr", path, attribute[0], uid=uid)
        self.both("listxattr", path, uid=uid)
        self.both("listdir", path, uid=uid)
        self.both("namemax")

    # the mount

    @rule()
    def remount(self) -> None:
        note("remount")
        self.sound = False
        for side in (self.kernel, self.mica):
            self.cast.release(side)
            self.held.clear()
            side.unmount()
            side.mount()
        self.look(lambda path: path)
        self.sound = True


def test_random_calls_have_the_same_effect_as_on_overlayfs(scratch: Path) -> None:
    scratch.chmod(0o755)
    run_state_machine_as_test(
        functools.partial(Twins, scratch),  # type: ignore[arg-type]  # any factory will do
        settings=settings(
            max_examples=EXAMPLES or SHORT_EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
