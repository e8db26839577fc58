"""`mica-fuse`: the mount program, argv-compatible with fuse-overlayfs.

The parent waits until the server says that it serves, then returns 0; on any error it prints one line and returns
non-zero with nothing mounted.  The server holds none of its caller's descriptors.  Nothing heavy is imported
before it is needed: `mica-fuse --version` is answered at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfs.options import Check, MountOptions, Remount

EXIT_FAILURE = 1
EXIT_USAGE = 2
READY = b"ready"
READY_FD_VARIABLE = "MICA_READY_FD"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["--version"], ["-V"]):
        return _version()
    from unionfs import options

    try:
        command = options.parse([os.fsencode(argument) for argument in arguments])
    except options.UsageError as error:
        _complain(str(error))
        return EXIT_USAGE
    match command:
        case options.Mount():
            return _mount(command.options)
        case options.Check():
            return _check(command)
        case options.Remount():
            return _remount(command)
        case options.Version():
            return _version()
        case options.Help():
            sys.stdout.write(options.USAGE)
            return 0


def _version() -> int:
    from unionfs import __version__

    sys.stdout.write(f"mica-fuse: version {__version__}\n")
    return 0


def _complain(message: str) -> None:
    sys.stderr.write(f"mica-fuse: {message}\n")


def _check(command: Check) -> int:
    from unionfs.check import check_upper

    try:
        faults = check_upper(command.upper, command.lowers, command.work)
    except OSError as error:
        _complain(f"cannot check {os.fsdecode(command.upper)}: {error.strerror}")
        return EXIT_USAGE
    for fault in faults:
        sys.stdout.write(f"{fault}\n")
    return EXIT_FAILURE if faults else 0


def _remount(command: Remount) -> int:
    """`mount -o remount,...` on a mount of ours: mount(8) does it without a helper."""
    words = ["mount", "-i", "-o", ",".join(command.flags), "--", os.fsdecode(command.mountpoint)]
    try:
        os.execvp("mount", words)
    except OSError as error:
        _complain(f"cannot run mount: {error.strerror}")
        return EXIT_FAILURE


def _mount(options: MountOptions) -> int:
    for word in options.ignored:
        sys.stderr.write(f"unknown argument ignored: {word}\n")
    if options.foreground:
        return _foreground(options)
    return _daemonize(options)


def _foreground(options: MountOptions) -> int:
    ready_fd = int(os.environ.pop(READY_FD_VARIABLE, "-1"))

    def on_ready() -> None:
        if ready_fd >= 0:
            os.write(ready_fd, READY)
            os.close(ready_fd)

    message = _serve(options, on_ready)
    if message is not None:
        _complain(message)
        return EXIT_FAILURE
    return 0


def _daemonize(options: MountOptions) -> int:
    sys.stderr.flush()
    sys.stdout.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(_daemon(options, writer))
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    if answer == READY:
        return 0
    if not answer:
        _, status = os.waitpid(pid, 0)
        answer = b"the server died before it served (%d)" % os.waitstatus_to_exitcode(status)
    _complain(os.fsdecode(answer))
    return EXIT_FAILURE


def _daemon(options: MountOptions, writer: int) -> int:
    """The server's side: a new session, no descriptor but the pipe, which says how it went."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    pipe = os.dup2(writer, 3, inheritable=False)
    os.closerange(4, _highest_fd() + 1)

    def on_ready() -> None:
        os.write(pipe, READY)
        os.close(pipe)

    message = _serve(options, on_ready)
    if message is None:
        return 0
    os.write(pipe, os.fsencode(message))
    return EXIT_FAILURE


def _highest_fd() -> int:
    return max((int(fd) for fd in os.listdir("/proc/self/fd")), default=3)


def _serve(options: MountOptions, on_ready: Callable[[], None]) -> str | None:
    """Serve until unmounted; returns what is wrong with the set-up, or None."""
    import logging

    from unionfs.errors import SetupError
    from unionfs.session import serve

    _log_to(options)
    try:
        serve(options, on_ready=on_ready)
    except SetupError as error:
        return str(error)
    except Exception as error:
        logging.getLogger("unionfs").exception("the server failed")
        return f"the server failed: {error!r}; run it with -f to see the log"
    return None


def _log_to(options: MountOptions) -> None:
    """Log to stderr in the foreground, to syslog in the background."""
    import logging
    import logging.handlers

    handler: logging.Handler
    if options.foreground:
        handler = logging.StreamHandler()
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log", facility="daemon")
    else:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("mica-fuse[%(process)d]: %(levelname)s %(message)s"))
    logger = logging.getLogger()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if options.debug else logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
