"""`python -m bench`: run every workload on every peer in alternation and print one table."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.child import BenchError, measure
from bench.fixtures import BLOCK_BYTES, FULL, QUICK, Fixtures
from bench.peers import PEERS, Peer, Stack, cpu_seconds, is_mounted, server_pids, unmount
from bench.report import (
    GOAL_PEER,
    Cell,
    Row,
    cost_table,
    mean_ratio,
    results_table,
    shortfalls,
)
from bench.roundtrips import RequestCounter
from bench.workloads import WORKLOADS, Caches, Run, Workload

DROP = Path("/proc/sys/vm/drop_caches")
IN_NAMESPACE = "MICA_BENCH_NAMESPACE"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--runs", type=int, default=5, help="runs of each workload (5)")
    parser.add_argument("--peers", default=",".join(PEERS), help="who takes part, first = base")
    parser.add_argument("--only", action="append", help="one workload (may be repeated)")
    parser.add_argument("--json", type=Path, help="write samples and medians here")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="a folder on disk")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.peers.split(",")) - set(PEERS)
    if unknown:
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    names = {workload.name for workload in WORKLOADS}
    unknown = set(arguments.only or ()) - names
    if unknown:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    return arguments


def settle(caches: Caches) -> None:
    """Write back what is dirty and bring the caches into the stated condition."""
    os.sync()
    DROP.write_text("3\n" if caches is Caches.DISK else "2\n")


def preread(path: Path) -> None:
    """Read a file into the page cache."""
    with path.open("rb") as file:
        while file.read(BLOCK_BYTES):
            pass


def prepare(workload: Workload, peer: Peer, folder: Path, fixtures: Fixtures) -> Run:
    """Make fresh folders and describe the run; nothing is mounted yet."""
    for name in ("upper", "work", "mnt"):
        (folder / name).mkdir(parents=True)
    lowers = workload.lowers(fixtures)
    upper, work, mountpoint = (folder / name for name in ("upper", "work", "mnt"))
    return Run(peer, Stack(fixtures.root, lowers, upper, work, mountpoint), fixtures)


def sample(workload: Workload, this: Run, cell: Cell, counter: RequestCounter) -> None:
    """Bring the caches into their condition, do the work once, and note what it took.

    Requests are counted in the first run only: a count does not wobble.
    """
    if not workload.mounts_itself:
        this.peer.mount(this.stack)
    if workload.caches is Caches.WARM:
        measure(lambda: workload.piece(this))
        os.sync()
    else:
        settle(workload.caches)
    if workload.preread:
        preread(this.stack.lowers[0] / workload.preread)
    is_counted = this.peer.is_fuse and not workload.mounts_itself and not cell.samples
    before = cpu_seconds(server_pids(this.mountpoint))
    if is_counted:
        counter.start(this.mountpoint)
    value = measure(lambda: workload.piece(this))
    if is_counted:
        cell.requests = counter.stop()
    if this.peer.is_fuse:
        cell.server_cpu_s.append(cpu_seconds(server_pids(this.mountpoint)) - before)
    if value is not None:
        cell.samples.append(value)


def clean_up(this: Run, folder: Path) -> None:
    """Unmount what a run mounted and remove its folders; never what is still mounted.

    Raises:
        BenchError: The mount stays; the folder is left alone.
    """
    unmount(this.mountpoint)
    if is_mounted(this.mountpoint):
        msg = f"{this.mountpoint} is still mounted"
        raise BenchError(msg)
    shutil.rmtree(folder)


def run_workload(
    workload: Workload,
    peers: Sequence[Peer],
    runs: int,
    fixtures: Fixtures,
    counter: RequestCounter,
) -> Row:
    """Run one workload on every peer in turn, as often as wanted.

    A peer that fails is left out of the rest of this row, with its reason.
    """
    cells = {peer.name: Cell() for peer in peers}
    for number in range(runs):
        for peer in peers:
            cell = cells[peer.name]
            if cell.error:
                continue
            folder = fixtures.root.parent / f"{workload.name}-{peer.name}-{number}"
            this = prepare(workload, peer, folder, fixtures)
            try:
                try:
                    sample(workload, this, cell, counter)
                finally:
                    clean_up(this, folder)
            except BenchError as e:
                cell.error = str(e)
    return Row(workload.name, workload.what, workload.caches.value, workload.unit, cells)


def run_all(arguments: argparse.Namespace, peers: Sequence[Peer], scratch: Path) -> list[Row]:
    """Run the chosen workloads, saying on stderr which one is under way."""
    fixtures = Fixtures(scratch, QUICK if arguments.quick else FULL)
    rows = []
    with RequestCounter(scratch) as counter:
        for workload in WORKLOADS:
            if arguments.only and workload.name not in arguments.only:
                continue
            print(f"{workload.name} ...", file=sys.stderr, flush=True)
            rows.append(run_workload(workload, peers, arguments.runs, fixtures, counter))
    return rows


def show(rows: Sequence[Row], peers: Sequence[Peer], runs: int, *, quick: bool) -> None:
    """Print the tables and what is said below them."""
    names = [peer.name for peer in peers]
    print(f"Medians of {runs} runs, peers in alternation; a ratio below 1 favours {names[0]}.\n")
    if quick:
        print("Quick: a tenth of every size that is named; only good for a first look.\n")
    print(results_table(rows, names))
    for caches in Caches:
        print(f"{caches.value}: {caches.meaning}")
    servers = [peer.name for peer in peers if peer.is_fuse]
    if servers:
        print("\nWhat each server was asked, and its processor time in one run:\n")
        print(cost_table(rows, servers))
    for row in rows:
        for name, cell in row.cells.items():
            if cell.error:
                print(f"failed: {row.name} on {name}: {cell.error}")
    if GOAL_PEER in names[1:]:
        found = shortfalls(rows, names[0])
        print("\nFalls short of the goals:" if found else "\nEvery measured goal is reached.")
        for line in found:
            print(f"  {line}")


def as_json(rows: Sequence[Row], peers: Sequence[Peer], arguments: argparse.Namespace) -> str:
    """Everything that was measured, for a later comparison."""
    base, others = peers[0].name, [peer.name for peer in peers[1:]]
    workloads = [
        {
            **asdict(row),
            "medians": {name: cell.median for name, cell in row.cells.items()},
            "ratios": {name: row.ratio(base, name) for name in others},
        }
        for row in rows
    ]
    means = {name: mean_ratio(rows, base, name) for name in others}
    facts = {
        "base": base,
        "runs": arguments.runs,
        "quick": arguments.quick,
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "caches": {caches.value: caches.meaning for caches in Caches},
        "geometric_mean": means,
        "workloads": workloads,
    }
    return json.dumps(facts, indent=2) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every peer did every workload."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if os.geteuid() != 0:
        print("bench: needs root (it mounts, and drops the kernel's caches)", file=sys.stderr)
        return 1
    wanted = [PEERS[name] for name in arguments.peers.split(",")]
    missing = [peer for peer in wanted if not peer.is_installed()]
    for peer in missing:
        print(f"bench: {peer.program} is not installed; left out", file=sys.stderr)
    peers = [peer for peer in wanted if peer not in missing]
    scratch = Path(tempfile.mkdtemp(prefix="mica-bench-", dir=arguments.scratch)).resolve()
    try:
        rows = run_all(arguments, peers, scratch)
    finally:
        if any(is_mounted(mountpoint) for mountpoint in scratch.glob("*/mnt")):
            print(f"bench: a mount is left below {scratch}", file=sys.stderr)
        else:
            shutil.rmtree(scratch)
    show(rows, peers, arguments.runs, quick=arguments.quick)
    if arguments.json:
        arguments.json.write_text(as_json(rows, peers, arguments))
    return 1 if any(cell.error for row in rows for cell in row.cells.values()) else 0


def enter_own_namespace() -> None:
    """Start again in a mount namespace of our own, and clean up when told to end.

    Whoever makes a mount namespace meanwhile gets a copy of every mount in it, and the server of a
    FUSE mount lives until the last copy is gone, long after our umount.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    if os.geteuid() == 0 and IN_NAMESPACE not in os.environ:
        os.environ[IN_NAMESPACE] = "1"
        again = [sys.executable, "-m", "bench", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *again])


if __name__ == "__main__":
    enter_own_namespace()
    sys.exit(main())
