"""One layer on disk: what a name means in each dialect, and that nothing in it leads outside."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.trees import EMPTY, OPAQUE, WHITEOUT, HardLink, Node, Symlink, Tree, make_tree
from unionfs import layer as layer_module
from unionfs.errors import SetupError
from unionfs.layer import DirectoryLayer, DirectorySheet, FdCache, walk
from unionfs.markers import USER_PREFIX, Dialect
from unionfs.resolve import ABSENT, DIRECTORY, FILE, METACOPY, Fact
from unionfs.resolve import OPAQUE as OPAQUE_FACT
from unionfs.resolve import WHITEOUT as WHITEOUT_FACT

pytestmark = pytest.mark.root

TRUSTED = "trusted.overlay."
USER = "user.overlay."


class Layers:
    """Makes layers of a test and closes them at its end."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.cache = FdCache(100)
        self._made: list[DirectoryLayer] = []

    def __call__(
        self, tree: Tree = EMPTY, *, dialect: Dialect | None = None, bottom: bool = False
    ) -> DirectoryLayer:
        top = self._scratch / f"layer{len(self._made)}"
        top.mkdir()
        make_tree(top, tree)
        fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        made = DirectoryLayer(
            fd,
            os.fsencode(top),
            index=len(self._made),
            dialect=dialect or Dialect(),
            cache=self.cache,
        )
        made.bottom = bottom
        made.root.marks()
        self._made.append(made)
        return made

    def close(self) -> None:
        self.cache.capacity = 0
        self.cache.trim()
        for made in self._made:
            made.close()


@pytest.fixture
def layers(scratch: Path) -> Iterator[Layers]:
    made = Layers(scratch)
    yield made
    made.close()


def on_disk(layer: DirectoryLayer) -> Path:
    return Path(os.fsdecode(layer.name))


def fact_of(layer: DirectoryLayer, name: bytes) -> Fact:
    return layer.root.examine(name, beneath=True).fact


def sub(sheet: DirectorySheet, *names: bytes) -> DirectorySheet:
    for name in names:
        found = sheet.examine(name, beneath=True).sheet
        assert isinstance(found, DirectorySheet)
        sheet = found
    return sheet


def metacopy(prefix: str, *, redirect: bytes | None = None) -> Node:
    """An empty file with the marks of a metacopy, to be given its size by `grow`."""
    marks = {prefix + "metacopy": b""}
    if redirect is not None:
        marks[prefix + "redirect"] = redirect
    return Node("", xattrs=marks)


def grow(layer: DirectoryLayer, name: str) -> None:
    os.truncate(on_disk(layer) / name, 5000)


# --- examine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "fact"),
    [
        (EMPTY, ABSENT),
        ({"a": "text"}, FILE),
        ({"a": ""}, FILE),
        ({"a": Symlink("nowhere")}, FILE),
        ({"a": Node(kind=stat.S_IFIFO)}, FILE),
        ({"a": Node(kind=stat.S_IFSOCK)}, FILE),
        ({"a": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3))}, FILE),
        ({"a": Node(kind=stat.S_IFBLK, rdev=0)}, FILE),
        ({"a": "x", "h": HardLink("a")}, FILE),
        ({"a/": None}, DIRECTORY),
        # overlayfs
        ({"a": WHITEOUT}, WHITEOUT_FACT),
        ({"a/": OPAQUE}, OPAQUE_FACT),
        ({"a": Node(xattrs={"trusted.overlay.opaque": b"n"})}, DIRECTORY),
        ({"a": Node(xattrs={"trusted.overlay.opaque": b""})}, DIRECTORY),
        # overlayfs in a user namespace, fuse-overlayfs: what hides is read in every dialect
        ({"a": Node(xattrs={"user.overlay.opaque": b"y"})}, OPAQUE_FACT),
        ({"a": Node(xattrs={"user.fuseoverlayfs.opaque": b"y"})}, OPAQUE_FACT),
        # AUFS
        ({".wh.a": ""}, WHITEOUT_FACT),
        ({".wh.a": "", "a": "text"}, FILE),
        ({".wh.a": "", "a/": None}, OPAQUE_FACT),
        ({"a/.wh..wh..opq": ""}, OPAQUE_FACT),
        ({".wh.b": ""}, ABSENT),
    ],
)
def test_what_a_name_means(layers: Layers, tree: Tree, fact: Fact):
    assert fact_of(layers(tree), b"a") == fact


