"""The answer to FUSE_INIT, completed."""

import struct

import pytest

from unionfs.handshake import CACHE_SYMLINKS, DONT_MASK, PARALLEL_DIROPS, complete

HEADER, INIT_OUT = struct.Struct("=IiQ"), struct.Struct("=IIIIHHI")


def answer(*, flags: int, max_write: int) -> bytes:
    rest = bytes(range(40))
    size = HEADER.size + INIT_OUT.size + len(rest)
    fields = INIT_OUT.pack(7, 31, 1 << 17, flags, 12, 9, max_write)
    return HEADER.pack(size, 0, 2) + fields + rest


@pytest.mark.parametrize(("asked", "seen"), [(None, 1 << 20), (4096, 4096), (1 << 30, 1 << 20)])
def test_flag_and_limit_are_set_and_the_rest_stays(asked, seen):
    given = answer(flags=0x4000_0000, max_write=1 << 20)
    assert complete(given, asked) == answer(
        flags=0x4000_0000 | DONT_MASK | PARALLEL_DIROPS | CACHE_SYMLINKS, max_write=seen
    )


def test_an_error_is_passed_on():
    refused = HEADER.pack(16, -71, 2)
    assert complete(refused, 4096) == refused
