"""Many layers, and the spellings of "not here" and "nothing below" that they may hold."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import twin
from tests.support.dump import Dump, diff_dumps, dump_tree
from tests.support.stack import Stack, Stacks, is_whiteout
from tests.support.trees import OPAQUE, WHITEOUT, Content, Node, Symlink, Tree

AUFS_ENV = {"FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT": "1"}
COUNTS = (1, 2, 40, 500)


@contextmanager
def overlayfs(base: Path, lowers: list[Path], upper: Path | None = None) -> Iterator[Path]:
    """The kernel's union of the same lowers; paths are relative, as its options must fit a page."""
    folder = base / "kernel"
    folder.mkdir()
    merged, own_upper = folder / "merged", folder / "upper"
    for directory in (merged, own_upper, folder / "work"):
        directory.mkdir()
    for number, lower in enumerate(lowers):
        (folder / str(number)).symlink_to(lower)
    names = ":".join(map(str, range(len(lowers))))
    options = f"lowerdir={names},upperdir={upper or 'upper'},workdir=work,redirect_dir=on"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, merged]
    subprocess.run(command, cwd=folder, check=True)
    try:
        yield merged
    finally:
        subprocess.run(["umount", merged], check=True)


def shown(root: Path) -> Dump:
    """What both sides must agree on; the root's own metadata is the upper's."""
    dump = twin.settled(dump_tree(root), phantoms=False)
    del dump[b""]
    return dump


def names_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


# --- how many ---------------------------------------------------------------------------------


def sheet(number: int) -> dict[str, Content]:
    """A layer that has a part in every rule: its own, shared, hidden from above, hiding below."""
    tree: dict[str, Content] = {
        "common": f"common {number}",
        f"own/{number}": f"own {number}",
        f"visible{number}": "seen",
    }
    if number % 10 == 0:
        tree[f"hidden{number + 1}"] = WHITEOUT
        tree[f"opaque{number}/"] = OPAQUE
    else:
        tree[f"hidden{number}"] = "never seen"
        tree[f"opaque{number - number % 10}/below"] = "never seen"
    return tree


@pytest.mark.parametrize("count", COUNTS)
def test_stack_of_layers_shows_what_overlayfs_shows(stack: Stacks, count: int) -> None:
    s = stack([sheet(number) for number in range(count)])
    with overlayfs(s.base, s.lowers) as merged:
        assert diff_dumps(shown(merged), shown(s.merged)) == []
    assert (s.merged / "common").read_text() == "common 0"
    assert not (s.merged / "hidden1").exists()
    assert sorted(os.listdir(s.merged / "own")) == sorted(map(str, range(count)))


@pytest.mark.parametrize("count", COUNTS)
def test_bottom_layer_of_a_stack_is_copied_up_and_left_alone(stack: Stacks, count: int) -> None:
    trees: list[Tree] = [{f"f{number}": str(number)} for number in range(count)]
    s = stack([*trees[:-1], {"deep/down/file": "bottom\n", **trees[-1]}])
    before = dump_tree(s.lowers[-1])
    with (s.merged / "deep/down/file").open("a") as file:
        file.write("more\n")
    s.remount()
    assert (s.merged / "deep/down/file").read_text() == "bottom\nmore\n"
    assert (s.upper / "deep/down/file").read_text() == "bottom\nmore\n"
    assert diff_dumps(before, dump_tree(s.lowers[-1])) == []


@pytest.mark.parametrize("count", COUNTS)
def test_stack_of_layers_without_an_upper_is_read_only(stack: Stacks, count: int) -> None:
    s = stack([{f"f{number}": str(number)} for number in range(count)], upper=None)
    assert names_in(s.merged) == {f"f{number}" for number in range(count)}
    with pytest.raises(OSError, match="Read-only file system"):
        (s.merged / "f0").unlink()


PLACED: dict[str, Callable[[str], Tree]] = {
    "absent": lambda _name: {},
    "file": lambda name: {name: "text"},
    "symlink": lambda name: {name: Symlink("elsewhere")},
    "directory": lambda name: {f"{name}/": None},
    "opaque": lambda name: {f"{name}/": OPAQUE},
    "whiteout": lambda name: {name: WHITEOUT},
}


