"""Each contradiction that an upper can hold, made by hand; and what must not be called one."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from unionfs import markers
from unionfs.check import Fault, FaultKind, check_upper

pytestmark = pytest.mark.root

TRUSTED = "trusted.overlay."
USER = "user.overlay."


class Tree:
    """A layer to be made by chained calls; keywords are markers, `__` in them stands for a dot."""

    def __init__(self, root: Path, prefix: str = TRUSTED) -> None:
        self.root = root
        self.prefix = prefix

    def mark(self, path: str, **marks: bytes) -> Tree:
        for marker, value in marks.items():
            name = self.prefix + marker.replace("__", ".")
            os.setxattr(self.root / path, name, value, follow_symlinks=False)
        return self

    def raw(self, path: str, name: str, value: bytes) -> Tree:
        os.setxattr(self.root / path, name, value, follow_symlinks=False)
        return self

    def dir(self, path: str, **marks: bytes) -> Tree:
        (self.root / path).mkdir()
        return self.mark(path, **marks)

    def file(self, path: str, data: bytes = b"", **marks: bytes) -> Tree:
        (self.root / path).write_bytes(data)
        return self.mark(path, **marks)

    def whiteout(self, path: str, mode: int = 0) -> Tree:
        os.mknod(self.root / path, stat.S_IFCHR | mode, os.makedev(0, 0))
        return self

    def node(self, path: str, kind: int, **marks: bytes) -> Tree:
        os.mknod(self.root / path, kind | 0o600, os.makedev(1, 3))
        return self.mark(path, **marks)

    def symlink(self, path: str, target: str, **marks: bytes) -> Tree:
        (self.root / path).symlink_to(target)
        return self.mark(path, **marks)


def found(upper: Path, faults: list[Fault]) -> list[tuple[str, FaultKind]]:
    return sorted(
        ((os.path.relpath(os.fsdecode(fault.path), upper), fault.kind) for fault in faults),
        key=str,
    )


@pytest.fixture
def upper(scratch: Path) -> Path:
    folder = scratch / "upper"
    folder.mkdir()
    return folder


K = FaultKind
ORIGIN = markers.pack_origin(77)
DIGEST = bytes([0, 36, 0, 1]) + bytes(32)
Build = Callable[[Tree], object]

CONTRADICTIONS: list[tuple[Build, list[tuple[str, FaultKind]]]] = [
    # whiteouts
    (
        lambda u: u.dir("d", opaque=b"y").whiteout("d/a").file("d/b"),
        [("d/a", K.WHITEOUT_IN_OPAQUE)],
    ),
    (lambda u: u.dir("d", opaque=b"y").file("d/.wh.a"), [("d/.wh.a", K.WHITEOUT_IN_OPAQUE)]),
    (
        lambda u: u.dir("d").file("d/.wh..wh..opq").file("d/.wh.a").whiteout("d/b"),
        [("d/.wh.a", K.WHITEOUT_IN_OPAQUE), ("d/b", K.WHITEOUT_IN_OPAQUE)],
    ),
    (
        lambda u: u.dir("d").raw("d", "user.fuseoverlayfs.opaque", b"y").whiteout("d/a"),
        [("d/a", K.WHITEOUT_IN_OPAQUE)],
    ),
    (
        lambda u: u.dir("d", opaque=b"y").file("d/a", whiteout=b""),
        [("d/a", K.WHITEOUT_IN_OPAQUE)],
    ),
    (lambda u: u.file(".wh."), [(".wh.", K.WHITEOUT_NAME)]),
    (
        lambda u: u.file(".wh..").file(".wh..."),
        [(".wh..", K.WHITEOUT_NAME), (".wh...", K.WHITEOUT_NAME)],
    ),
    (lambda u: u.file(".wh.a", b"data"), [(".wh.a", K.WHITEOUT_SHAPE)]),
    (lambda u: u.dir(".wh.a").file(".wh.a/b"), [(".wh.a", K.WHITEOUT_SHAPE)]),
    (
        lambda u: u.dir("d", opaque=b"x").file("d/a", b"data", whiteout=b""),
        [("d/a", K.WHITEOUT_SHAPE)],
    ),
    (lambda u: u.dir("d").file("d/a", whiteout=b""), [("d/a", K.WHITEOUT_UNREAD)]),
    (lambda u: u.file("a", whiteout=b""), [("a", K.WHITEOUT_UNREAD)]),
    # opaque
    (lambda u: u.file("a", opaque=b"y"), [("a", K.OPAQUE_ON_FILE)]),
    (lambda u: u.file("a").raw("a", "user.fuseoverlayfs.opaque", b"y"), [("a", K.OPAQUE_ON_FILE)]),
    (lambda u: u.dir("d", opaque=b"1"), [("d", K.OPAQUE_VALUE)]),
    (lambda u: u.dir("d", opaque=b""), [("d", K.OPAQUE_VALUE)]),
    (lambda u: u.dir("d", opaque=b"yy"), [("d", K.OPAQUE_VALUE)]),
    (lambda u: u.mark("", opaque=b"n"), [(".", K.OPAQUE_VALUE)]),
    # redirect
    (lambda u: u.file("a", b"data", redirect=b"/b"), []),
    (lambda u: u.dir("d", redirect=b"a", opaque=b"y"), [("d", K.REDIRECT_OPAQUE)]),
    *(
        (lambda u, value=value: u.dir("d", redirect=value), [("d", K.REDIRECT_VALUE)])
        for value in [b"", b".", b"..", b"a/b", b"/", b"//a", b"/a//b", b"/a/", b"/a/../b"]
    ),
    (lambda u: u.dir("d", redirect=b"/./a"), [("d", K.REDIRECT_VALUE)]),
    (lambda u: u.dir("d", redirect=b"a\0b"), [("d", K.REDIRECT_VALUE)]),
    (lambda u: u.file("a", redirect=b"..", metacopy=b""), [("a", K.REDIRECT_VALUE)]),
    # metacopy
    (lambda u: u.dir("d", metacopy=b""), [("d", K.METACOPY_ON_OTHER)]),
    (lambda u: u.file("a", metacopy=b"x"), [("a", K.METACOPY_VALUE)]),
    (lambda u: u.file("a", metacopy=bytes([0, 2])), [("a", K.METACOPY_VALUE)]),
    (lambda u: u.file("a", metacopy=bytes([1, 4, 0, 0])), [("a", K.METACOPY_VALUE)]),
    (lambda u: u.file("a", metacopy=DIGEST + b"x"), [("a", K.METACOPY_VALUE)]),
    # origin
    (
        lambda u: u.mark("", impure=b"y").file("a", mica__origin=ORIGIN + b"x"),
        [("a", K.ORIGIN_VALUE)],
    ),
    (
        lambda u: u.mark("", impure=b"y").file("a", mica__origin=ORIGIN[:8] + b"\2" + ORIGIN[9:]),
        [("a", K.ORIGIN_VALUE)],
    ),
    (lambda u: u.dir("d").dir("d/e", mica__origin=b""), [("d/e", K.ORIGIN_VALUE)]),
    (lambda u: u.dir("d").file("d/a", mica__origin=ORIGIN), [("d/a", K.ORIGIN_NOT_IMPURE)]),
    (lambda u: u.file("a", mica__origin=ORIGIN), [("a", K.ORIGIN_NOT_IMPURE)]),
    # nlink
    (lambda u: u.dir("d", nlink=b"U+1"), [("d", K.NLINK_ON_DIRECTORY)]),
    *(
        (lambda u, value=value: u.file("a", nlink=value), [("a", K.NLINK_VALUE)])
        for value in (b"", b"U", b"1", b"U1", b"X+1", b"U+", b"U+1x", b"U+12345678901")
    ),
    # several at once, and deeper down
    (
        lambda u: u.dir("a").dir("a/b").dir("a/b/c", opaque=b"?").dir("z", opaque=b"!"),
        [("a/b/c", K.OPAQUE_VALUE), ("z", K.OPAQUE_VALUE)],
    ),
    (
        lambda u: u.file("a", opaque=b"y", redirect=b"/b", nlink=b"?"),
        [("a", K.NLINK_VALUE), ("a", K.OPAQUE_ON_FILE)],
    ),
]


@pytest.mark.parametrize("prefix", [TRUSTED, USER])
@pytest.mark.parametrize(("build", "expected"), CONTRADICTIONS)
def test_contradiction(
    upper: Path, build: Build, expected: list[tuple[str, FaultKind]], prefix: str
):
    build(Tree(upper, prefix))
    faults = check_upper(bytes(upper))
    assert found(upper, faults) == expected
    assert all("\n" not in str(fault) and fault.message in str(fault) for fault in faults)


# `user.` attributes cannot be set on these.
ON_SPECIAL_FILES: list[tuple[Build, list[tuple[str, FaultKind]]]] = [
    (lambda u: u.symlink("a", "b", opaque=b"y"), [("a", K.OPAQUE_ON_FILE)]),
    (
        lambda u: u.symlink("a", "b", redirect=b"/c", metacopy=b""),
        [
            ("a", K.METACOPY_ON_OTHER),
            ("a", K.REDIRECT_ON_FILE),
        ],
    ),
    (lambda u: u.node("a", stat.S_IFIFO, metacopy=b""), [("a", K.METACOPY_ON_OTHER)]),
    (lambda u: u.node("a", stat.S_IFBLK, redirect=b"/c"), [("a", K.REDIRECT_ON_FILE)]),
    (lambda u: u.symlink("a", "b", mica__origin=ORIGIN), [("a", K.ORIGIN_NOT_IMPURE)]),
    (lambda u: u.node("a", stat.S_IFCHR, nlink=b"?"), [("a", K.NLINK_VALUE)]),
    (lambda u: u.symlink(".wh.a", "b"), [(".wh.a", K.WHITEOUT_SHAPE)]),
    (lambda u: u.node(".wh.a", stat.S_IFIFO), [(".wh.a", K.WHITEOUT_SHAPE)]),
]


@pytest.mark.parametrize(("build", "expected"), ON_SPECIAL_FILES)
def test_contradiction_on_a_special_file(
    upper: Path, build: Build, expected: list[tuple[str, FaultKind]]
):
    build(Tree(upper))
    assert found(upper, check_upper(bytes(upper))) == expected


SOUND: list[Build] = [
    lambda u: u,
    lambda u: u.file("a", b"data").dir("d").file("d/b").symlink("s", "/etc"),
    lambda u: u.whiteout("a").whiteout("b", 0o644),
    lambda u: u.dir("d").whiteout("d/a").file("d/.wh.b"),
    lambda u: u.file("a", b"data").file(".wh.a").dir("d").file(".wh.d"),
    lambda u: u.file(".wh..wh.aufs").dir(".wh..wh.plnk").file(".wh..wh.plnk/1.2", b"data"),
    lambda u: u.dir("d").file("d/.wh..wh..opq").file("d/a"),
    lambda u: u.dir("d", opaque=b"y").file("d/a").dir("d/e").whiteout("d/e/b"),
    lambda u: u.dir("d", opaque=b"x").file("d/a", whiteout=b"").whiteout("d/b"),
    lambda u: u.mark("", opaque=b"x").file("a", whiteout=b"y"),
    lambda u: u.dir("d", redirect=b"old").dir("e", redirect=b"/a/b").dir("f", redirect=b"...."),
    lambda u: u.file("a", metacopy=b"").file("b", metacopy=DIGEST, redirect=b"/x"),
    lambda u: u.file("a", metacopy=bytes([0, 4, 0, 0])),
    lambda u: u.mark("", impure=b"y").file("a", mica__origin=ORIGIN),
    lambda u: u.dir("d", impure=b"y").file("d/a", mica__origin=ORIGIN, nlink=b"U-1"),
    lambda u: u.dir("d", mica__origin=ORIGIN),
    lambda u: u.file("a", nlink=b"U+0").file("b", nlink=b"L-3"),
    lambda u: u.file("a", overlay__opaque=b"z").dir("d", overlay__redirect=b".."),
    lambda u: u.file("a", overlay__mica__origin=b"z", overlay__metacopy=b"z"),
    lambda u: u.file("a").raw("a", "user.overlayopaque", b"y").raw("a", "user.opaque", b"z"),
    lambda u: u.node("c", stat.S_IFCHR).node("b", stat.S_IFBLK).node("f", stat.S_IFIFO),
]


@pytest.mark.parametrize("prefix", [TRUSTED, USER])
@pytest.mark.parametrize("build", SOUND)
def test_sound(upper: Path, build: Build, prefix: str):
    build(Tree(upper, prefix))
    assert check_upper(bytes(upper)) == []


def test_every_dialect_is_read_at_once(upper: Path):
    Tree(upper, TRUSTED).dir("d", redirect=b"..")
    Tree(upper, USER).mark("d", redirect=b"a/b")
    details = [fault.detail for fault in check_upper(bytes(upper))]
    assert details == ["redirect is '..'", "redirect is 'a/b'"]


# --- with the lowers ----------------------------------------------------------------------------

WITH_LOWERS: list[tuple[Callable[[Tree, Tree, Tree], object], list[tuple[str, FaultKind]]]] = [
    # a redirect leads somewhere
    (lambda u, a, _b: (u.dir("d", redirect=b"old"), a.dir("old")), []),
    (lambda u, _a, b: (u.dir("d", redirect=b"old"), b.dir("old")), []),
    (lambda u, _a, b: (u.dir("d", redirect=b"/x/old"), b.dir("x").dir("x/old")), []),
    (lambda u, _a, _b: u.dir("d", redirect=b"old"), [("d", K.REDIRECT_DANGLING)]),
    (lambda u, _a, b: (u.dir("d", redirect=b"old"), b.file("old")), [("d", K.REDIRECT_DANGLING)]),
    (
        lambda u, a, b: (u.dir("d", redirect=b"old"), a.whiteout("old"), b.dir("old")),
        [("d", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, b: (u.dir("d", redirect=b"old"), a.file("old"), b.dir("old")),
        [("d", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, b: (u.dir("d", redirect=b"old"), a.file(".wh.old"), b.dir("old")),
        [("d", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, b: (u.dir("d", redirect=b"old"), a.file(".wh.old"), a.dir("old"), b.dir("x")),
        [],
    ),
    # a symlink in a lower is never followed
    (
        lambda u, a, b: (u.dir("d", redirect=b"/s/old"), a.dir("x").dir("x/old").symlink("s", "x")),
        [("d", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, _b: (u.dir("d", redirect=b"s"), a.dir("x").symlink("s", "x")),
        [("d", K.REDIRECT_DANGLING)],
    ),
    # a name is looked up where its parent is merged from
    (
        lambda u, a, _b: (
            u.dir("d", redirect=b"old").dir("d/e", redirect=b"f"),
            a.dir("old").dir("old/f").dir("d"),
        ),
        [],
    ),
    (
        lambda u, a, _b: (u.dir("d", redirect=b"old").dir("d/e", redirect=b"f"), a.dir("old")),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, _b: (u.dir("d", opaque=b"y").dir("d/e", redirect=b"f"), a.dir("d").dir("d/f")),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, _b: (u.dir("d", opaque=b"y").dir("d/e", redirect=b"/f"), a.dir("f")),
        [],
    ),
    # redirects and opaque directories of the lowers themselves
    (
        lambda u, a, b: (
            u.dir("d").dir("d/e", redirect=b"f"),
            a.dir("d", redirect=b"/x"),
            b.dir("x").dir("x/f"),
        ),
        [],
    ),
    (
        lambda u, a, b: (
            u.dir("d").dir("d/e", redirect=b"f"),
            a.dir("d", redirect=b"x"),
            b.dir("d").dir("d/f"),
        ),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, b: (
            u.dir("d").dir("d/e", redirect=b"f"),
            a.dir("d", opaque=b"y"),
            b.dir("d").dir("d/f"),
        ),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, b: (
            u.dir("d").dir("d/e", redirect=b"f"),
            a.dir("d").file("d/.wh..wh..opq"),
            b.dir("d").dir("d/f"),
        ),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, _b: (
            u.dir("d").dir("d/e", redirect=b"f"),
            a.dir("d", redirect=b"x").dir("x").dir("x/f"),
        ),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    (
        lambda u, a, b: (
            u.dir("d").dir("d/e", redirect=b"f"),
            a.dir("d").file(".wh.d"),
            b.dir("d").dir("d/f"),
        ),
        [("d/e", K.REDIRECT_DANGLING)],
    ),
    # a metacopy has data
    (
        lambda u, a, b: (
            u.file("m", metacopy=b""),
            a.mark("", opaque=b"x").file("m", whiteout=b""),
            b.file("m", b"data"),
        ),
        [("m", K.METACOPY_WITHOUT_DATA)],
    ),
    (lambda u, a, _b: (u.file("m", metacopy=b""), a.file("m", b"data")), []),
    (lambda u, _a, b: (u.file("m", metacopy=b""), b.file("m", b"data")), []),
    (lambda u, _a, _b: u.file("m", metacopy=b""), [("m", K.METACOPY_WITHOUT_DATA)]),
    (
        lambda u, a, b: (
            u.file("m", metacopy=b""),
            a.file("m", metacopy=b"", redirect=b"/n"),
            b.file("n", b"data"),
        ),
        [],
    ),
    (
        lambda u, a, b: (u.file("m", metacopy=b""), a.file("m", metacopy=b""), b.file("n")),
        [("m", K.METACOPY_WITHOUT_DATA)],
    ),
    (
        lambda u, a, b: (u.file("m", metacopy=b""), a.dir("m"), b.file("m", b"data")),
        [("m", K.METACOPY_WITHOUT_DATA)],
    ),
    (
        lambda u, a, b: (u.file("m", metacopy=b""), a.whiteout("m"), b.file("m", b"data")),
        [("m", K.METACOPY_WITHOUT_DATA)],
    ),
    (
        lambda u, a, _b: (u.file("m", metacopy=b""), a.symlink("m", "n").file("n", b"data")),
        [("m", K.METACOPY_WITHOUT_DATA)],
    ),
    (
        lambda u, _a, b: (
            u.dir("d").file("d/m", metacopy=b"", redirect=b"/x/n"),
            b.dir("x").file("x/n", b"data"),
        ),
        [],
    ),
    (
        lambda u, a, _b: (
            u.dir("d", opaque=b"y").file("d/m", metacopy=b""),
            a.dir("d").file("d/m", b"data"),
        ),
        [("d/m", K.METACOPY_WITHOUT_DATA)],
    ),
    # what the upper alone has, and plain merges, need nothing below
    (lambda u, a, _b: (u.dir("d").file("d/f", b"1").whiteout("d/g"), a.file("d")), []),
    (
        lambda u, _a, _b: u.file("a" * 255).dir("b" * 255, redirect=b"/" + b"c" * 255),
        [
            ("b" * 255, K.REDIRECT_DANGLING),
        ],
    ),
]


@pytest.mark.parametrize("prefix", [TRUSTED, USER])
@pytest.mark.parametrize(("build", "expected"), WITH_LOWERS)
def test_what_markers_refer_to(
    upper: Path,
    scratch: Path,
    build: Callable[[Tree, Tree, Tree], object],
    expected: list[tuple[str, FaultKind]],
    prefix: str,
):
    lowers = [scratch / "a", scratch / "b"]
    for lower in lowers:
        lower.mkdir()
    build(Tree(upper, prefix), Tree(lowers[0], prefix), Tree(lowers[1], prefix))
    assert found(upper, check_upper(bytes(upper), [bytes(lower) for lower in lowers])) == expected
    without = [kind for _, kind in found(upper, check_upper(bytes(upper)))]
    assert without == []


# --- the work directory -------------------------------------------------------------------------

NAME = f"{77:016x}"
IN_WORK: list[tuple[Build, list[tuple[str, FaultKind]]]] = [
    (lambda w: w, []),
    (lambda w: w.dir("work").dir("links"), []),
    (lambda w: w.dir("index").file("index/00fb"), []),
    (lambda w: w.dir("work").whiteout("work/#6e40"), []),
    (
        lambda w: w.dir("work").file("work/#1").dir("work/#2"),
        [
            ("work/#1", K.WORK_LEFTOVER),
            ("work/#2", K.WORK_LEFTOVER),
        ],
    ),
    (lambda w: w.dir("work").dir("work/incompat"), [("work/incompat", K.WORK_LEFTOVER)]),
    (
        lambda w: w.dir("work").dir("work/incompat").dir("work/incompat/volatile"),
        [("work/incompat", K.WORK_VOLATILE)],
    ),
    (lambda w: w.dir("links").file(f"links/{NAME}", mica__origin=ORIGIN, nlink=b"U+1"), []),
    (lambda w: w.dir("links").symlink(f"links/{NAME}", "x"), []),
    (lambda w: w.dir("links").file("links/77"), [("links/77", K.LINK_NAME)]),
    (
        lambda w: w.dir("links").file("links/" + "G" * 16).file("links/" + "A" * 16),
        [("links/" + "A" * 16, K.LINK_NAME), ("links/" + "G" * 16, K.LINK_NAME)],
    ),
    (lambda w: w.dir("links").dir(f"links/{NAME}"), [(f"links/{NAME}", K.LINK_SHAPE)]),
    (lambda w: w.dir("links").file(f"links/{NAME}"), [(f"links/{NAME}", K.LINK_ORIGIN)]),
    (
        lambda w: w.dir("links").file(f"links/{NAME}", mica__origin=markers.pack_origin(78)),
        [(f"links/{NAME}", K.LINK_ORIGIN)],
    ),
    (
        lambda w: w.dir("links").file(f"links/{NAME}", mica__origin=b"short"),
        [(f"links/{NAME}", K.LINK_ORIGIN)],
    ),
    (
        lambda w: w.dir("links").file(f"links/{NAME}", mica__origin=ORIGIN, nlink=b"many"),
        [(f"links/{NAME}", K.NLINK_VALUE)],
    ),
]


@pytest.mark.parametrize("prefix", [TRUSTED, USER])
@pytest.mark.parametrize(("build", "expected"), IN_WORK)
def test_work_directory(
    upper: Path, scratch: Path, build: Build, expected: list[tuple[str, FaultKind]], prefix: str
):
    work = scratch / "w"
    work.mkdir()
    build(Tree(work, prefix))
    assert found(work, check_upper(bytes(upper), work=bytes(work))) == expected


# --- the whole ----------------------------------------------------------------------------------


def test_the_tables_hold_every_kind_of_fault():
    tables = [CONTRADICTIONS, ON_SPECIAL_FILES, WITH_LOWERS, IN_WORK]
    kinds = {kind for table in tables for _, expected in table for _, kind in expected}
    assert set(FaultKind) - kinds == {K.UNREADABLE}  # has a test of its own


def test_a_fault_says_where_and_what_in_one_line(upper: Path):
    name = b"a\n\xff\x1b[31m"
    os.mkdir(bytes(upper) + b"/" + name)
    os.setxattr(bytes(upper) + b"/" + name, TRUSTED + "opaque", b"\n\0")
    [fault] = check_upper(bytes(upper))
    assert fault.path == bytes(upper) + b"/" + name
    assert fault.message.startswith(r"opaque is '\n\x00': ")
    assert str(fault) == rf"{upper}/a\n\xff\x1b[31m: {fault.message}"


def test_an_unreadable_directory_is_a_fault_and_the_rest_is_checked(upper: Path):
    Tree(upper, USER).dir("a").dir("a/b", opaque=b"?").dir("c", opaque=b"?")
    for name in ("", "c"):
        (upper / name).chmod(0o755)
    (upper / "a").chmod(0)
    os.seteuid(65534)
    try:
        faults = check_upper(bytes(upper))
    finally:
        os.seteuid(0)
    assert found(upper, faults) == [("a", K.UNREADABLE), ("c", K.OPAQUE_VALUE)]


def test_an_upper_that_is_not_there(upper: Path):
    with pytest.raises(FileNotFoundError):
        check_upper(bytes(upper) + b"/none")
    with pytest.raises(NotADirectoryError):
        check_upper(bytes(upper), [b"/dev/null"])
    with pytest.raises(FileNotFoundError):
        check_upper(bytes(upper), work=bytes(upper) + b"/none")


def test_symlinks_are_not_followed(upper: Path, scratch: Path):
    outside = scratch / "outside"
    outside.mkdir()
    Tree(outside).file("a", opaque=b"y")
    Tree(upper).symlink("s", str(outside)).symlink("t", str(outside / "a"))
    assert check_upper(bytes(upper)) == []


def test_a_tree_deeper_than_there_are_descriptors(upper: Path):
    depth = 400
    fd = os.open(upper, os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=fd)
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        os.setxattr(fd, TRUSTED + "opaque", b"?")
    finally:
        os.close(fd)
    Tree(upper).dir("e", opaque=b"?")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        faults = check_upper(bytes(upper), [bytes(upper)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    deepest = bytes(upper) + b"/d" * depth
    assert [fault.path for fault in faults] == [deepest, bytes(upper) + b"/e"]
    assert [fault.kind for fault in faults] == [K.OPAQUE_VALUE, K.OPAQUE_VALUE]


def test_a_kernel_overlay_leaves_no_contradiction(upper: Path, scratch: Path):
    """Whiteouts, opaque directories, redirects, metacopies and origins by the kernel's own hand."""
    lower, base, work, merged = (scratch / name for name in ("lower", "base", "work", "merged"))
    for folder in (lower, base, work, merged):
        folder.mkdir()
    for folder in (lower, base):
        for path in ("a/b", "c/d", "e"):
            (folder / path).mkdir(parents=True)
            (folder / path / "file").write_bytes(b"data")
            (folder / path / "gone").write_bytes(b"data")
    (lower / "e/link").hardlink_to(lower / "e/file")
    options = f"lowerdir={lower}:{base},upperdir={upper},workdir={work}"
    options += ",redirect_dir=on,metacopy=on,index=off"
    subprocess.run(["mount", "-t", "overlay", "x", "-o", options, merged], check=True)
    try:
        for path in ("a/b", "c/d", "e"):
            (merged / path / "gone").unlink()
            (merged / path / "file").chmod(0o600)
        (merged / "a").rename(merged / "moved")
        (merged / "moved/b").rename(merged / "c/taken")
        (merged / "c/d/file").rename(merged / "renamed")
        (merged / "c/d").rmdir()
        (merged / "c/d").mkdir()
        (merged / "e/link").write_bytes(b"other data")
        os.setxattr(merged / "e", TRUSTED + "opaque", b"a user's own, escaped")
    finally:
        subprocess.run(["umount", merged], check=True)
    faults = check_upper(bytes(upper), [bytes(lower), bytes(base)], bytes(work))
    assert [str(fault) for fault in faults] == []
    assert os.getxattr(upper / "moved", TRUSTED + "redirect") == b"a"  # the kernel did write some
    assert check_upper(bytes(upper), [bytes(merged)]) != []
