"""A read-only FUSE file system with one large file whose data comes when told: a layer on a slow disk.

    with gated(mountpoint, size_bytes) as gate:
        ...                     mountpoint/large can be looked at and opened; reading it waits
        gate.wait_for_reader()  until somebody reads
        gate.open()             all reads are answered, with BYTE
        gate.fail()             or: all reads fail with EIO

It runs as a process of its own, `python gatefs.py MOUNTPOINT SIZE`: "ready" and "read" come on its
standard output; a byte on its standard input opens the gate, its end fails the reads.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

FILE_INO = 2
NAME = b"large"
BYTE = b"x"
WAIT_TIMEOUT_S = 30.0


class Gate:
    """The other end of a running gated file system."""

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self._server = server

    def expect(self, word: bytes) -> None:
        """Wait for a line of the server."""
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], WAIT_TIMEOUT_S)
        assert ready, f"no {word!r} from the gated file system"
        assert self._server.stdout.readline() == word + b"\n"

    def wait_for_reader(self) -> None:
        self.expect(b"read")

    def open(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(b"!")

    def fail(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()


@contextmanager
def gated(mountpoint: Path, size_bytes: int) -> Iterator[Gate]:
    """Mount the file system for as long as the block runs."""
    command = [sys.executable, __file__, mountpoint, str(size_bytes)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    gate = Gate(server)
    try:
        gate.expect(b"ready")
        yield gate
    finally:
        gate.fail()
        subprocess.run(["umount", "--lazy", mountpoint], check=False, capture_output=True)
        # It may live on as somebody's layer, so it would not end by itself.
        server.kill()
        server.wait(WAIT_TIMEOUT_S)
        assert server.stdout is not None
        server.stdout.close()


class GatedOperations(pyfuse3.Operations):
    """One directory, one file."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes = size_bytes
        self.decided = trio.Event()
        self.is_open = False
        self.was_read = False

    def _attributes(self, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644
        entry.st_nlink = 2 if is_root else 1
        entry.st_size = 0 if is_root else self.size_bytes
        entry.st_blocks = 0 if is_root else self.size_bytes // 512
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name != NAME:
            raise FUSEError(errno.ENOENT)
        return self._attributes(FILE_INO)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(inode)

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = reply.f_frsize = 4096
        reply.f_namemax = 255
        return reply

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, NAME, self._attributes(FILE_INO), 1)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if not self.was_read:
            self.was_read = True
            os.write(1, b"read\n")
        await self.decided.wait()
        if not self.is_open:
            raise FUSEError(errno.EIO)
        return BYTE * min(size, self.size_bytes - off)


async def serve(mountpoint: str, size_bytes: int) -> None:
    operations = GatedOperations(size_bytes)
    pyfuse3.init(operations, mountpoint, {"fsname=gate", "ro", "allow_other"})

    async def wait_for_word() -> None:
        await trio.lowlevel.wait_readable(0)
        operations.is_open = bool(os.read(0, 1))
        operations.decided.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_word)
        os.write(1, b"ready\n")
        await pyfuse3.main()
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    trio.run(serve, sys.argv[1], int(sys.argv[2]))