def test_every_triple_of_objects_under_one_name_shows_what_overlayfs_shows(stack: Stacks) -> None:
    layers: list[dict[str | bytes, Content]] = [{}, {}, {}]
    for triple in itertools.product(PLACED, repeat=3):
        name = "-".join(triple)
        for place, kind in enumerate(triple):
            layers[place].update({os.fsdecode(k): v for k, v in PLACED[kind](name).items()})
            if kind in {"directory", "opaque"}:
                layers[place][f"{name}/in{place}"] = kind
    s = stack(layers)
    with overlayfs(s.base, s.lowers) as merged:
        assert diff_dumps(shown(merged), shown(s.merged)) == []


def test_directory_has_the_metadata_of_its_topmost_layer(stack: Stacks) -> None:
    top = Node(mode=0o2751, uid=7, gid=8, mtime_ns=123_456_789, xattrs={"user.x": b"top"})
    s = stack([{"d": top}, {"d": Node(mode=0o700, xattrs={"user.y": b"low"}), "d/f": "text"}])
    found = (s.merged / "d").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o2751, 7, 8)
    assert found.st_mtime_ns == 123_456_789
    assert os.listxattr(s.merged / "d") == ["user.x"]


# --- whiteouts, read --------------------------------------------------------------------------


def whiteout_by_xattr(prefix: str) -> Tree:
    node = Node("", xattrs={f"{prefix}.overlay.whiteout": b"y"})
    return {
        "": Node(xattrs={f"{prefix}.overlay.opaque": b"x"}),
        "d": Node(xattrs={f"{prefix}.overlay.opaque": b"x"}),
        "gone": node,
        "gonedir": node,
        "d/gone": node,
        "d/gonedir": node,
    }


WHITEOUTS: dict[str, Tree] = {
    "device": dict.fromkeys(("gone", "gonedir", "d/gone", "d/gonedir"), WHITEOUT),
    "trusted.overlay.whiteout": whiteout_by_xattr("trusted"),
    "user.overlay.whiteout": whiteout_by_xattr("user"),
    ".wh.": dict.fromkeys((".wh.gone", ".wh.gonedir", "d/.wh.gone", "d/.wh.gonedir"), ""),
}
HIDDEN: Tree = {
    "gone": "text",
    "gonedir/f": "text",
    "d/gone": "text",
    "d/gonedir/f": "text",
    "d/stays": "text",
    "stays": "text",
}
SEEN_PAST_WHITEOUTS = {"stays", "d", "d/stays"}
GONE = ("gone", "gonedir", "gonedir/f", "d/gone", "d/gonedir", "d/gonedir/f")


@pytest.mark.parametrize("spelling", WHITEOUTS)
def test_whiteout_in_a_lower_hides_the_name_from_a_listing(stack: Stacks, spelling: str) -> None:
    s = stack([WHITEOUTS[spelling], HIDDEN])
    assert names_in(s.merged) == SEEN_PAST_WHITEOUTS


@pytest.mark.parametrize("spelling", WHITEOUTS)
def test_whiteout_in_a_lower_hides_the_name_from_a_lookup(stack: Stacks, spelling: str) -> None:
    s = stack([WHITEOUTS[spelling], HIDDEN])
    assert [name for name in GONE if os.path.lexists(s.merged / name)] == []
    assert (s.merged / "d/stays").read_text() == "text"


@pytest.mark.parametrize("spelling", ["device", ".wh."])
def test_whiteout_in_an_upper_hides_the_name(stack: Stacks, spelling: str) -> None:
    s = stack(HIDDEN, upper=WHITEOUTS[spelling])
    assert [name for name in GONE if os.path.lexists(s.merged / name)] == []
    assert names_in(s.merged) == SEEN_PAST_WHITEOUTS


@pytest.mark.parametrize("spelling", WHITEOUTS)
def test_whiteout_hides_nothing_above_it(stack: Stacks, spelling: str) -> None:
    above: Tree = {"gone": "new", "gonedir/g": "new", "d/gone": "new", "d/gonedir/g": "new"}
    s = stack([above, WHITEOUTS[spelling], HIDDEN])
    assert names_in(s.merged) == SEEN_PAST_WHITEOUTS | {
        "gone",
        "gonedir",
        "gonedir/g",
        "d/gone",
        "d/gonedir",
        "d/gonedir/g",
    }
    assert (s.merged / "d/gone").read_text() == "new"


