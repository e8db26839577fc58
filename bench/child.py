"""Child processes: run a command, or time a piece of work in a fork of this process.

Every piece that is timed runs in a child of its own, so that nothing of it (descriptors, threads, a
working directory inside the mount) outlives the measurement. The clock runs inside the child: neither
the fork nor the exit is part of the time. The parent must have no threads.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TIME_LIMIT_S = 300


class BenchError(Exception):
    """A peer could not be mounted, or a workload failed on it; the message says why."""


def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    stdout: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command to its end, with nothing on its standard input.

    What it says on stderr goes to a file and not to a pipe: a mount program leaves a server behind
    that would hold a pipe open for as long as it serves.

    Args:
        argv: The command, looked up in PATH.
        cwd: Its working directory.
        stdout: A file for its output, /dev/null without one.
        env: Variables added to its environment.

    Raises:
        BenchError: It ended with anything but 0, or could not be started.
    """
    with tempfile.TemporaryFile() as stderr_file:
        pid = os.fork()
        if pid == 0:
            _become(argv, cwd, stdout, env or {}, stderr_file.fileno())
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            stderr_file.seek(0)
            said = stderr_file.read().decode(errors="replace").strip()
            msg = f"{argv[0]} ended with {code}: {said[-500:]}"
            raise BenchError(msg)


def _become(
    argv: Sequence[str],
    cwd: Path | None,
    stdout: Path | None,
    env: Mapping[str, str],
    stderr_fd: int,
) -> None:
    """Turn a fresh child into the command; never returns."""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        target = os.devnull if stdout is None else os.fspath(stdout)
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        os.dup2(stderr_fd, 2)
        if cwd is not None:
            os.chdir(cwd)
        os.execvpe(argv[0], list(argv), {**os.environ, **env})
    except OSError as e:
        os.write(2, f"{argv[0]}: {e}".encode())
    finally:
        os._exit(127)


def measure(piece: Callable[[], float | None]) -> float | None:
    """Run a piece in a child and hand over the number it returns.

    Args:
        piece: Does the work and returns what it measured; None where there is nothing to measure.

    Raises:
        BenchError: The piece raised, was killed, or took longer than TIME_LIMIT_S.
    """
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        _work(piece, write_fd)
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:  # noqa: PTH123 - a descriptor, not a path
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        why = answer.decode(errors="replace") or f"the child ended with {code}"
        raise BenchError(why)
    value = json.loads(answer)
    return None if value is None else float(value)


def _work(piece: Callable[[], float | None], write_fd: int) -> None:
    """Do the piece in the child and report its number, or its error; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TIME_LIMIT_S)
        value = piece()
        os.write(write_fd, json.dumps(value).encode())
        code = 0
    except Exception as e:  # noqa: BLE001 - whatever went wrong is the parent's to tell
        os.write(write_fd, f"{type(e).__name__}: {e}".encode())
    finally:
        os._exit(code)
