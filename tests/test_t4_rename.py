"""Renames of everything onto everything, and what they leave behind; the oracle is the kernel's union."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import twin
from tests.support.dump import Dump, diff_dumps, dump_tree
from tests.support.stack import Stack, Stacks, is_whiteout
from tests.support.trees import OPAQUE, WHITEOUT, Content, Node, Symlink, Tree, make_tree
from tests.support.twin import KernelSide

NOREPLACE, EXCHANGE = twin.RENAME_NOREPLACE, twin.RENAME_EXCHANGE


def rename(old: Path, new: Path, flags: int) -> str:
    """Rename and return the name of the errno, or "" for success."""
    old_path, new_path = bytes(old), bytes(new)
    if twin.libc.renameat2(twin.AT_FDCWD, old_path, twin.AT_FDCWD, new_path, flags) == 0:
        return ""
    return errno.errorcode[ctypes.get_errno()]


# --- the matrix -------------------------------------------------------------------------------

OLD_TIME_NS = 1_000_000_000
KINDS: dict[str, Callable[[str, str], dict[str, Content]]] = {
    "file": lambda name, where: {name: Node(f"file in {where}", mtime_ns=OLD_TIME_NS)},
    "symlink": lambda name, where: {name: Symlink(f"to-{where}")},
    "fifo": lambda name, _where: {name: Node(kind=stat.S_IFIFO, mode=0o640)},
    "empty": lambda name, _where: {f"{name}/": None},
    "full": lambda name, where: {f"{name}/in-{where}": where, f"{name}/sub/deep-{where}": where},
}
PLACES = {
    "lower": ("lower",),
    "lowest": ("lowest",),
    "upper": ("upper",),
    "both": ("upper", "lower"),
    "all": ("upper", "lower", "lowest"),
}
EMPTIED: dict[str, dict[str, Content]] = {
    "upper": {"@/": None, "@/gone": WHITEOUT},
    "lower": {"@/gone": "hidden"},
}
STATES: dict[str, dict[str, dict[str, Content]]] = {
    "absent": {},
    "whiteout of a file": {"upper": {"@": WHITEOUT}, "lower": {"@": "hidden"}},
    "whiteout of a directory": {"upper": {"@": WHITEOUT}, "lower": {"@/hidden": "hidden"}},
    "whiteout in a lower": {"lower": {"@": WHITEOUT}, "lowest": {"@/hidden": "hidden"}},
    "emptied directory": EMPTIED,
    "opaque directory": {"upper": {"@/": OPAQUE, "@/in": "in"}, "lower": {"@/hidden": "hidden"}},
    "empty opaque directory": {"upper": {"@/": OPAQUE}, "lower": {"@/hidden": "hidden"}},
    "file over a directory": {"upper": {"@": "file"}, "lower": {"@/hidden": "hidden"}},
    "directory over a file": {"upper": {"@/in": "in"}, "lower": {"@": "hidden"}},
} | {
    f"{kind}, {place}": {where: make("@", where) for where in layers}
    for kind, make in KINDS.items()
    for place, layers in PLACES.items()
    if kind in {"full", "file"} or place in {"lower", "upper", "both"}
}
LAYERS = ("upper", "lower", "lowest")


def placed(tree: dict[str, Content], path: str) -> dict[str, Content]:
    return {name.replace("@", path, 1): content for name, content in tree.items()}


TARGETS = [state for state in STATES if not state.endswith((", lowest", ", all"))]
WAYS = (
    ("plain, beside it", 0, "a", "b"),
    ("plain, elsewhere", 0, "x", "y"),
    ("noreplace, beside it", NOREPLACE, "a", "b"),
    ("exchange, elsewhere", EXCHANGE, "x", "y"),
)
"""What is tried of every pair: a name for it, the flags, the two paths (x and y are directories)."""


@dataclass(frozen=True)
class Case:
    """One rename, onto `target`, of something under names that no other case has."""

    target: str
    flags: int
    old: str
    new: str


def cases() -> dict[str, Case]:
    found = {}
    for number, target in enumerate(TARGETS):
        for place, (way, flags, old, new) in enumerate(WAYS):
            tail = f"{number}-{place}"
            apart = "/" if old == "x" else ""
            found[f"{target}, {way}"] = Case(
                target, flags, f"{old}{apart}{tail}", f"{new}{apart}{tail}"
            )
    return found


CASES = cases()


def layers_of(source: str) -> dict[str, dict[str, Content]]:
    """For one source, all targets and ways."""
    trees: dict[str, dict[str, Content]] = {name: {} for name in LAYERS}
    trees["lower"] = {"x/": None, "y/": None}
    for case in CASES.values():
        for layer in LAYERS:
            trees[layer] |= placed(STATES[source].get(layer, {}), case.old)
            trees[layer] |= placed(STATES[case.target].get(layer, {}), case.new)
    return trees


def play(root: Path) -> dict[str, str]:
    return {
        name: rename(root / case.old, root / case.new, case.flags) for name, case in CASES.items()
    }


@contextmanager
def overlayfs(base: Path, lowers: list[Tree], upper: Tree) -> Iterator[KernelSide]:
    side = KernelSide(base, [()] * len(lowers))
    side.options = twin.KERNEL_FOREIGN_OPTIONS
    for root, tree in zip([*side.lowers, side.upper], [*lowers, upper], strict=True):
        make_tree(root, tree)
    side.mount()
    try:
        yield side
    finally:
        twin.let_go(side)


def shown(root: Path) -> Dump:
    dump = twin.settled(dump_tree(root), phantoms=False)
    del dump[b""]
    return dump


def pointless_whiteouts(upper: Path) -> list[Path]:
    """Whiteouts in directories that nothing shows through."""
    return [
        Path(top, name)
        for top, directories, files in os.walk(upper)
        for name in [*directories, *files]
        if "trusted.overlay.opaque" in os.listxattr(top) and is_whiteout(Path(top, name))
    ]


@pytest.mark.parametrize("source", STATES)
def test_rename_onto_everything_is_as_in_overlayfs(
    stack: Stacks, scratch: Path, source: str
) -> None:
    trees = layers_of(source)
    lowers: list[Tree] = [trees["lower"], trees["lowest"]]
    s = stack(lowers, upper=trees["upper"])
    with overlayfs(scratch / "kernel", lowers, trees["upper"]) as kernel:
        outcomes = play(kernel.merged)
        want = shown(kernel.merged)
    found = play(s.merged)
    assert found == outcomes
    assert diff_dumps(want, shown(s.merged)) == []
    s.remount()
    assert diff_dumps(want, shown(s.merged)) == []
    s.unmount()
    assert pointless_whiteouts(s.upper) == []
    assert diff_dumps(want, seen_by_overlayfs(s)) == []


def seen_by_overlayfs(s: Stack) -> Dump:
    """The tree that the kernel shows over the upper that mica wrote."""
    side = KernelSide.__new__(KernelSide)
    side.base, side.lowers, side.upper, side.merged = s.base, s.lowers, s.upper, s.merged
    side.work = s.base / "kernel-work"
    side.work.mkdir()
    side.options = twin.KERNEL_FOREIGN_OPTIONS
    side.mount()
    try:
        return shown(side.merged)
    finally:
        side.unmount()


# --- directories ------------------------------------------------------------------------------

LOWER: dict[str, Content] = {
    "d/f": "f",
    "d/sub/leaf": "leaf",
    "d/sub/deep/leaf": "deep",
    "e/f": "other",
    "e/sub/else": "else",
    "empty/": None,
    "file": "file",
}
Script = Callable[[Path], object]


def empty(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def create_in_old_place(m: Path) -> None:
    (m / "d").rename(m / "moved")
    (m / "d").mkdir()
    (m / "d/f").write_text("new f")
    (m / "d/sub").mkdir()


def create_and_remove_in_old_place(m: Path) -> None:
    create_in_old_place(m)
    empty(m / "d")
    (m / "d").rmdir()
    (m / "d").write_text("a file now")


def onto_emptied_directory(m: Path) -> None:
    empty(m / "e")
    (m / "d").rename(m / "e")


def new_onto_emptied_directory(m: Path) -> None:
    empty(m / "e")
    (m / "new").mkdir()
    (m / "new/f").write_text("new")
    (m / "new").rename(m / "e")


def new_onto_lower_empty_directory(m: Path) -> None:
    (m / "new").mkdir()
    (m / "new").rename(m / "empty")
    (m / "empty/x").write_text("x")


def nested(m: Path) -> None:
    (m / "d/sub").rename(m / "d/other")
    (m / "d").rename(m / "e/d")
    (m / "e/d/other/deep").rename(m / "back")
    (m / "e").rename(m / "top")
    (m / "back/leaf").chmod(0o600)
    (m / "top/d/other/leaf").rename(m / "top/d/f")


def there_and_back(m: Path) -> None:
    (m / "d").rename(m / "x")
    (m / "x").rename(m / "d")
    (m / "d/sub").rename(m / "e/s")
    (m / "e/s").rename(m / "d/sub")


def swap_by_three(m: Path) -> None:
    (m / "d").rename(m / "t")
    (m / "e").rename(m / "d")
    (m / "t").rename(m / "e")


def exchange(m: Path) -> None:
    assert rename(m / "d", m / "e", EXCHANGE) == ""
    assert rename(m / "d/sub", m / "e/sub", EXCHANGE) == ""
    assert rename(m / "file", m / "empty", EXCHANGE) == ""


def exchange_with_new(m: Path) -> None:
    (m / "new").mkdir()
    (m / "new/n").write_text("n")
    assert rename(m / "d", m / "new", EXCHANGE) == ""
    (m / "new/sub/added").write_text("added")


def move_into_new_directory(m: Path) -> None:
    (m / "new").mkdir()
    (m / "d").rename(m / "new/d")
    (m / "new").rename(m / "d")
    (m / "d/d/f").unlink()


def move_out_then_remove(m: Path) -> None:
    (m / "d/sub").rename(m / "sub")
    empty(m / "d")
    (m / "d").rmdir()
    (m / "sub/deep").rename(m / "d")


def directory_in_place_of_a_lower_file(m: Path) -> None:
    (m / "file").unlink()
    (m / "d").rename(m / "file")


def move_into_opaque_directory(m: Path) -> None:
    empty(m / "e")
    (m / "e").rmdir()
    (m / "e").mkdir()
    (m / "d/sub").rename(m / "e/sub")
    (m / "d/f").rename(m / "e/f")
    (m / "e/f").unlink()


SCRIPTS: dict[str, Script] = {
    script.__name__: script
    for script in (
        create_in_old_place,
        create_and_remove_in_old_place,
        onto_emptied_directory,
        new_onto_emptied_directory,
        new_onto_lower_empty_directory,
        nested,
        there_and_back,
        swap_by_three,
        exchange,
        exchange_with_new,
        move_into_new_directory,
        move_out_then_remove,
        directory_in_place_of_a_lower_file,
        move_into_opaque_directory,
    )
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_directories_renamed_show_what_overlayfs_shows(
    stack: Stacks, scratch: Path, script: str
) -> None:
    s = stack(LOWER)
    with overlayfs(scratch / "kernel", [LOWER], {}) as kernel:
        SCRIPTS[script](kernel.merged)
        want = shown(kernel.merged)
    SCRIPTS[script](s.merged)
    assert diff_dumps(want, shown(s.merged)) == []
    s.remount()
    assert diff_dumps(want, shown(s.merged)) == []
    s.unmount()
    assert pointless_whiteouts(s.upper) == []
    assert diff_dumps(want, seen_by_overlayfs(s)) == []


def test_directories_that_were_all_listed_before_are_renamed_alike(
    stack: Stacks, scratch: Path
) -> None:
    tree = {f"{script}/{name}": content for script in SCRIPTS for name, content in LOWER.items()}
    s = stack(tree)
    dump_tree(s.merged)
    with overlayfs(scratch / "kernel", [tree], {}) as kernel:
        for name, script in SCRIPTS.items():
            script(kernel.merged / name)
            script(s.merged / name)
        want = shown(kernel.merged)
    assert diff_dumps(want, shown(s.merged)) == []
    s.remount()
    assert diff_dumps(want, shown(s.merged)) == []


def test_directory_renamed_over_and_over_in_many_mounts_keeps_its_contents(stack: Stacks) -> None:
    s = stack(LOWER)
    want = {path: e for path, e in shown(s.merged).items() if path.startswith(b"d/")}
    place = s.merged / "d"
    for turn in range(6):
        new = s.merged / (f"e/d{turn}" if turn % 2 else f"d{turn}")
        place.rename(new)
        place = new
        s.remount()
    found = {b"d/" + path: e for path, e in shown(place).items()}
    assert diff_dumps(want, found) == []


def test_directory_cannot_go_below_itself(stack: Stacks) -> None:
    s = stack(LOWER)
    assert rename(s.merged / "d", s.merged / "d/sub/x", 0) == "EINVAL"
    assert rename(s.merged / "d", s.merged / "d/sub", EXCHANGE) == "EINVAL"
    assert rename(s.merged / "d/sub", s.merged / "d", 0) == "ENOTEMPTY"


def test_open_directory_goes_on_after_its_rename(stack: Stacks) -> None:
    s = stack(LOWER)
    fd = os.open(s.merged / "d", os.O_RDONLY | os.O_DIRECTORY)
    (s.merged / "d").rename(s.merged / "e/moved")
    assert sorted(os.listdir(fd)) == ["f", "sub"]
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
    os.close(fd)
    assert (s.merged / "e/moved/new").exists()


def test_renamed_open_file_keeps_its_descriptor(stack: Stacks) -> None:
    s = stack(LOWER)
    fd = os.open(s.merged / "d/f", os.O_RDONLY)
    (s.merged / "d/f").rename(s.merged / "e/g")
    (s.merged / "e/g").write_text("new")
    assert os.pread(fd, 10, 0) == b"new"
    os.close(fd)


def test_without_redirects_a_lower_directory_is_not_renamed(stack: Stacks) -> None:
    s = stack(LOWER, options=["redirect_dir=off"])
    assert rename(s.merged / "d", s.merged / "x", 0) == "EXDEV"
    assert (s.merged / "d/f").read_text() == "f"


# --- removing ---------------------------------------------------------------------------------


def test_directory_that_holds_only_whiteouts_can_be_removed(stack: Stacks) -> None:
    s = stack(LOWER)
    empty(s.merged / "d")
    assert is_whiteout(s.upper / "d/f")
    (s.merged / "d").rmdir()
    assert is_whiteout(s.upper / "d")
    s.remount()
    assert not os.path.lexists(s.merged / "d")


def test_directory_of_the_upper_that_holds_only_whiteouts_can_be_removed(stack: Stacks) -> None:
    s = stack({"d/f": "f"}, upper={"d/f": WHITEOUT, "d/g": WHITEOUT, "only/x": WHITEOUT})
    (s.merged / "d").rmdir()
    (s.merged / "only").rmdir()
    assert os.listdir(s.merged) == []
    assert os.listdir(s.upper) == ["d"]


@pytest.mark.parametrize("name", ["d", "d/sub"])
def test_directory_that_shows_something_is_not_removed(stack: Stacks, name: str) -> None:
    s = stack(LOWER)
    (s.merged / "d/f").unlink()
    with pytest.raises(OSError, match="Directory not empty"):
        (s.merged / name).rmdir()


def test_opaque_directory_gets_no_whiteouts(stack: Stacks) -> None:
    s = stack(LOWER)
    empty(s.merged / "d")
    (s.merged / "d").rmdir()
    (s.merged / "d").mkdir()
    for turn in range(3):
        (s.merged / "d/f").write_text(str(turn))
        (s.merged / "d/sub").mkdir()
        (s.merged / "d/f").unlink()
        (s.merged / "d/sub").rmdir()
        (s.merged / "file").rename(s.merged / "d/file")
        (s.merged / "d/file").rename(s.merged / "file")
    assert os.getxattr(s.upper / "d", "trusted.overlay.opaque") == b"y"
    assert os.listdir(s.upper / "d") == []


def test_directory_in_an_opaque_one_gets_no_whiteouts(stack: Stacks) -> None:
    s = stack(LOWER)
    empty(s.merged / "d")
    (s.merged / "d").rmdir()
    (s.merged / "d/sub/deep").mkdir(parents=True)
    (s.merged / "d/sub/leaf").write_text("x")
    (s.merged / "d/sub/leaf").unlink()
    (s.merged / "d/sub/deep").rmdir()
    assert os.listdir(s.upper / "d/sub") == []


# --- creating ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d/f", "d", "e/sub", "fresh"])
def test_exclusive_creation_meets_what_is_there(stack: Stacks, name: str) -> None:
    s = stack(LOWER)
    (s.merged / "fresh").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        os.open(s.merged / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with pytest.raises(FileExistsError):
        (s.merged / name).mkdir()
    with pytest.raises(FileExistsError):
        (s.merged / name).symlink_to("x")
    with pytest.raises(FileExistsError):
        os.mkfifo(s.merged / name)
    with pytest.raises(FileExistsError):
        os.link(s.merged / "file", s.merged / name)


def test_exclusive_creation_over_a_whiteout_succeeds_once(stack: Stacks) -> None:
    s = stack(LOWER)
    (s.merged / "file").unlink()
    os.close(os.open(s.merged / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with pytest.raises(FileExistsError):
        os.open(s.merged / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    assert (s.merged / "file").read_text() == ""


def test_append_to_a_lower_file_goes_to_its_end_from_every_descriptor(stack: Stacks) -> None:
    s = stack(LOWER)
    fds = [os.open(s.merged / "file", os.O_WRONLY | os.O_APPEND) for _ in range(3)]
    for turn in range(6):
        os.write(fds[turn % 3], str(turn).encode())
    for fd in fds:
        os.close(fd)
    assert (s.merged / "file").read_text() == "file012345"