@pytest.mark.parametrize("spelling", WHITEOUTS)
def test_name_that_a_lower_hides_can_be_made_anew(stack: Stacks, spelling: str) -> None:
    s = stack([WHITEOUTS[spelling], HIDDEN])
    (s.merged / "d/gone").write_text("again")
    (s.merged / "gonedir").mkdir()
    s.remount()
    assert names_in(s.merged) == SEEN_PAST_WHITEOUTS | {"d/gone", "gonedir"}
    assert (s.merged / "d/gone").read_text() == "again"


@pytest.mark.parametrize("spelling", WHITEOUTS)
def test_directory_with_lower_whiteouts_alone_can_be_removed(stack: Stacks, spelling: str) -> None:
    s = stack([WHITEOUTS[spelling], {"d/gone": "text", "d/gonedir/f": "text"}])
    (s.merged / "d").rmdir()
    s.remount()
    assert names_in(s.merged) == set()


def test_xattr_of_a_whiteout_counts_only_in_a_directory_marked_for_it(stack: Stacks) -> None:
    marked = Node("", xattrs={"trusted.overlay.whiteout": b"y"})
    s = stack([{"f": marked}, {"f": "text"}])
    # Overlayfs lists such a name and finds nothing under it; here both say the same.
    assert os.listdir(s.merged) == ["f"]
    assert (s.merged / "f").read_text() == ""


@pytest.mark.parametrize("spelling", ["device", "trusted.overlay.whiteout"])
def test_whiteouts_hide_what_overlayfs_hides(stack: Stacks, spelling: str) -> None:
    s = stack([{"top": "text", "d/top": "text"}, WHITEOUTS[spelling], HIDDEN])
    with overlayfs(s.base, s.lowers) as merged:
        assert diff_dumps(shown(merged), shown(s.merged)) == []


# --- opaque directories, read -----------------------------------------------------------------


def opaque_by_xattr(name: str) -> Tree:
    return {"d": Node(mode=0o750, xattrs={name: b"y"}), "d/new": "text"}


OPAQUES: dict[str, Tree] = {
    "trusted.overlay.opaque": opaque_by_xattr("trusted.overlay.opaque"),
    "user.overlay.opaque": opaque_by_xattr("user.overlay.opaque"),
    "user.fuseoverlayfs.opaque": opaque_by_xattr("user.fuseoverlayfs.opaque"),
    ".wh..wh..opq": {"d": Node(mode=0o750), "d/new": "text", "d/.wh..wh..opq": ""},
}
BELOW_OPAQUE: Tree = {"d/old": "text", "d/sub/old": "text", "d/new": "old", "stays": "text"}


@pytest.mark.parametrize("spelling", OPAQUES)
@pytest.mark.parametrize("in_upper", [False, True], ids=["in-lower", "in-upper"])
def test_opaque_directory_hides_what_is_below(stack: Stacks, spelling: str, in_upper: bool) -> None:
    opaque = OPAQUES[spelling]
    s = stack(BELOW_OPAQUE, upper=opaque) if in_upper else stack([opaque, BELOW_OPAQUE])
    assert not os.path.lexists(s.merged / "d/old")
    assert not os.path.lexists(s.merged / "d/sub/old")
    assert names_in(s.merged) == {"d", "d/new", "stays"}
    assert (s.merged / "d/new").read_text() == "text"


@pytest.mark.parametrize("spelling", OPAQUES)
def test_opaque_directory_is_merged_with_those_above_it(stack: Stacks, spelling: str) -> None:
    s = stack([{"d/top": "text"}, OPAQUES[spelling], BELOW_OPAQUE])
    assert names_in(s.merged) == {"d", "d/top", "d/new", "stays"}


@pytest.mark.parametrize("spelling", OPAQUES)
def test_marker_of_an_opaque_directory_is_not_shown(stack: Stacks, spelling: str) -> None:
    s = stack([OPAQUES[spelling], BELOW_OPAQUE])
    assert os.listxattr(s.merged / "d") == []
    for marker in OPAQUES:
        assert not os.path.lexists(s.merged / "d" / marker)


