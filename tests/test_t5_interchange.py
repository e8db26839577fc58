"""An upper that mica wrote shows the same tree under kernel overlayfs, and the other way round.

One case a marker: each script of calls leaves that marker in the upper (asserted, so that no case
passes by not writing it), then the upper changes hands.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import twin
from tests.support.dump import Dump, diff_dumps
from tests.support.twin import Cast, KernelSide, MicaSide, Op, Side
from unionfs.check import check_upper

pytestmark = [pytest.mark.root, pytest.mark.fuse]

CREATE = os.O_CREAT | os.O_EXCL


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def has_marker(path: Path, name: str) -> bool:
    return f"trusted.overlay.{name}" in os.listxattr(path, follow_symlinks=False)


Evidence = Callable[[Path], bool]
CASES: dict[str, tuple[tuple[Op, ...], Evidence]] = {
    "whiteout of a file": (
        (Op("unlink", (b"dir/under",)),),
        lambda upper: is_whiteout(upper / "dir/under"),
    ),
    "whiteout of a directory": (
        (Op("rmdir", (b"empty",)),),
        lambda upper: is_whiteout(upper / "empty"),
    ),
    "whiteout under a new name of the same parent": (
        (Op("rename", (b"large", b"larger", 0)),),
        lambda upper: is_whiteout(upper / "large"),
    ),
    "opaque directory": (
        (
            Op("unlink", (b"dir/sub/leaf",)),
            Op("rmdir", (b"dir/sub",)),
            Op("mkdir", (b"dir/sub", 0o755, 0)),
            Op("open", (b"dir/sub/new", CREATE, 0o600, 0)),
        ),
        lambda upper: has_marker(upper / "dir/sub", "opaque"),
    ),
    "new directory over a removed file": (
        (
            Op("unlink", (b"one",)),
            Op("mkdir", (b"one", 0o711, 0)),
            Op("symlink", (b"../two", b"one/x")),
        ),
        lambda upper: (upper / "one/x").is_symlink(),
    ),
    "renamed merged directory": (
        (Op("rename", (b"dir", b"moved", 0)),),
        lambda upper: has_marker(upper / "moved", "redirect"),
    ),
    "directory renamed into another": (
        (Op("rename", (b"dir/sub", b"empty/deep", 0)),),
        lambda upper: has_marker(upper / "empty/deep", "redirect"),
    ),
    "directory renamed twice with its parent": (
        (
            Op("rename", (b"dir/sub", b"dir/other", 0)),
            Op("rename", (b"dir", b"empty/dir", 0)),
            Op("rename", (b"empty/dir/other", b"back", 0)),
            Op("chmod", (b"back/leaf", 0o400)),
        ),
        lambda upper: has_marker(upper / "back", "redirect"),
    ),
    "directories exchanged": (
        (Op("rename", (b"dir", b"empty", twin.RENAME_EXCHANGE)),),
        lambda upper: has_marker(upper / "empty", "redirect"),
    ),
    "new directory in the place of a renamed one": (
        (
            Op("rename", (b"dir", b"moved", 0)),
            Op("mkdir", (b"dir", 0o700, 0)),
            Op("write", (b"dir/fresh", os.O_CREAT, b"new\n", None)),
        ),
        lambda upper: has_marker(upper / "dir", "opaque"),
    ),
    "owner changed without a copy of the data": (
        (Op("chown", (b"large", 1001, 100)), Op("chmod", (b"large", 0o600))),
        lambda upper: has_marker(upper / "large", "metacopy"),
    ),
    "metadata copy that was renamed": (
        (
            Op("chmod", (b"large", 0o600)),
            Op("rename", (b"large", b"empty/large", 0)),
        ),
        lambda upper: has_marker(upper / "empty/large", "redirect"),
    ),
    "metadata copy below a renamed directory": (
        (
            Op("chmod", (b"dir/under", 0o604)),
            Op("rename", (b"dir", b"moved", 0)),
        ),
        lambda upper: has_marker(upper / "moved/under", "metacopy"),
    ),
    "metadata copy that got its data later": (
        (
            Op("chmod", (b"large", 0o600)),
            Op("write", (b"large", 0, b"head", 0)),
        ),
        lambda upper: (
            (upper / "large").stat().st_blocks > 500 and not has_marker(upper / "large", "metacopy")
        ),
    ),
    "all names of a hard-linked file changed through one": (
        (
            Op("write", (b"one", os.O_APPEND, b"more\n", None)),
            Op("chmod", (b"two", 0o600)),
            Op("utimens", (b"dir/three", (1, 2))),
        ),
        lambda upper: (
            (upper / "one").read_bytes() == b"linked\nmore\n"
            and (upper / "one").stat().st_nlink > 1
        ),
    ),
    "new link to a lower file": (
        (Op("link", (b"dir/under", b"alias")), Op("unlink", (b"dir/under",))),
        lambda upper: (upper / "alias").exists() and is_whiteout(upper / "dir/under"),
    ),
    "extended attributes that look like markers": (
        (
            Op("setxattr", (b"dir", "trusted.overlay.opaque", b"y", 0)),
            Op("setxattr", (b"large", "trusted.overlay.metacopy", b"", 0)),
            Op("setxattr", (b"dir/over", "trusted.overlayX", b"v", 0)),
        ),
        lambda upper: has_marker(upper / "dir", "overlay.opaque"),
    ),
    "special files and symlinks changed in place": (
        (
            Op("chmod", (b"pipe", 0o600)),
            Op("chown", (b"null", 1000, 1000)),
            Op("chown", (b"pointer", 1000, 1000, False)),
        ),
        lambda upper: (
            stat.S_ISFIFO((upper / "pipe").lstat().st_mode) and (upper / "pointer").is_symlink()
        ),
    ),
    "truncated and rewritten shorter": (
        (
            Op("write", (b"large", os.O_TRUNC, b"short\n", None)),
            Op("truncate", (b"dir/over", 3)),
        ),
        lambda upper: (upper / "large").read_bytes() == b"short\n",
    ),
}


@pytest.fixture
def cast() -> Iterator[Cast]:
    with Cast() as actors:
        yield actors


@pytest.fixture
def sides(scratch: Path) -> Iterator[Callable[[Side], Side]]:
    """Registers a side, so that it is unmounted whatever happens."""
    scratch.chmod(0o755)
    registered: list[Side] = []

    def register(side: Side) -> Side:
        registered.append(side)
        return side

    yield register
    twin.let_go(*registered)


def written(side: Side, cast: Cast, case: str) -> Dump:
    """Make the calls of a case, see that they left their marker, return the tree."""
    script, evidence = CASES[case]
    side.mount()
    for op in script:
        outcome = cast.call(side, op)
        assert outcome.error is None, f"{op!r}: {outcome!r}"
    dump = cast.dump(side)
    side.unmount()
    assert evidence(side.upper), f"{side.name} did not write what the case is about"
    return dump


def read_back(side: Side, cast: Cast) -> Dump:
    side.mount()
    dump = cast.dump(side)
    side.unmount()
    return dump


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("writer", "reader"),
    [(MicaSide, KernelSide), (KernelSide, MicaSide)],
    ids=["mica-to-overlayfs", "overlayfs-to-mica"],
)
def test_upper_shows_the_same_tree(
    scratch: Path,
    cast: Cast,
    sides: Callable[[Side], Side],
    writer: type[Side],
    reader: type[Side],
    case: str,
) -> None:
    side = sides(writer(scratch / "stack", twin.EXAMPLE_LAYERS))
    own = written(side, cast, case)
    work = bytes(side.work) if writer is MicaSide else None
    faults = check_upper(bytes(side.upper), [bytes(lower) for lower in side.lowers], work)
    assert [str(fault) for fault in faults] == []
    foreign = read_back(sides(twin.swapped(side, reader)), cast)
    assert diff_dumps(*twin.exchangeable(own, foreign, side.upper)) == []


@pytest.mark.parametrize("case", CASES)
def test_both_write_the_same_tree(
    scratch: Path, cast: Cast, sides: Callable[[Side], Side], case: str
) -> None:
    kernel = written(sides(KernelSide(scratch / "kernel", twin.EXAMPLE_LAYERS)), cast, case)
    mica = written(sides(MicaSide(scratch / "mica", twin.EXAMPLE_LAYERS)), cast, case)
    assert diff_dumps(twin.settled(kernel), twin.settled(mica)) == []


def test_upper_can_go_there_and_back(
    scratch: Path, cast: Cast, sides: Callable[[Side], Side]
) -> None:
    side = sides(MicaSide(scratch / "stack", twin.EXAMPLE_LAYERS))
    written(side, cast, "directory renamed twice with its parent")
    abroad = sides(twin.swapped(side, KernelSide))
    abroad.mount()
    for op in (
        Op("rename", (b"empty/dir", b"home", 0)),
        Op("unlink", (b"home/over",)),
        Op("chmod", (b"back/leaf", 0o444)),
    ):
        assert cast.call(abroad, op).error is None
    expected = cast.dump(abroad)
    abroad.unmount()
    home = read_back(sides(twin.swapped(abroad, MicaSide)), cast)
    assert diff_dumps(*twin.exchangeable(expected, home, side.upper)) == []


def test_attribute_of_a_user_that_looks_like_a_marker_hides_nothing(
    scratch: Path, cast: Cast, sides: Callable[[Side], Side]
) -> None:
    side = sides(MicaSide(scratch / "stack", twin.EXAMPLE_LAYERS))
    side.mount()
    before = cast.dump(side)
    assert cast.call(side, Op("setxattr", (b"dir", "user.overlay.opaque", b"y", 0))).error is None
    side.unmount()
    after = read_back(side, cast)
    assert after[b"dir"].xattrs == (("user.overlay.opaque", b"y"),)
    assert after.keys() == before.keys()