@pytest.mark.parametrize("prefix", [TRUSTED, USER])
@pytest.mark.parametrize(
    ("content", "marker", "fact"),
    [("", "whiteout", WHITEOUT_FACT), ("text", "whiteout", FILE), ("", "nonsense", FILE)],
)
def test_whiteout_as_an_attribute_is_an_empty_file(
    layers: Layers, prefix: str, content: str, marker: str, fact: Fact
):
    d = Node(xattrs={prefix + "opaque": b"x"})
    layer = layers({"d": d, "d/a": Node(content, xattrs={prefix + marker: b""})})
    assert sub(layer.root, b"d").examine(b"a", beneath=True).fact == fact


def test_whiteout_as_an_attribute_counts_only_where_the_directory_announces_it(layers: Layers):
    layer = layers({"d/a": Node("", xattrs={"trusted.overlay.whiteout": b""})})
    assert sub(layer.root, b"d").examine(b"a", beneath=True).fact == FILE


def test_bottom_layer_has_nothing_to_be_opaque_to(layers: Layers):
    assert fact_of(layers({"a/": OPAQUE}, bottom=True), b"a") == DIRECTORY


def test_whiteout_in_the_bottom_layer_is_not_shown(layers: Layers):
    assert fact_of(layers({"a": WHITEOUT}, bottom=True), b"a") == WHITEOUT_FACT


def test_aufs_whiteout_does_not_matter_where_nothing_is_beneath(layers: Layers):
    assert layers({".wh.a": ""}).root.examine(b"a", beneath=False).fact == ABSENT


def test_name_too_long_for_an_aufs_whiteout_is_absent(layers: Layers):
    assert fact_of(layers(), b"n" * 255) == ABSENT


def test_name_too_long_for_the_layers_file_system_is_absent(layers: Layers):
    assert fact_of(layers(), b"n" * 256) == ABSENT


def test_name_below_what_is_no_directory_any_more_is_absent(layers: Layers):
    layer = layers({"d/a": ""})
    sheet = sub(layer.root, b"d")
    (on_disk(layer) / "d/a").unlink()
    sheet.close()
    (on_disk(layer) / "d").rmdir()
    (on_disk(layer) / "d").write_text("a file now")
    assert sheet.examine(b"a", beneath=True).fact == ABSENT


# --- metacopy and redirect ---------------------------------------------------------------------------------------


def test_sparse_file_with_the_marker_is_a_metacopy(layers: Layers):
    layer = layers({"a": metacopy(TRUSTED)})
    grow(layer, "a")
    assert fact_of(layer, b"a") == METACOPY


def test_sparse_file_without_the_marker_is_a_file(layers: Layers):
    layer = layers({"a": ""})
    grow(layer, "a")
    assert fact_of(layer, b"a") == FILE


def test_metacopy_with_some_data_is_one_in_an_impure_directory(layers: Layers):
    impure = Node(xattrs={"trusted.overlay.impure": b"y"})
    data = Node("x" * 5000, xattrs={"trusted.overlay.metacopy": b""})
    layer = layers({"d": impure, "d/a": data})
    assert sub(layer.root, b"d").examine(b"a", beneath=True).fact == METACOPY


def test_metacopy_of_a_dialect_that_anybody_can_write_is_not_believed(layers: Layers):
    layer = layers({"a": metacopy(USER)})
    grow(layer, "a")
    assert fact_of(layer, b"a") == FILE


def test_metacopy_of_the_dialect_of_the_mount_is_believed(layers: Layers):
    layer = layers({"a": metacopy(USER)}, dialect=Dialect(USER_PREFIX))
    grow(layer, "a")
    assert fact_of(layer, b"a") == METACOPY


def test_metacopy_in_the_bottom_layer_is_a_file(layers: Layers):
    layer = layers({"a": metacopy(TRUSTED)}, bottom=True)
    grow(layer, "a")
    assert fact_of(layer, b"a") == FILE


def test_metacopy_says_where_its_data_is(layers: Layers):
    layer = layers({"a": metacopy(TRUSTED, redirect=b"/d/b")})
    grow(layer, "a")
    assert layer.root.examine(b"a", beneath=True).redirect == (True, [b"d", b"b"])