@pytest.mark.parametrize("spelling", OPAQUES)
def test_opaque_directory_of_a_lower_stays_so_when_copied_up(stack: Stacks, spelling: str) -> None:
    s = stack([OPAQUES[spelling], BELOW_OPAQUE])
    (s.merged / "d/added").write_text("text")
    (s.merged / "d").rename(s.merged / "moved")
    s.remount()
    assert names_in(s.merged) == {"moved", "moved/new", "moved/added", "stays"}


@pytest.mark.parametrize("spelling", OPAQUES)
def test_opaque_root_of_a_layer_hides_all_below(stack: Stacks, spelling: str) -> None:
    top: Tree = {"new": "text"}
    s = stack([top, {"stays": "text"}, {"old": "text"}], mounted=False)
    if spelling == ".wh..wh..opq":
        (s.lowers[1] / spelling).touch()
    else:
        os.setxattr(s.lowers[1], spelling, b"y")
    s.start()
    assert not os.path.lexists(s.merged / "old")
    assert names_in(s.merged) == {"new", "stays"}


def test_value_x_of_the_opaque_marker_hides_nothing_by_itself(stack: Stacks) -> None:
    s = stack([{"d": Node(xattrs={"trusted.overlay.opaque": b"x"})}, {"d/old": "text"}])
    assert names_in(s.merged) == {"d", "d/old"}
    with overlayfs(s.base, s.lowers) as merged:
        assert names_in(merged) == {"d", "d/old"}


# --- markers, written -------------------------------------------------------------------------

LOWER: Tree = {
    "file": "text",
    "kept": "text",
    "dir/one": "1",
    "dir/two": "2",
    "empty/": None,
    "other/sub/leaf": "leaf",
}


def unlink_file(root: Path) -> None:
    (root / "file").unlink()
    (root / "dir/one").unlink()


def recreate_file(root: Path) -> None:
    unlink_file(root)
    (root / "file").write_text("new")
    (root / "dir/one").symlink_to("two")


def remove_directory(root: Path) -> None:
    (root / "empty").rmdir()
    for name in ("one", "two"):
        (root / "dir" / name).unlink()
    (root / "dir").rmdir()


def recreate_directory(root: Path) -> None:
    remove_directory(root)
    (root / "dir").mkdir()
    (root / "dir/three").write_text("3")
    (root / "empty").write_text("a file now")


def directory_over_file(root: Path) -> None:
    (root / "file").unlink()
    (root / "file").mkdir()
    (root / "file/in").write_text("in")


def rename_file(root: Path) -> None:
    (root / "file").rename(root / "dir/renamed")
    (root / "kept").rename(root / "dir/one")


def rename_over_hidden(root: Path) -> None:
    (root / "dir/two").unlink()
    (root / "kept").rename(root / "dir/two")


def rename_new_directory_over_hidden(root: Path) -> None:
    remove_directory(root)
    (root / "made").mkdir()
    (root / "made/x").write_text("x")
    (root / "made").rename(root / "dir")


def rename_lower_directory(root: Path) -> None:
    (root / "dir").rename(root / "moved")
    (root / "dir").mkdir()
    (root / "dir/fresh").write_text("fresh")
    (root / "other/sub").rename(root / "moved/sub")


def rename_onto_emptied_directory(root: Path) -> None:
    for name in ("one", "two"):
        (root / "dir" / name).unlink()
    (root / "other").rename(root / "dir")


def delete_again_what_was_made_again(root: Path) -> None:
    recreate_file(root)
    unlink_file(root)
    recreate_directory_after_all(root)


def recreate_directory_after_all(root: Path) -> None:
    (root / "dir/two").unlink()
    (root / "dir").rmdir()
    (root / "dir").mkdir()
    (root / "dir").rmdir()


def link_over_hidden(root: Path) -> None:
    (root / "file").unlink()
    os.link(root / "kept", root / "file")


SCRIPTS: dict[str, Callable[[Path], None]] = {
    script.__name__: script
    for script in (
        unlink_file,
        recreate_file,
        remove_directory,
        recreate_directory,
        directory_over_file,
        rename_file,
        rename_over_hidden,
        rename_new_directory_over_hidden,
        rename_lower_directory,
        rename_onto_emptied_directory,
        delete_again_what_was_made_again,
        link_over_hidden,
    )
}


def aufs_names(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(".wh.")]


