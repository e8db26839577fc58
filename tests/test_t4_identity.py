"""A file is the same file: one number, all its names, whatever happens to its layer or its names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.dump import Dump, dump_tree
from tests.support.stack import Stack, Stacks
from tests.support.trees import HardLink, Node, Symlink, Tree

EVERYTHING: list[Tree] = [
    {
        "merged/top": "top",
        "top/f": "text",
        "top/linked": HardLink("top/f"),
        "top/symlink": Symlink("f"),
    },
    {
        "merged/low": "low",
        "merged/sub/f": "text",
        "low/f": "text",
        "low/linked": HardLink("low/f"),
        "low/elsewhere/linked": HardLink("low/f"),
        "low/fifo": Node(kind=stat.S_IFIFO),
        "low/device": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3)),
        "low/symlink": Symlink("f"),
        "low/empty/": None,
    },
]
UPPER: Tree = {"merged/new": "new", "only/f": "text", "only/linked": HardLink("only/f")}


def numbers(root: Path) -> dict[bytes, int | None]:
    return {path: entry.ino for path, entry in dump_tree(root, ino=True).items()}


def listing_faults(dump: Dump) -> list[bytes]:
    return [path for path, entry in dump.items() if entry.listed_ino_differs]


def copy_up_all(root: Path) -> None:
    for top, directories, files in os.walk(root):
        for name in [*directories, *files]:
            os.chown(Path(top, name), 7, 7, follow_symlinks=False)


def write_all(root: Path) -> None:
    for top, _, files in os.walk(root):
        for path in (Path(top, name) for name in files):
            if stat.S_ISREG(path.lstat().st_mode):
                path.write_text("written")


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [copy_up_all, write_all])
def test_numbers_stay_over_copy_up(stack: Stacks, change: Callable[[Path], None]) -> None:
    s = stack(EVERYTHING, upper=UPPER)
    before = numbers(s.merged)
    change(s.merged)
    assert numbers(s.merged) == before


@pytest.mark.parametrize("change", [copy_up_all, write_all])
def test_numbers_stay_over_copy_up_and_remount(
    stack: Stacks, change: Callable[[Path], None]
) -> None:
    s = stack(EVERYTHING, upper=UPPER)
    before = numbers(s.merged)
    s.remount()
    assert numbers(s.merged) == before
    change(s.merged)
    s.remount()
    assert numbers(s.merged) == before


@pytest.mark.parametrize("change", [copy_up_all, write_all])
@pytest.mark.parametrize("listed_first", [False, True], ids=["stat-first", "readdir-first"])
def test_listing_and_stat_give_the_same_number(
    stack: Stacks, change: Callable[[Path], None], listed_first: bool
) -> None:
    s = stack(EVERYTHING, upper=UPPER)
    change(s.merged)
    s.remount()
    if not listed_first:
        for path in dump_tree(s.lower):
            (s.merged / os.fsdecode(path)).lstat()
    assert listing_faults(dump_tree(s.merged, ino=True)) == []
    assert listing_faults(dump_tree(s.merged, ino=True)) == []


def test_dot_and_dot_dot_have_the_numbers_of_their_directories(stack: Stacks) -> None:
    s = stack({"a/b/f": "text"})
    assert (s.merged / "a/b/.").stat().st_ino == (s.merged / "a/b").stat().st_ino
    assert (s.merged / "a/b/..").stat().st_ino == (s.merged / "a").stat().st_ino


def test_numbers_stay_over_rename_and_remount(stack: Stacks) -> None:
    s = stack(EVERYTHING, upper=UPPER)
    before = numbers(s.merged)
    for top in ("merged", "top", "low", "only"):
        (s.merged / top).rename(s.merged / f"{top}-moved")
    want = {
        b"-moved/".join(p.split(b"/", 1)) if b"/" in p else p + b"-moved" if p else p: ino
        for p, ino in before.items()
    }
    assert numbers(s.merged) == want
    s.remount()
    assert numbers(s.merged) == want


def test_different_files_have_different_numbers(stack: Stacks) -> None:
    s = stack(EVERYTHING, upper=UPPER)
    write_all(s.merged)
    (s.merged / "fresh").write_text("x")
    seen: dict[int | None, set[tuple[bytes, ...]]] = {}
    for path, entry in dump_tree(s.merged, ino=True).items():
        seen.setdefault(entry.ino, set()).add(entry.links or (path,))
    assert [groups for groups in seen.values() if len(groups) > 1] == []


def test_descriptor_and_path_give_the_same_number_over_copy_up(stack: Stacks) -> None:
    s = stack({"f": "text"})
    fd = os.open(s.merged / "f", os.O_RDONLY)
    before = os.fstat(fd).st_ino
    (s.merged / "f").write_text("new")
    assert os.fstat(fd).st_ino == before == (s.merged / "f").stat().st_ino
    os.close(fd)


def test_file_made_in_the_place_of_an_unlinked_one_is_another(stack: Stacks) -> None:
    s = stack({"f": "text"})
    fd = os.open(s.merged / "f", os.O_RDONLY)
    (s.merged / "f").unlink()
    (s.merged / "f").write_text("another")
    assert (s.merged / "f").stat().st_ino != os.fstat(fd).st_ino
    assert os.pread(fd, 100, 0) == b"text"
    os.close(fd)


# --- hard links -------------------------------------------------------------------------------

LINKS = ("a", "b", "d/c")
TRIPLE: tuple[tuple[str, str | HardLink | None], ...] = (
    ("a", "text"),
    ("b", HardLink("a")),
    ("d/c", HardLink("a")),
    ("e/", None),
)
LINKED: Tree = dict(TRIPLE)


def write(root: Path, name: str) -> None:
    with (root / name).open("a") as file:
        file.write("+")


def to_case(case: str, node: str | HardLink | None) -> str | HardLink | None:
    return HardLink(f"{case}/a") if isinstance(node, HardLink) else node


STEPS: dict[str, tuple[Callable[[Path], object], set[str], str]] = {
    "write": (lambda m: write(m, "b"), {"a", "b", "d/c"}, "text+"),
    "chmod": (lambda m: (m / "b").chmod(0o600), {"a", "b", "d/c"}, "text"),
    "unlink one": (lambda m: (m / "b").unlink(), {"a", "d/c"}, "text"),
    "write, unlink it": (
        lambda m: (write(m, "b"), (m / "b").unlink()),
        {"a", "d/c"},
        "text+",
    ),
    "write, unlink another": (
        lambda m: (write(m, "b"), (m / "a").unlink()),
        {"b", "d/c"},
        "text+",
    ),
    "unlink all but one": (
        lambda m: ((m / "a").unlink(), (m / "b").unlink()),
        {"d/c"},
        "text",
    ),
    "unlink, then write": (
        lambda m: ((m / "a").unlink(), write(m, "d/c")),
        {"b", "d/c"},
        "text+",
    ),
    "rename one": (lambda m: (m / "b").rename(m / "e/x"), {"a", "d/c", "e/x"}, "text"),
    "rename all": (
        lambda m: [(m / name).rename(m / f"e/{i}") for i, name in enumerate(LINKS)],
        {"e/0", "e/1", "e/2"},
        "text",
    ),
    "rename, then write": (
        lambda m: ((m / "a").rename(m / "e/x"), write(m, "b")),
        {"b", "d/c", "e/x"},
        "text+",
    ),
    "rename onto itself": (lambda m: (m / "a").rename(m / "b"), {"a", "b", "d/c"}, "text"),
    "rename the directory": (
        lambda m: ((m / "d").rename(m / "moved"), write(m, "a")),
        {"a", "b", "moved/c"},
        "text+",
    ),
    "one more link": (
        lambda m: os.link(m / "a", m / "e/x"),
        {"a", "b", "d/c", "e/x"},
        "text",
    ),
    "one more link, unlink a lower one": (
        lambda m: (os.link(m / "a", m / "e/x"), (m / "d/c").unlink()),
        {"a", "b", "e/x"},
        "text",
    ),
    "one more link, unlink all lower ones": (
        lambda m: (os.link(m / "a", m / "e/x"), *((m / name).unlink() for name in LINKS)),
        {"e/x"},
        "text",
    ),
    "unlink, then link in its place": (
        lambda m: ((m / "a").unlink(), os.link(m / "b", m / "a")),
        {"a", "b", "d/c"},
        "text",
    ),
    "write, replace one by another file": (
        lambda m: (write(m, "a"), (m / "e/n").write_text("n"), (m / "e/n").rename(m / "b")),
        {"a", "d/c"},
        "text+",
    ),
}


@pytest.mark.parametrize("looked_at", [False, True], ids=["unknown", "all-known"])
def test_hard_links_of_a_lower_file_stay_one_file(stack: Stacks, looked_at: bool) -> None:
    s = stack({f"{case}/{name}": to_case(case, node) for case in STEPS for name, node in TRIPLE})
    numbers = {case: (s.merged / case / "a").stat().st_ino for case in STEPS}
    if looked_at:
        for case in STEPS:
            assert {(s.merged / case / name).stat().st_ino for name in LINKS} == {numbers[case]}
    else:
        s.remount()
    for case, (step, _, _) in STEPS.items():
        step(s.merged / case)
    for _ in range(2):
        for case, (_, names, text) in STEPS.items():
            for name in sorted(names):
                found = (s.merged / case / name).stat()
                want = (case, name, numbers[case], len(names))
                assert (case, name, found.st_ino, found.st_nlink) == want
                assert (s.merged / case / name).read_text() == text
        s.remount()


def test_link_count_is_right_after_every_unlink(stack: Stacks) -> None:
    s = stack(LINKED)
    fd = os.open(s.merged / "a", os.O_RDWR)
    for left, name in zip((2, 1, 0), LINKS, strict=True):
        (s.merged / name).unlink()
        assert os.fstat(fd).st_nlink == left
        for other in LINKS[3 - left :]:
            assert (s.merged / other).stat().st_nlink == left
    os.pwrite(fd, b"still", 0)
    assert os.pread(fd, 10, 0) == b"still"
    os.close(fd)


def test_link_count_is_right_when_unlinks_are_spread_over_mounts(stack: Stacks) -> None:
    s = stack(LINKED)
    write(s.merged, "b")
    for left, name in zip((2, 1), LINKS[:2], strict=True):
        s.remount()
        (s.merged / name).unlink()
        s.remount()
        assert (s.merged / "d/c").stat().st_nlink == left
    assert (s.merged / "d/c").read_text() == "text+"


def test_new_links_in_the_upper_are_counted(stack: Stacks) -> None:
    s = stack({"d/": None})
    (s.merged / "f").write_text("x")
    os.link(s.merged / "f", s.merged / "d/g")
    for _ in range(2):
        assert (s.merged / "f").stat().st_nlink == 2
        assert (s.merged / "f").stat().st_ino == (s.merged / "d/g").stat().st_ino
        s.remount()
    (s.merged / "f").unlink()
    assert (s.merged / "d/g").stat().st_nlink == 1


def test_hard_linked_symlinks_and_fifos_stay_one_object(stack: Stacks) -> None:
    s = stack(
        {
            "s": Symlink("x"),
            "s2": HardLink("s"),
            "p": Node(kind=stat.S_IFIFO),
            "p2": HardLink("p"),
        }
    )
    for name in ("s", "p"):
        os.chown(s.merged / name, 5, 6, follow_symlinks=False)
    for _ in range(2):
        for name in ("s", "p"):
            one, two = (s.merged / name).lstat(), (s.merged / f"{name}2").lstat()
            assert (one.st_ino, one.st_uid, one.st_nlink) == (two.st_ino, two.st_uid, two.st_nlink)
            assert (two.st_uid, two.st_nlink) == (5, 2)
        s.remount()


# --- files without a name ---------------------------------------------------------------------


def unlinked(s: Stack, name: str, flags: int) -> int:
    fd = os.open(s.merged / name, flags)
    (s.merged / name).unlink()
    return fd


WHERE = ("lower", "upper", "copied")


@pytest.fixture(params=WHERE)
def three(request: pytest.FixtureRequest, stack: Stacks) -> tuple[Stack, str]:
    """A file `f` that is in a lower, was made in the upper, or was copied up."""
    place: str = request.param
    if place == "upper":
        s = stack()
        (s.merged / "f").write_text("some text")
    else:
        s = stack({"f": "some text"})
        if place == "copied":
            write(s.merged, "f")
            os.truncate(s.merged / "f", 9)
    return s, place


def test_unlinked_open_file_can_be_used(three: tuple[Stack, str]) -> None:
    s, _ = three
    fd = unlinked(s, "f", os.O_RDWR)
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, 100, 0) == b"some text"
    os.pwrite(fd, b"SOME", 0)
    os.ftruncate(fd, 6)
    os.fchown(fd, 1, 2)
    os.fchmod(fd, 0o4711)
    os.utime(fd, ns=(3, 4))
    os.setxattr(fd, "user.x", b"1")
    assert os.pread(fd, 100, 0) == b"SOME t"
    found = os.fstat(fd)
    assert (found.st_size, found.st_nlink, found.st_uid, found.st_gid) == (6, 0, 1, 2)
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o4711, 4)
    assert os.listxattr(fd) == ["user.x"]
    os.fsync(fd)
    os.close(fd)
    assert os.listdir(s.merged) == []


def test_unlinked_file_open_for_reading_can_be_changed_through_it(
    three: tuple[Stack, str],
) -> None:
    s, _ = three
    fd = unlinked(s, "f", os.O_RDONLY)
    os.fchmod(fd, 0o640)
    os.setxattr(fd, "user.x", b"1")
    assert os.pread(fd, 100, 0) == b"some text"
    found = os.fstat(fd)
    assert (stat.S_IMODE(found.st_mode), found.st_nlink, found.st_size) == (0o640, 0, 9)
    os.close(fd)


def test_unlinked_file_can_be_opened_again_through_proc(three: tuple[Stack, str]) -> None:
    s, _ = three
    fd = unlinked(s, "f", os.O_RDONLY)
    with Path(f"/proc/self/fd/{fd}").open("r+b") as file:
        file.write(b"SOME")
    assert os.pread(fd, 100, 0) == b"SOME text"
    os.close(fd)


def test_unlinked_file_cannot_be_linked_again(three: tuple[Stack, str]) -> None:
    s, _ = three
    fd = unlinked(s, "f", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        # Only with a src_dir_fd does os.link follow.
        os.link(f"/proc/self/fd/{fd}", s.merged / "again", src_dir_fd=fd, follow_symlinks=True)
    os.close(fd)


def test_unlinked_file_is_another_than_its_successor(three: tuple[Stack, str]) -> None:
    s, _ = three
    fd = unlinked(s, "f", os.O_RDWR)
    (s.merged / "f").write_text("successor")
    os.pwrite(fd, b"predecessor", 0)
    os.fchmod(fd, 0o600)
    assert (s.merged / "f").read_text() == "successor"
    assert os.pread(fd, 100, 0) == b"predecessor"
    assert stat.S_IMODE((s.merged / "f").stat().st_mode) == 0o644
    os.close(fd)
    s.remount()
    assert (s.merged / "f").read_text() == "successor"


def test_replaced_file_lives_on_through_its_descriptor(three: tuple[Stack, str]) -> None:
    s, _ = three
    fd = os.open(s.merged / "f", os.O_RDWR)
    (s.merged / "g").write_text("successor")
    (s.merged / "g").rename(s.merged / "f")
    os.pwrite(fd, b"SOME", 0)
    assert os.pread(fd, 100, 0) == b"SOME text"
    assert os.fstat(fd).st_nlink == 0
    assert (s.merged / "f").read_text() == "successor"
    os.close(fd)


def test_file_unlinked_under_a_path_descriptor_answers_stat(three: tuple[Stack, str]) -> None:
    s, _ = three
    fd = unlinked(s, "f", os.O_PATH)
    found = os.fstat(fd)
    assert (found.st_nlink, found.st_size) == (0, 9)
    os.close(fd)


def test_metacopy_unlinked_while_open_still_reads(stack: Stacks) -> None:
    data = b"0123456789abcdef" * 4096
    s = stack({"f": data})
    (s.merged / "f").chmod(0o600)
    fd = unlinked(s, "f", os.O_RDWR)
    assert os.pread(fd, 1 << 20, 0) == data
    os.pwrite(fd, b"NEW", 0)
    assert os.pread(fd, 1 << 20, 0) == b"NEW" + data[3:]
    os.close(fd)


@pytest.mark.parametrize("lower", [{"d/": None}, {}], ids=["lower", "upper"])
def test_removed_directory_that_is_open_has_and_takes_nothing(stack: Stacks, lower: Tree) -> None:
    s = stack(lower)
    (s.merged / "d").mkdir(exist_ok=True)
    fd = os.open(s.merged / "d", os.O_RDONLY | os.O_DIRECTORY)
    (s.merged / "d").rmdir()
    (s.merged / "d").mkdir()
    (s.merged / "d/f").write_text("x")
    assert os.listdir(fd) == []
    assert os.fstat(fd).st_nlink == 0
    with pytest.raises(FileNotFoundError):
        os.open("f", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd)
    with pytest.raises(FileNotFoundError):
        os.mkdir("sub", dir_fd=fd)
    os.fchown(fd, 1, 2)
    os.fchmod(fd, 0o700)
    os.setxattr(fd, "user.x", b"1")
    found = os.fstat(fd)
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_nlink) == (1, 0o700, 0)
    assert os.listxattr(fd) == ["user.x"]
    assert (s.merged / "d").stat().st_uid == 0
    os.close(fd)


def test_removed_working_directory_leads_nowhere(stack: Stacks) -> None:
    s = stack({"a/b/": None})
    fd = os.open(s.merged / "a/b", os.O_RDONLY | os.O_DIRECTORY)
    (s.merged / "a/b").rmdir()
    with pytest.raises(OSError, match="No such file") as caught:
        os.stat("f", dir_fd=fd)
    assert caught.value.errno == errno.ENOENT
    os.close(fd)


# --- link counts of directories ---------------------------------------------------------------

DIRECTORIES: list[Tree] = [
    {"m/one/": None, "m/f": "text", "top/x/": None},
    {"m/two/": None, "m/one/": None, "low/x/": None, "low/y/": None},
]


def wrong_counts(root: Path) -> list[str]:
    """Directories whose link count is not 2 and one for each directory in them."""
    faults = []
    for top, directories, _ in os.walk(root):
        found = Path(top).stat().st_nlink
        if found != 2 + len(directories):
            faults.append(f"{top}: {found}, but has {sorted(directories)}")
    return faults


COUNTED: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _root: None,
    "mkdir": lambda root: [(root / top / "new").mkdir() for top in ("m", "top", "low")],
    "rmdir": lambda root: [(root / path).rmdir() for path in ("m/one", "top/x", "low/y")],
    "mkdir and rmdir": lambda root: ((root / "m/n").mkdir(), (root / "m/n").rmdir()),
    "move between": lambda root: (root / "m/two").rename(root / "low/two"),
    "move within": lambda root: (root / "m/two").rename(root / "m/three"),
    "replace": lambda root: (root / "low/x").rename(root / "m/one"),
    "file changes": lambda root: ((root / "m/f").unlink(), (root / "m/g").write_text("x")),
    "rmdir and mkdir again": lambda root: ((root / "m/one").rmdir(), (root / "m/one").mkdir()),
    "directory for a file": lambda root: ((root / "m/f").unlink(), (root / "m/f").mkdir()),
}


def test_directories_count_the_directories_in_them(stack: Stacks) -> None:
    layers: list[Tree] = [
        {f"{case}/{os.fsdecode(name)}": node for case in COUNTED for name, node in layer.items()}
        for layer in DIRECTORIES
    ]
    s = stack(layers)
    for case, step in COUNTED.items():
        if case != "nothing":
            assert wrong_counts(s.merged / case) == []
        step(s.merged / case)
    assert wrong_counts(s.merged) == []
    s.remount()
    assert wrong_counts(s.merged) == []


# --- numbers of the host that are used again --------------------------------------------------

MANY = 300


def assert_distinct(fds: list[int], root: Path) -> None:
    """Every held descriptor still reads its own contents, and shares its number with nobody."""
    held = [os.fstat(fd).st_ino for fd in fds]
    named = [path.stat().st_ino for path in root.iterdir()]
    assert len(set(held) | set(named)) == len(held) + len(named)
    for number, fd in enumerate(fds):
        assert os.pread(fd, 100, 0) == b"old %d" % number
        assert os.fstat(fd).st_nlink == 0


def test_new_files_are_not_confused_with_unlinked_open_ones(stack: Stacks) -> None:
    s = stack({f"low{number}": f"old {number}" for number in range(0, MANY, 3)})
    fds = []
    for number in range(MANY):
        path = s.merged / (f"low{number}" if number % 3 == 0 else f"up{number}")
        if number % 3:
            path.write_text(f"old {number}")
        fd = os.open(path, os.O_RDWR if number % 2 else os.O_RDONLY)
        path.unlink()
        fds.append(fd)
    for number in range(MANY):
        (s.merged / f"new{number}").write_text(f"new {number}")
    assert_distinct(fds, s.merged)
    for number in range(MANY):
        assert (s.merged / f"new{number}").read_text() == f"new {number}"
    for fd in fds:
        os.close(fd)


def test_number_used_again_at_once_is_another_file(stack: Stacks) -> None:
    """Ext4 gives the number of a file that was just removed to the next one."""
    s = stack()
    for turn in range(MANY):
        path = s.merged / f"f{turn % 7}"
        path.write_text(f"turn {turn}")
        path.chmod(0o600 + turn % 64)
        assert path.read_text() == f"turn {turn}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 + turn % 64
        path.unlink()


def test_number_used_again_for_another_kind_is_another_object(stack: Stacks) -> None:
    s = stack()
    path = s.merged / "x"
    held = []
    for _ in range(20):
        path.mkdir()
        held.append(os.open(path, os.O_PATH))
        path.rmdir()
        path.symlink_to("target")
        held.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        assert os.readlink(path) == "target"
        path.unlink()
        path.write_text("text")
        assert stat.S_ISREG(path.stat().st_mode)
        held.append(os.open(path, os.O_PATH))
        path.unlink()
    kinds = [stat.S_IFMT(os.fstat(fd).st_mode) for fd in held]
    assert kinds == [stat.S_IFDIR, stat.S_IFLNK, stat.S_IFREG] * 20
    for fd in held:
        os.close(fd)


def test_number_of_a_copied_up_file_is_not_given_to_a_new_one(stack: Stacks) -> None:
    s = stack({f"f{number}": str(number) for number in range(50)})
    before = {number: (s.merged / f"f{number}").stat().st_ino for number in range(50)}
    for number in range(50):
        write(s.merged, f"f{number}")
        (s.merged / f"new{number}").write_text("new")
    s.remount()
    found = {path.name: path.stat().st_ino for path in s.merged.iterdir()}
    assert len(set(found.values())) == 100
    assert {number: found[f"f{number}"] for number in range(50)} == before
