"""From samples to the table: medians, ratios, the geometric mean, the goals. Pure: no file, no clock."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

GOAL_PEER = "fuse-overlayfs"
GOAL_COLD_WALK = 0.5
GOAL_MEAN = 1.0
GOAL_SLOWEST = 1 / 0.7
GOAL_MEMORY_MIB = 60.0


@dataclass(slots=True)
class Cell:
    """One workload on one peer: a sample per run, and what the first run cost in requests."""

    samples: list[float] = field(default_factory=list)
    server_cpu_s: list[float] = field(default_factory=list)
    requests: dict[str, int] | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        """The middle sample; None if the peer could not do it or there is nothing to measure."""
        return statistics.median(self.samples) if self.samples and not self.error else None

    @property
    def median_cpu_s(self) -> float | None:
        """The server's processor time, in the middle run."""
        return statistics.median(self.server_cpu_s) if self.server_cpu_s else None

    @property
    def request_count(self) -> int | None:
        """How many requests the server was sent in one run."""
        return None if self.requests is None else sum(self.requests.values())


@dataclass(slots=True)
class Row:
    """One workload on all peers."""

    name: str
    what: str
    caches: str
    unit: str
    cells: dict[str, Cell]

    def ratio(self, base: str, peer: str) -> float | None:
        """How much of the peer's time (or memory) the base takes; below 1 the base is better."""
        return ratio(self.cells[base].median, self.cells[peer].median)


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours by theirs; None where either is missing or nothing."""
    return ours / theirs if ours is not None and theirs else None


def geometric_mean(ratios: Sequence[float | None]) -> float | None:
    """The geometric mean of the ratios that are there; None without any."""
    present = [value for value in ratios if value is not None]
    if not present:
        return None
    return math.exp(statistics.fmean(math.log(value) for value in present))


def mean_ratio(rows: Sequence[Row], base: str, peer: str) -> float | None:
    """The geometric mean over all workloads that are timed (memory is not)."""
    return geometric_mean([row.ratio(base, peer) for row in rows if row.unit == "s"])


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns in line, the first two to the left and numbers to the right."""
    widths = [max(len(line[at]) for line in (header, *lines)) for at in range(len(header))]
    parts = []
    for line in (header, ["-" * width for width in widths], *lines):
        cells = [
            text.ljust(width) if at < 2 else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        parts.append("  ".join(cells).rstrip())
    return "\n".join(parts)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a cell, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def results_table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Medians of every peer, then ratios of the first peer to every other."""
    base, others = peers[0], peers[1:]
    header = ["workload", "caches", "unit", *peers, *(f"{base}/{peer}" for peer in others)]
    lines = [
        [
            row.what,
            row.caches,
            row.unit,
            *(number(row.cells[peer].median) for peer in peers),
            *(number(row.ratio(base, peer), 2) for peer in others),
        ]
        for row in rows
    ]
    means = [number(mean_ratio(rows, base, peer), 2) for peer in others]
    lines.append(["geometric mean of the times", "", "", *("" for _ in peers), *means])
    return table(header, lines)


def cost_table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """What each FUSE server was asked and what it took: requests, and processor seconds."""
    header = [
        "workload",
        "caches",
        *(f"{p} requests" for p in peers),
        *(f"{p} cpu s" for p in peers),
    ]
    lines = []
    for row in rows:
        cells = [row.cells[peer] for peer in peers]
        counts = ["-" if cell.request_count is None else str(cell.request_count) for cell in cells]
        cpu = [number(cell.median_cpu_s, 2) for cell in cells]
        lines.append([row.what, row.caches, *counts, *cpu])
    return table(header, lines)


def most_frequent(cell: Cell, count: int = 5) -> str:
    """The requests that a workload is made of, for a reader who looks for one to avoid."""
    items = list((cell.requests or {}).items())[:count]
    return ", ".join(f"{name} {number_sent}" for name, number_sent in items) or "not counted"


def shortfalls(rows: Sequence[Row], base: str) -> list[str]:
    """The goals against fuse-overlayfs that are not reached, each with the requests behind it."""
    found = []
    for row in rows:
        value = row.ratio(base, GOAL_PEER)
        if value is None or row.unit != "s":
            continue
        goal = GOAL_COLD_WALK if row.name == "walk-cold" else GOAL_SLOWEST
        if value > goal:
            ours, theirs = (most_frequent(row.cells[peer]) for peer in (base, GOAL_PEER))
            text = f"{row.name}: {value:.2f} of {GOAL_PEER}'s time, goal {goal:.2f}"
            found.append(f"{text}; requests: {ours}; {GOAL_PEER}: {theirs}")
    mean = mean_ratio(rows, base, GOAL_PEER)
    if mean is not None and mean > GOAL_MEAN:
        found.append(f"all workloads together: {mean:.2f}, goal {GOAL_MEAN:.2f}")
    return found + _memory_shortfall(rows, base)


def _memory_shortfall(rows: Sequence[Row], base: str) -> list[str]:
    found = []
    for row in rows:
        ours, theirs = row.cells[base].median, row.cells[GOAL_PEER].median
        if row.unit != "MiB" or ours is None or theirs is None:
            continue
        goal = theirs / 2 + GOAL_MEMORY_MIB
        if ours > goal:
            found.append(f"{row.name}: {ours:.0f} MiB, goal {goal:.0f} MiB")
    return found