def devices(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if is_whiteout(path)]


def for_each_script(tree: Tree) -> Tree:
    """A directory of its own for every script."""
    return {
        f"{script}/{os.fsdecode(name)}": content
        for script in SCRIPTS
        for name, content in tree.items()
    }


def run_scripts(root: Path) -> None:
    for name, script in SCRIPTS.items():
        script(root / name)


def expected(s: Stack) -> Dump:
    with overlayfs(s.base, s.lowers) as merged:
        run_scripts(merged)
        return shown(merged)


def test_without_whiteout_devices_everything_is_as_with_them(stack: Stacks) -> None:
    s = stack(for_each_script(LOWER), env=AUFS_ENV)
    run_scripts(s.merged)
    want = expected(s)
    assert diff_dumps(want, shown(s.merged)) == []
    s.unmount()
    s.start()
    assert diff_dumps(want, shown(s.merged)) == []
    assert devices(s.upper) == []


def test_whiteouts_of_one_dialect_are_understood_by_a_mount_with_the_other(stack: Stacks) -> None:
    s = stack(for_each_script(LOWER), env=AUFS_ENV)
    run_scripts(s.merged)
    s.remount()
    assert diff_dumps(expected(s), shown(s.merged)) == []


def test_whiteout_devices_left_by_another_mount_are_respected(stack: Stacks) -> None:
    gone: Tree = {"file": WHITEOUT, "dir/one": WHITEOUT, "empty": WHITEOUT}
    s = stack(for_each_script(LOWER), upper=for_each_script(gone), env=AUFS_ENV)
    for script in SCRIPTS:
        for name in ("file", "dir/one"):
            assert not os.path.lexists(s.merged / script / name)
            (s.merged / script / name).write_text("text" if name == "file" else "1")
        (s.merged / script / "empty").mkdir()
    run_scripts(s.merged)
    want = expected(s)
    assert diff_dumps(want, shown(s.merged)) == []
    s.remount()
    assert diff_dumps(want, shown(s.merged)) == []


def test_unlink_of_lower_file_leaves_a_device_as_whiteout(stack: Stacks) -> None:
    s = stack(LOWER)
    unlink_file(s.merged)
    assert is_whiteout(s.upper / "file")
    assert is_whiteout(s.upper / "dir/one")
    assert aufs_names(s.upper) == []


def test_directory_made_over_a_whiteout_is_marked_opaque(stack: Stacks) -> None:
    s = stack(LOWER)
    recreate_directory(s.merged)
    assert os.getxattr(s.upper / "dir", "trusted.overlay.opaque") == b"y"
    assert aufs_names(s.upper) == []


def test_with_files_as_whiteouts_the_name_is_spelt_as_aufs_does(stack: Stacks) -> None:
    s = stack(LOWER, env=AUFS_ENV)
    unlink_file(s.merged)
    assert sorted(names_in(s.upper)) == [".wh.file", "dir", "dir/.wh.one"]


def test_file_made_over_an_aufs_whiteout_takes_it_away(stack: Stacks) -> None:
    s = stack(LOWER, env=AUFS_ENV)
    recreate_file(s.merged)
    assert sorted(names_in(s.upper)) == ["dir", "dir/one", "file"]


@pytest.mark.parametrize("env", [{}, AUFS_ENV], ids=["devices", "files"])
def test_unlink_of_a_file_that_only_the_upper_had_leaves_nothing(
    stack: Stacks, env: dict[str, str]
) -> None:
    s = stack(LOWER, env=env)
    (s.merged / "fresh").write_text("x")
    (s.merged / "fresh").unlink()
    (s.merged / "d").mkdir()
    (s.merged / "d").rmdir()
    assert names_in(s.upper) == set()


def test_upper_of_fuse_overlayfs_with_both_opaque_markers_is_read(stack: Stacks) -> None:
    upper: Tree = {
        "d": Node(xattrs={"trusted.overlay.opaque": b"y"}),
        "d/.wh..wh..opq": "",
        "d/new": "text",
    }
    s = stack(BELOW_OPAQUE, upper=upper)
    assert names_in(s.merged) == {"d", "d/new", "stays"}
    (s.merged / "d/new").unlink()
    (s.merged / "d").rmdir()
    s.remount()
    assert names_in(s.merged) == {"stays"}
