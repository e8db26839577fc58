"""What the suites share: where they are, a mount to work in, and mica under the name they call.

Nothing of a suite is kept here. SUITES_DIR names the folder that holds them; without it, or without
the suite in question, its tests are skipped.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import unionfs
from unionfs.check import check_upper
from unionfs.client import mount

OPTIONS = ("allow_other", "default_permissions", "suid", "dev")
LOWER_FILE_BYTES = 256 * 1024


@pytest.fixture(scope="session")
def suites() -> Path:
    named = os.environ.get("SUITES_DIR")
    if not named:
        pytest.skip("SUITES_DIR is not set: it names the folder that holds the suites")
    if os.geteuid() != 0:
        pytest.skip("the suites need root")
    return Path(named).resolve()


@pytest.fixture(scope="session")
def suite_path(suites: Path) -> Callable[[str], Path]:
    """Return the function that finds a file of a suite, or skips the test."""

    def find(name: str) -> Path:
        path = suites / name
        if not path.exists():
            pytest.skip(f"SUITES_DIR holds no {name}")
        return path

    return find


@pytest.fixture(scope="module")
def merged(suites: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory inside a mount, one below its root, with files from the lower beside it.

    After the last test of the module the mount must end in order and leave a clean upper.
    """
    base = tmp_path_factory.mktemp("union")
    lower, upper, work, mountpoint = (base / name for name in ("lower", "upper", "work", "merged"))
    for directory in (lower, upper, work, mountpoint):
        directory.mkdir()
    # Suites work as several users: the way down to the mount is open to all of them.
    for directory in (base, base.parent, lower, upper):
        directory.chmod(0o755)
    place = lower / "t"
    place.mkdir()
    place.chmod(0o777)
    for number in range(8):
        (place / f"lower{number}").write_bytes(os.urandom(LOWER_FILE_BYTES))
    mounted = mount(mountpoint, lower=[lower], upper=upper, work=work, options=OPTIONS)
    try:
        yield mountpoint / "t"
    finally:
        mounted.unmount()
    assert check_upper(bytes(upper), [bytes(lower)], bytes(work)) == []
    assert list(work.glob("work/*")) == []
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def mica_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the function that makes a folder in which mica-fuse has another name."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("bin")
        project = Path(unionfs.__file__ or "").parent.parent
        program = folder / name
        # mount(8) hands on neither PATH nor a working directory.
        program.write_text(
            "#!/bin/sh\n"
            f"PYTHONPATH={shlex.quote(str(project))} PYTHONSAFEPATH=1"
            f' exec {shlex.quote(sys.executable)} -m unionfs "$@"\n'
        )
        program.chmod(0o755)
        for directory in (folder, folder.parent):
            directory.chmod(0o755)
        return folder

    return make


@pytest.fixture(scope="session")
def in_mount_namespace() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return the function that runs a shell script whose mounts end with it."""

    def run(
        script: str, *arguments: str, cwd: Path, timeout_s: float, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
        return run_to_the_end(
            [*argv, *arguments], cwd=cwd, timeout_s=timeout_s, env={**os.environ, **variables}
        )

    return run


def run_to_the_end(
    argv: Sequence[str], *, cwd: Path, timeout_s: float, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command; what it wrote on both streams is in `stdout`, a time-out in `returncode`."""
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        output += f"\nstill running after {timeout_s} s\n"
    return subprocess.CompletedProcess(argv, process.returncode, output)
