"""ACLs in their extended-attribute form: exactly the named ids are translated."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfs import acl

# linux/posix_acl_xattr.h, linux/posix_acl.h
VERSION = struct.pack("<I", 2)
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF

Entry = tuple[int, int, int]

ids = st.integers(0, NO_ID - 1)
entries = st.tuples(
    st.sampled_from([USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER]), st.integers(0, 7), ids
)


def packed(*of: Entry) -> bytes:
    return VERSION + b"".join(struct.pack("<HHI", *entry) for entry in of)


def unpacked(value: bytes) -> list[Entry]:
    return list(struct.iter_unpack("<HHI", value[4:]))


def shifted(number: int, is_group: bool) -> int:
    return (number + (2000 if is_group else 1000)) % NO_ID


def shifted_back(number: int, is_group: bool) -> int:
    return (number - (2000 if is_group else 1000)) % NO_ID


def test_named_user_is_translated_as_a_user():
    assert acl.translate(packed((USER, 7, 5)), shifted) == packed((USER, 7, 1005))


def test_named_group_is_translated_as_a_group():
    assert acl.translate(packed((GROUP, 5, 5)), shifted) == packed((GROUP, 5, 2005))


@pytest.mark.parametrize("tag", [USER_OBJ, GROUP_OBJ, MASK, OTHER])
def test_entry_without_an_id_stays_as_it_is(tag: int):
    value = packed((tag, 7, NO_ID))
    assert acl.translate(value, shifted) == value


@given(st.lists(entries, max_size=8))
def test_tags_permissions_and_order_stay(of: list[Entry]):
    translated = unpacked(acl.translate(packed(*of), shifted))
    assert [entry[:2] for entry in translated] == [entry[:2] for entry in of]


@given(st.lists(entries, max_size=8))
def test_translating_there_and_back_gives_the_same(of: list[Entry]):
    value = packed(*of)
    assert acl.translate(acl.translate(value, shifted), shifted_back) == value


@given(st.binary(max_size=64))
def test_without_a_mapping_the_value_stays_as_it_is(value: bytes):
    assert acl.translate(value, None) == value


@given(st.binary(max_size=64).filter(lambda value: (len(value) - 4) % 8 != 0))
def test_value_that_is_no_list_of_entries_stays_for_the_kernel_to_refuse(value: bytes):
    assert acl.translate(value, shifted) == value


def test_empty_list_keeps_its_version():
    assert acl.translate(VERSION, shifted) == VERSION


@pytest.mark.parametrize("name", [b"system.posix_acl_access", b"system.posix_acl_default"])
def test_acl_attributes_are_known(name: bytes):
    assert acl.is_acl(name)


@pytest.mark.parametrize("name", [b"system.posix_acl", b"user.posix_acl_access", b""])
def test_other_attributes_are_no_acls(name: bytes):
    assert not acl.is_acl(name)


@pytest.mark.skipif(
    shutil.which("setfacl") is None, reason="needs setfacl and getfacl (package acl)"
)
def test_getfacl_reads_the_translated_ids(scratch: Path):
    file = scratch / "file"
    file.touch()
    subprocess.run(["setfacl", "-m", "u:5:rwx,g:6:r-x,m::rwx", file], check=True)
    name = acl.ACCESS.decode()
    os.setxattr(file, name, acl.translate(os.getxattr(file, name), shifted))
    said = subprocess.run(
        ["getfacl", "--omit-header", "--numeric", file], check=True, capture_output=True, text=True
    )
    assert said.stdout.split() == [
        "user::rw-",
        "user:1005:rwx",
        "group::r--",
        "group:2006:r-x",
        "mask::rwx",
        "other::r--",
    ]