def test_directory_says_where_its_lower_directories_are(layers: Layers):
    layer = layers({"a": Node(xattrs={"trusted.overlay.redirect": b"old"})})
    hit = layer.root.examine(b"a", beneath=True)
    assert (hit.fact, hit.redirect) == (DIRECTORY, (False, [b"old"]))


def test_redirect_of_a_dialect_that_anybody_can_write_is_not_followed(layers: Layers):
    layer = layers({"a": Node(xattrs={"user.overlay.redirect": b"/etc"})})
    assert layer.root.examine(b"a", beneath=True).redirect is None


@pytest.mark.parametrize("value", [b"/../etc", b"a/b", b"/", b".."])
def test_directory_with_a_malformed_redirect_shows_nothing_from_below(layers: Layers, value: bytes):
    layer = layers({"a": Node(xattrs={"trusted.overlay.redirect": value})})
    hit = layer.root.examine(b"a", beneath=True)
    assert (hit.fact, hit.redirect) == (OPAQUE_FACT, None)


# --- scan --------------------------------------------------------------------------------------------------------


def test_listing_names_everything_but_markers(layers: Layers):
    layer = layers(
        {
            "file": "",
            "dir/": None,
            "link": Symlink("dir"),
            "fifo": Node(kind=stat.S_IFIFO),
            "device": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3)),
            "gone": WHITEOUT,
            ".wh.old": "",
            b"\xff": "",
        }
    )
    names, directories, hidden = layer.root.scan()
    assert sorted(names) == [b"device", b"dir", b"fifo", b"file", b"link", b"\xff"]
    assert directories == {b"dir"}
    assert hidden == {b"gone", b"old"}


def test_listing_hides_beneath_what_it_shows_itself(layers: Layers):
    names, _, hidden = layers({".wh.a": "", "a/": None}).root.scan()
    assert (names, hidden) == ([b"a"], {b"a"})


def test_listing_reads_whiteouts_as_attributes(layers: Layers):
    d = Node(xattrs={"trusted.overlay.opaque": b"x"})
    gone = Node("", xattrs={"trusted.overlay.whiteout": b""})
    layer = layers({"d": d, "d/gone": gone, "d/empty": "", "d/full": "text"})
    names, _, hidden = sub(layer.root, b"d").scan()
    assert (sorted(names), hidden) == ([b"empty", b"full"], {b"gone"})


def test_listing_and_examining_agree_about_what_hides(layers: Layers):
    layer = layers({"a": WHITEOUT, ".wh.b": "", ".wh.c": "", "c/": None, "d/": OPAQUE, "e": ""})
    names, _, hidden = layer.root.scan()
    for name in (b"a", b"b", b"c", b"d", b"e"):
        fact = fact_of(layer, name)
        assert (name in names) == (fact not in (WHITEOUT_FACT, ABSENT)), name
        assert (name in hidden) == (fact == WHITEOUT_FACT or name == b"c"), name


# --- metadata ----------------------------------------------------------------------------------------------------


def test_metadata_of_a_link_is_its_own(layers: Layers):
    assert stat.S_ISLNK(layers({"s": Symlink("/etc")}).root.lstat(b"s").st_mode)


def test_metadata_of_a_directory_does_not_depend_on_it_being_open(layers: Layers):
    layer = layers({"d/": None})
    sheet = layer.root.child(b"d")
    closed = sheet.stat_self()
    sheet.fd()
    assert sheet.stat_self() == closed


def test_path_is_that_inside_the_layer(layers: Layers):
    layer = layers({"a/b/c/": None})
    assert sub(layer.root, b"a", b"b", b"c").path() == b"/a/b/c"
    assert layer.root.path() == b"/"


# --- descriptors -------------------------------------------------------------------------------------------------


def test_trimming_closes_what_was_not_used_for_longest(layers: Layers):
    layer = layers({f"{number}/": None for number in range(5)})
    sheets = [layer.root.child(b"%d" % number) for number in range(5)]
    for sheet in sheets:
        sheet.fd()
    sheets[0].fd()
    layers.cache.capacity = 2
    layers.cache.trim()
    assert [sheet.is_open for sheet in sheets] == [True, False, False, False, True]


def test_nothing_is_closed_before_the_trim(layers: Layers):
    layer = layers({f"{number}/": None for number in range(5)})
    layers.cache.capacity = 2
    sheets = [layer.root.child(b"%d" % number) for number in range(5)]
    fds = [sheet.fd() for sheet in sheets]
    assert [os.fstat(fd).st_ino for fd in fds] == [sheet.stat_self().st_ino for sheet in sheets]


