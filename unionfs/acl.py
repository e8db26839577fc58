"""POSIX ACLs in their extended-attribute form: the ids in them, translated.

Source: linux/posix_acl_xattr.h: a 4-byte version (2), then entries of tag, permissions and id, little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

_HEADER_BYTES = 4
_ENTRY = struct.Struct("<HHI")
_ACL_USER = 0x02
_ACL_GROUP = 0x08


def is_acl(name: bytes) -> bool:
    """Whether an attribute is an ACL."""
    return name in {ACCESS, DEFAULT}


def translate(value: bytes, translated: Callable[[int, bool], int] | None) -> bytes:
    """Translate the ids of all user and group entries.

    Args:
        translated: From (id, is a group) to the other side's id; None leaves everything as it is.
    """
    if translated is None or (len(value) - _HEADER_BYTES) % _ENTRY.size:
        return value
    parts = [value[:_HEADER_BYTES]]
    for tag, permissions, number in _ENTRY.iter_unpack(value[_HEADER_BYTES:]):
        if tag in {_ACL_USER, _ACL_GROUP}:
            parts.append(_ENTRY.pack(tag, permissions, translated(number, tag == _ACL_GROUP)))
        else:
            parts.append(_ENTRY.pack(tag, permissions, number))
    return b"".join(parts)
