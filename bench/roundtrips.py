"""Counts the requests that the kernel sends to one FUSE server, by the kernel's own tracepoint.

The event fuse:fuse_request_send (kernel >= 6.11) is recorded in a tracing instance of our own, for one
connection only, and read after the work is done. It costs a fraction of a microsecond per request.
FORGET has no answer and is not among the events. Where tracefs or the event is missing nothing is
counted and the table shows a dash.
"""

import os
import re
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.child import BenchError, run

EVENT = "events/fuse/fuse_request_send"
BUFFER_KIB_PER_CPU = 65536
OPCODE = re.compile(rb"\(FUSE_([A-Z_0-9]+)\)")


class RequestCounter:
    """A tracing instance, from __enter__ to __exit__; inactive where the kernel offers none."""

    def __init__(self, scratch: Path) -> None:
        self._mountpoint = scratch / "tracefs"
        self._instance: Path | None = None

    def __enter__(self) -> Self:
        """Mount tracefs below the scratch folder and make an instance in it."""
        self._mountpoint.mkdir()
        try:
            run(["mount", "-t", "tracefs", "mica-bench", os.fspath(self._mountpoint)])
        except BenchError:
            return self
        if not (self._mountpoint / EVENT).is_dir():
            return self
        instance = self._mountpoint / "instances" / f"mica-bench-{os.getpid()}"
        instance.mkdir()
        self._instance = instance
        (instance / "buffer_size_kb").write_text(str(BUFFER_KIB_PER_CPU))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the instance and unmount."""
        if self._instance is not None:
            self._instance.rmdir()
        if self._mountpoint.is_mount():
            run(["umount", os.fspath(self._mountpoint)])
        self._mountpoint.rmdir()

    def start(self, mountpoint: Path) -> None:
        """Begin to count what is sent to the server of this mount."""
        if self._instance is None:
            return
        filter_text = f"connection == {connection_number(mountpoint)}"
        (self._instance / EVENT / "filter").write_text(filter_text)
        (self._instance / "trace").write_text("")
        (self._instance / EVENT / "enable").write_text("1")

    def stop(self) -> dict[str, int] | None:
        """End counting; requests by name, most frequent first, or None if nothing was counted."""
        if self._instance is None:
            return None
        (self._instance / EVENT / "enable").write_text("0")
        with (self._instance / "trace").open("rb") as trace:
            counts = Counter(name.group(1).decode() for name in map(OPCODE.search, trace) if name)
        (self._instance / "trace").write_text("")
        return dict(counts.most_common())


def connection_number(mountpoint: Path) -> int:
    """The device minor of a mount, which names its FUSE connection; asks the server nothing."""
    wanted = os.fspath(mountpoint)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == wanted:
            return int(fields[2].partition(":")[2])
    msg = f"{mountpoint} is not mounted"
    raise BenchError(msg)