def test_root_stays_open_whatever_is_trimmed(layers: Layers):
    layer = layers({"d/": None})
    layer.root.child(b"d").fd()
    layers.cache.capacity = 0
    layers.cache.trim()
    assert layer.root.is_open


def test_trimmed_directory_is_opened_again_one_component_at_a_time(layers: Layers):
    layer = layers({"a/b/c/d/": None})
    sheets = [layer.root]
    for name in (b"a", b"b", b"c", b"d"):
        sheets.append(sheets[-1].child(name))
    before = os.fstat(sheets[-1].fd()).st_ino
    layers.cache.capacity = 0
    layers.cache.trim()
    assert not any(sheet.is_open for sheet in sheets[1:])
    assert os.fstat(sheets[-1].fd()).st_ino == before
    assert all(sheet.is_open for sheet in sheets)


def test_trimmed_directory_is_found_again_under_its_new_name(layers: Layers):
    layer = layers({"a/d/": None, "b/": None})
    sheet = layer.root.child(b"a").child(b"d")
    before = os.fstat(sheet.fd()).st_ino
    layers.cache.capacity = 0
    layers.cache.trim()
    (on_disk(layer) / "a/d").rename(on_disk(layer) / "b/new")
    sheet.parent, sheet.name = layer.root.child(b"b"), b"new"
    assert os.fstat(sheet.fd()).st_ino == before


def test_pinned_directory_stays_open_when_trimmed_and_removed(layers: Layers):
    layer = layers({"d/": None})
    sheet = layer.root.child(b"d")
    before = os.fstat(sheet.fd()).st_ino
    sheet.pin()
    sheet.fd()
    layers.cache.capacity = 0
    layers.cache.trim()
    (on_disk(layer) / "d").rmdir()
    assert os.fstat(sheet.fd()).st_ino == before
    sheet.close()


def test_removed_directory_is_an_error_once_it_is_closed(layers: Layers):
    layer = layers({"d/": None})
    sheet = layer.root.child(b"d")
    sheet.fd()
    sheet.close()
    (on_disk(layer) / "d").rmdir()
    with pytest.raises(FileNotFoundError):
        sheet.fd()


def test_closing_everything_leaves_no_descriptor(scratch: Path):
    before = len(os.listdir("/proc/self/fd"))
    layers = Layers(scratch)
    layer = layers({"a/b/": None, "c/": None})
    sub(layer.root, b"a", b"b").scan()
    sub(layer.root, b"c").scan()
    layers.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(layers.cache) == 0


def test_closed_layer_refuses_instead_of_using_another_file(layers: Layers):
    layer = layers({"d/": None})
    sheet = layer.root.child(b"d")
    layer.close()
    with pytest.raises(OSError, match="the layer is closed") as refused:
        sheet.fd()
    assert refused.value.errno == errno.ESTALE


# --- nothing leads outside ---------------------------------------------------------------------------------------


@pytest.fixture
def outside(scratch: Path) -> Path:
    folder = scratch / "outside"
    make_tree(folder.parent, {"outside/secret": Node("secret", xattrs={"user.a": b"secret"})})
    return folder


def test_link_to_a_directory_is_no_directory(layers: Layers, outside: Path):
    hit = layers({"d": Symlink(str(outside))}).root.examine(b"d", beneath=True)
    assert (hit.fact, hit.sheet) == (FILE, None)


def test_directory_replaced_by_a_link_is_not_opened(layers: Layers, outside: Path):
    layer = layers({"d/secret": "mine"})
    sheet = sub(layer.root, b"d")
    sheet.close()
    (on_disk(layer) / "d").rename(on_disk(layer) / "moved")
    (on_disk(layer) / "d").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        sheet.open(b"secret", os.O_RDONLY)


def test_parent_replaced_by_a_link_is_not_passed(layers: Layers, outside: Path):
    (outside / "below").mkdir()
    layer = layers({"d/below/": None})
    sheet = layer.root.child(b"d").child(b"below")
    (on_disk(layer) / "d").rename(on_disk(layer) / "moved")
    (on_disk(layer) / "d").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        sheet.fd()


def test_link_is_not_followed_by_open(layers: Layers, outside: Path):
    layer = layers({"a": Symlink(str(outside / "secret"))})
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        layer.root.open(b"a", os.O_RDONLY)


