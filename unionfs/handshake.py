"""What pyfuse3 cannot ask of the kernel, added to the answer that opens the conversation.

libfuse answers FUSE_INIT as soon as `Operations.init` has returned, by one write to the device.  Until that step of
trio's loop is over, a pipe stands in the device's place; then the answer is completed and goes where it belongs.  The
kernel sends nothing else before it has it.

Source: linux/fuse.h (struct fuse_out_header, struct fuse_init_out).
"""

from __future__ import annotations

import contextlib
import os
import struct

import trio

DONT_MASK = 1 << 6  # FUSE_DONT_MASK: the umask is ours to apply, since a default ACL goes before it
PARALLEL_DIROPS = (
    1 << 18
)  # FUSE_PARALLEL_DIROPS: look-ups in one directory need not wait for each other
CACHE_SYMLINKS = 1 << 23  # FUSE_CACHE_SYMLINKS: targets never change while their inode lives
_ANSWER = struct.Struct("=IiQIIIIHHI")  # the header, then fuse_init_out up to max_write
_FLAGS, _MAX_WRITE = 6, 9
_ANSWER_MAX_BYTES = 4096


class Handshake(trio.abc.Instrument):
    """Completes the answer that is about to be written."""

    def __init__(self, device_fd: int, *, max_write_bytes: int | None) -> None:
        """Take the place of `device_fd` until the current step is over; call it in `Operations.init`."""
        self._number = device_fd
        self._max_write_bytes = max_write_bytes
        self._device = os.dup(device_fd)
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.dup2(writer, device_fd, inheritable=False)
        os.close(writer)
        trio.lowlevel.add_instrument(self)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """The step that answered is over: put the device back and send the answer."""
        del task
        trio.lowlevel.remove_instrument(self)
        os.dup2(self._device, self._number, inheritable=False)
        with contextlib.suppress(BlockingIOError):
            answer = os.read(self._reader, _ANSWER_MAX_BYTES)
            os.write(self._device, complete(answer, self._max_write_bytes))
        os.close(self._device)
        os.close(self._reader)


def complete(answer: bytes, max_write_bytes: int | None) -> bytes:
    """The answer to FUSE_INIT with the missing flags set and write requests of at most `max_write_bytes`."""
    if len(answer) < _ANSWER.size:
        return answer  # an error
    fields = list(_ANSWER.unpack_from(answer))
    fields[_FLAGS] |= DONT_MASK | PARALLEL_DIROPS | CACHE_SYMLINKS
    if max_write_bytes is not None:
        fields[_MAX_WRITE] = min(fields[_MAX_WRITE], max_write_bytes)
    return _ANSWER.pack(*fields) + answer[_ANSWER.size :]


def device_fd() -> int:
    """The descriptor of the FUSE device that libfuse opened last; -1 when there is none."""
    found = -1
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found = max(found, int(name))
    return found
