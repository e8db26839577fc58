"""Owners on disk and owners as the mount's users see them (uidmapping, gidmapping, squash_to_*)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from unionfs.errors import UnionError
from unionfs.tree import Caller

if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfs.options import IdMapping, MountOptions


class Owners:
    """Translates ids both ways; squashing is of what is shown only."""

    def __init__(self, options: MountOptions) -> None:
        """Take the mappings from the mount's options."""
        root = 0 if options.squash_to_root else None
        self._uids: IdMapping | None = options.uid_mapping
        self._gids: IdMapping | None = options.gid_mapping
        self._squash_uid = root if options.squash_to_uid is None else options.squash_to_uid
        self._squash_gid = root if options.squash_to_gid is None else options.squash_to_gid
        mapped = self._uids is not None or self._gids is not None
        self.plain = not mapped and self._squash_uid is None and self._squash_gid is None
        self._callers: dict[tuple[int, int, int], Caller] = {}
        self.shown_acl_id: Callable[[int, bool], int] | None = self._shown_id if mapped else None
        self.disk_acl_id: Callable[[int, bool], int] | None = self._disk_id if mapped else None

    def shown_uid(self, uid: int) -> int:
        """The owner that users see."""
        if self._squash_uid is not None:
            return self._squash_uid
        return uid if self._uids is None else self._uids.from_disk(uid)

    def shown_gid(self, gid: int) -> int:
        """The group that users see."""
        if self._squash_gid is not None:
            return self._squash_gid
        return gid if self._gids is None else self._gids.from_disk(gid)

    def disk_uid(self, uid: int) -> int:
        """The owner to store.

        Raises:
            UnionError: EINVAL: the mapping has no place for it.
        """
        return uid if self._uids is None else _stored(self._uids, uid)

    def disk_gid(self, gid: int) -> int:
        """The group to store; raises as `disk_uid`."""
        return gid if self._gids is None else _stored(self._gids, gid)

    def caller(self, uid: int, gid: int, umask: int) -> Caller:
        """On whose behalf new objects are made."""
        key = uid, gid, umask
        known = self._callers.get(key)
        if known is None:
            known = self._callers[key] = Caller(self.disk_uid(uid), self.disk_gid(gid), umask)
        return known

    def _shown_id(self, number: int, is_group: bool) -> int:  # noqa: FBT001 - a callback's signature
        return self.shown_gid(number) if is_group else self.shown_uid(number)

    def _disk_id(self, number: int, is_group: bool) -> int:  # noqa: FBT001 - a callback's signature
        return self.disk_gid(number) if is_group else self.disk_uid(number)


def _stored(mapping: IdMapping, number: int) -> int:
    stored = mapping.to_disk(number)
    if stored is None:
        raise UnionError(errno.EINVAL, f"id {number} is outside the mount's mapping")
    return stored