def test_attributes_of_a_link_are_not_those_of_its_target(layers: Layers, outside: Path):
    layer = layers({"a": Symlink(str(outside / "secret"))})
    path = layer.root.xattr_path(b"a")
    assert b"user.a" not in map(os.fsencode, os.listxattr(path, follow_symlinks=False))


# --- walk: absolute redirects ------------------------------------------------------------------------------------


def test_walk_ends_in_the_directory_above_the_last_name(layers: Layers):
    way = walk(layers({"a/b/": None}), [b"a", b"b", b"c"])
    assert way.sheet is not None
    assert (way.sheet.path(), way.closed) == (b"/a/b", False)


def test_walk_to_a_name_in_the_root_ends_in_the_root(layers: Layers):
    layer = layers()
    assert walk(layer, [b"a"]).sheet is layer.root


def test_walk_over_a_missing_directory_leaves_the_layers_below_open(layers: Layers):
    way = walk(layers(), [b"a", b"b"])
    assert (way.sheet, way.closed) == (None, False)


@pytest.mark.parametrize("tree", [{"a": WHITEOUT}, {".wh.a": ""}, {"a": "file"}])
def test_walk_over_what_is_no_directory_hides_the_layers_below(layers: Layers, tree: Tree):
    way = walk(layers(tree), [b"a", b"b"])
    assert (way.sheet, way.closed) == (None, True)


def test_walk_over_an_opaque_directory_hides_the_layers_below(layers: Layers):
    way = walk(layers({"a/": OPAQUE, "a/b/": None}), [b"a", b"b", b"c"])
    assert way.sheet is not None
    assert way.closed


def test_walk_does_not_follow_links(layers: Layers, outside: Path):
    way = walk(layers({"a": Symlink(str(outside))}), [b"a", b"secret"])
    assert (way.sheet, way.closed) == (None, True)


@pytest.mark.parametrize(
    ("redirect", "below"),
    [(b"old", [b"a", b"old", b"c"]), (b"/x/y", [b"x", b"y", b"c"])],
)
def test_redirect_on_the_way_changes_the_path_for_the_layers_below(
    layers: Layers, redirect: bytes, below: list[bytes]
):
    b = Node(xattrs={"trusted.overlay.redirect": redirect})
    way = walk(layers({"a/b": b}), [b"a", b"b", b"c"])
    assert way.sheet is not None
    assert (way.sheet.path(), way.components) == (b"/a/b", below)


def test_redirect_in_a_foreign_dialect_does_not_change_the_way(layers: Layers):
    b = Node(xattrs={"user.overlay.redirect": b"/etc"})
    assert walk(layers({"a/b": b}), [b"a", b"b", b"c"]).components == [b"a", b"b", b"c"]


# --- opening a lower directory -----------------------------------------------------------------------------------


@contextlib.contextmanager
def private(path: Path, mountpoint: Path) -> Iterator[int]:
    fd = layer_module.open_private(os.fsencode(path), mountpoint=os.fsencode(mountpoint))
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "does not exist"), ("file", "is not a directory")]
)
def test_unfit_lower_directory_is_named_with_the_reason(scratch: Path, name: str, reason: str):
    (scratch / "file").touch()
    path = scratch / name
    with pytest.raises(SetupError) as refused, private(path, scratch / "mnt"):
        pass
    assert str(refused.value) == f"lower directory {path} {reason}: check lowerdir="


def test_lower_directory_cannot_be_written_through_its_descriptor(scratch: Path):
    read_only = os.strerror(errno.EROFS)
    with private(scratch, scratch / "mnt") as fd, pytest.raises(OSError, match=read_only):
        os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)


def test_what_is_mounted_later_on_a_lower_directory_is_not_seen(scratch: Path):
    (scratch / "lower").mkdir()
    (scratch / "lower/below").touch()
    with private(scratch / "lower", scratch / "mnt") as fd:
        subprocess.run(["mount", "-t", "tmpfs", "none", scratch / "lower"], check=True)
        try:
            assert os.listdir(fd) == ["below"]
        finally:
            subprocess.run(["umount", scratch / "lower"], check=True)


def test_mount_point_may_lie_in_the_lower_directory(scratch: Path):
    (scratch / "mnt").mkdir()
    with private(scratch, scratch / "mnt") as fd:
        assert os.listdir(fd) == ["mnt"]
