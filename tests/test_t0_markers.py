"""The spellings of markers: what users write never reads as one, and what is one is never shown."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unionfs import markers
from unionfs.markers import TRUSTED_PREFIX, USER_PREFIX, Dialect

FUSE_PREFIX = b"user.fuseoverlayfs."
PREFIXES = (TRUSTED_PREFIX, USER_PREFIX, FUSE_PREFIX)
WORDS = (b"overlay.", b"fuseoverlayfs.", b"opaque", b"redirect", b"mica.origin", b"overlay", b"")
ATTRIBUTES = ("opaque", "whiteout", "redirect", "metacopy", "origin", "impure", "nlink", "upper")

attribute_starts = st.sampled_from(
    [*PREFIXES, b"user.", b"trusted.", b"security.", b"user.overlay", b"user.overlayfs."]
)
tails = st.lists(
    st.one_of(
        st.sampled_from(WORDS), st.binary(max_size=6).map(lambda raw: raw.replace(b"\0", b"x"))
    ),
    max_size=5,
).map(b"".join)
attribute_names = st.tuples(attribute_starts, tails).map(b"".join)


# --- attributes of users -----------------------------------------------------------------------------------------


@given(attribute_names)
@example(b"user.overlay.opaque")
@example(b"trusted.overlay.overlay.opaque")
@example(b"user.fuseoverlayfs.opaque")
@example(b"user.overlay.fuseoverlayfs.opaque")
@example(b"user.fuseoverlayfs.overlay.opaque")
def test_user_attribute_comes_back_under_its_name(name: bytes):
    assert markers.from_disk_xattr(markers.to_disk_xattr(name)) == name


@given(attribute_names)
@example(b"user.fuseoverlayfs.opaque")
def test_user_attribute_never_reads_as_a_marker(name: bytes):
    assert not markers.is_private_xattr(markers.to_disk_xattr(name))


@given(attribute_names, attribute_names)
@example(b"user.overlay.fuseoverlayfs.x", b"user.fuseoverlayfs.x")
def test_two_user_attributes_are_kept_under_two_names(one: bytes, other: bytes):
    if one != other:
        assert markers.to_disk_xattr(one) != markers.to_disk_xattr(other)


@given(attribute_names)
def test_attribute_is_shown_exactly_when_it_is_no_marker(name: bytes):
    assert (markers.from_disk_xattr(name) is None) == markers.is_private_xattr(name)


@given(attribute_names)
def test_shown_attribute_is_reached_under_the_name_that_is_shown(name: bytes):
    shown = markers.from_disk_xattr(name)
    if shown is not None:
        assert markers.to_disk_xattr(shown) == name


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("prefix", [TRUSTED_PREFIX, USER_PREFIX])
def test_markers_of_overlayfs_are_private(prefix: bytes, attribute: str):
    assert markers.is_private_xattr(prefix + attribute.encode())


@pytest.mark.parametrize("attribute", [b"opaque", b"origin", b"override_stat"])
def test_markers_of_fuse_overlayfs_are_private(attribute: bytes):
    assert markers.is_private_xattr(FUSE_PREFIX + attribute)


@pytest.mark.parametrize("prefix", [TRUSTED_PREFIX, USER_PREFIX])
def test_own_marker_is_private_in_every_dialect(prefix: bytes):
    assert markers.is_private_xattr(Dialect(prefix).name("mica.origin").encode())


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        # overlayfs.rst, "Nesting overlayfs mounts": the prefix of a nested overlay's attribute is doubled
        (b"trusted.overlay.opaque", b"trusted.overlay.overlay.opaque"),
        (b"trusted.overlay.overlay.opaque", b"trusted.overlay.overlay.overlay.opaque"),
        (b"user.overlay.opaque", b"user.overlay.overlay.opaque"),
        (b"user.fuseoverlayfs.opaque", b"user.fuseoverlayfs.overlay.opaque"),
        (b"user.overlayfs", b"user.overlayfs"),
        (b"user.overlay", b"user.overlay"),
        (b"user.mime_type", b"user.mime_type"),
        (b"security.capability", b"security.capability"),
        (b"system.posix_acl_access", b"system.posix_acl_access"),
    ],
)
def test_name_on_disk(name: bytes, on_disk: bytes):
    assert markers.to_disk_xattr(name) == on_disk


# --- names of files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b".wh.a", b".wh.", b".wh..wh..opq", b".wh..wh.plnk"])
def test_aufs_names_are_markers(name: bytes):
    assert markers.is_marker_name(name)


@pytest.mark.parametrize("name", [b"a", b".wh", b".whale", b"a.wh.b", b"wh.a", b".WH.a"])
def test_other_names_are_no_markers(name: bytes):
    assert not markers.is_marker_name(name)


# --- redirects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        (b"name", (False, [b"name"])),
        (b"/name", (True, [b"name"])),
        (b"/a/b/c", (True, [b"a", b"b", b"c"])),
        (b"..name", (False, [b"..name"])),
        (b"/a/...", (True, [b"a", b"..."])),
        (b"\xff\n", (False, [b"\xff\n"])),
    ],
)
def test_redirect_is_a_name_or_an_absolute_path(
    value: bytes, parsed: tuple[bool, list[bytes]] | None
):
    assert markers.parse_redirect(value) == parsed


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"/",
        b"//",
        b"//a",
        b"/a//b",
        b"/a/",
        b"a/b",
        b"a/",
        b".",
        b"..",
        b"/..",
        b"/a/../b",
        b"/a/./b",
        b"../a",
        b"a\0",
        b"/a\0/b",
        b"/" + b"a" * 4096,
    ],
)
def test_redirect_that_is_no_path_inside_the_layer_is_refused(value: bytes):
    assert markers.parse_redirect(value) is None


@given(st.binary(max_size=40))
@example(b"/a/../../etc")
def test_parsed_redirect_never_leads_up_or_stays(value: bytes):
    parsed = markers.parse_redirect(value)
    if parsed is not None:
        absolute, parts = parsed
        assert parts
        assert not {b"", b".", b".."} & set(parts)
        assert b"/".join(([b""] if absolute else []) + parts) == value


# --- origin and nlink --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1))
def test_origin_comes_back(ino: int):
    assert markers.unpack_origin(markers.pack_origin(ino)) == ino


def test_no_origin_is_none():
    assert markers.unpack_origin(None) is None


@given(st.binary(max_size=40).filter(lambda value: len(value) != len(markers.pack_origin(1))))
def test_origin_of_another_length_is_not_read(value: bytes):
    assert markers.unpack_origin(value) is None


def test_origin_of_another_version_is_not_read():
    value = bytearray(markers.pack_origin(7))
    value[8] += 1
    assert markers.unpack_origin(bytes(value)) is None


@given(st.integers(0, 2**31 - 1))
def test_standing_names_come_back(standing: int):
    assert markers.unpack_nlink(markers.pack_nlink(standing)) == standing


@pytest.mark.parametrize(
    ("standing", "value"), [(0, b"U-1"), (1, b"U+0"), (2, b"U+1"), (11, b"U+10")]
)
def test_nlink_is_spelt_as_overlayfs_spells_it(standing: int, value: bytes):
    assert markers.pack_nlink(standing) == value


@pytest.mark.parametrize("value", [None, b"", b"U", b"L+1", b"Ux", b"U+", b"U-5", b"\xff"])
def test_nlink_that_says_nothing_counts_no_name(value: bytes | None):
    assert markers.unpack_nlink(value) == 0
