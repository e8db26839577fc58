"""The benchmark: its arithmetic, what it says about goals, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import peers
from bench.__main__ import parse
from bench.child import BenchError, measure, run
from bench.peers import PEERS, Stack
from bench.report import (
    Cell,
    Row,
    cost_table,
    geometric_mean,
    mean_ratio,
    ratio,
    results_table,
    shortfalls,
    table,
)
from bench.workloads import WORKLOADS
from tests.support import mounts

PROJECT = Path(__file__).resolve().parents[1]


def row(name: str = "tar", unit: str = "s", **samples: list[float]) -> Row:
    """One workload; the peer fuse-overlayfs is spelt `fuse`."""
    cells = {peer.replace("fuse", "fuse-overlayfs"): Cell(of) for peer, of in samples.items()}
    return Row(name, f"what {name} does", "warm", unit, cells)


# --- medians, ratios, means --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "median"), [([3.0], 3.0), ([5.0, 1.0, 2.0], 2.0), ([1.0, 2.0], 1.5), ([], None)]
)
def test_median_is_the_middle_sample(samples: list[float], median: float | None):
    assert Cell(samples).median == median


def test_failed_cell_has_no_median():
    assert Cell([1.0], error="it broke").median is None


def test_requests_are_counted_over_all_kinds():
    assert Cell(requests={"READ": 3, "OPEN": 1}).request_count == 4


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(1.0, 2.0, 0.5), (2.0, 1.0, 2.0), (None, 1.0, None), (1.0, None, None), (1.0, 0.0, None)],
)
def test_ratio_is_ours_by_theirs(ours: float | None, theirs: float | None, expected: float | None):
    assert ratio(ours, theirs) == expected


def test_ratio_of_a_row_is_that_of_the_medians():
    assert row(mica=[1.0, 9.0, 2.0], fuse=[4.0]).ratio("mica", "fuse-overlayfs") == 0.5


def test_geometric_mean_of_a_half_and_a_double_is_one():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_geometric_mean_leaves_out_what_is_missing():
    assert geometric_mean([None, 4.0, None, 9.0]) == pytest.approx(6.0)


def test_geometric_mean_of_nothing_is_nothing():
    assert geometric_mean([None]) is None


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=10))
def test_geometric_mean_of_the_inverses_is_the_inverse(ratios: list[float]):
    there = geometric_mean(list(ratios))
    back = geometric_mean([1 / value for value in ratios])
    assert there is not None
    assert back == pytest.approx(1 / there)


def test_mean_over_the_rows_leaves_out_memory():
    rows = [row(mica=[1.0], fuse=[2.0]), row("memory", "MiB", mica=[100.0], fuse=[1.0])]
    assert mean_ratio(rows, "mica", "fuse-overlayfs") == pytest.approx(0.5)


# --- tables ------------------------------------------------------------------------------------------------------


def test_table_lines_up_text_to_the_left_and_numbers_to_the_right():
    assert table(["name", "at", "n"], [["a", "bcd", "1"], ["long name", "e", "10"]]).split(
        "\n"
    ) == [
        "name       at    n",
        "---------  ---  --",
        "a          bcd   1",
        "long name  e    10",
    ]


def test_results_show_medians_ratios_and_their_mean():
    rows = [row(mica=[1.0], fuse=[2.0]), row("find", mica=[2.0], fuse=[1.0])]
    lines = [line.split() for line in results_table(rows, ["mica", "fuse-overlayfs"]).split("\n")]
    assert lines[0][-3:] == ["mica", "fuse-overlayfs", "mica/fuse-overlayfs"]
    assert [line[-3:] for line in lines[2:4]] == [
        ["1.000", "2.000", "0.50"],
        ["2.000", "1.000", "2.00"],
    ]
    assert lines[4][-1] == "1.00"


def test_results_show_a_dash_where_a_peer_failed():
    failed = row(mica=[1.0], fuse=[])
    last = results_table([failed], ["mica", "fuse-overlayfs"]).split("\n")[2].split()
    assert last[-3:] == ["1.000", "-", "-"]


def test_costs_show_requests_and_processor_time():
    cell = Cell([1.0], [0.25], {"READ": 7})
    table_of_costs = cost_table([Row("tar", "tar", "warm", "s", {"mica": cell})], ["mica"])
    assert table_of_costs.split("\n")[2].split() == ["tar", "warm", "7", "0.25"]


# --- goals -------------------------------------------------------------------------------------------------------


def test_goals_that_are_reached_are_not_named():
    rows = [row(mica=[1.0], fuse=[1.0]), row("walk-cold", mica=[1.0], fuse=[2.0])]
    rows.append(row("memory", "MiB", mica=[65.0], fuse=[10.0]))
    assert shortfalls(rows, "mica") == []


@pytest.mark.parametrize(
    ("missed", "said"),
    [
        (row(mica=[1.5], fuse=[1.0]), "tar: 1.50 of fuse-overlayfs's time, goal 1.43"),
        (row("walk-cold", mica=[0.6], fuse=[1.0]), "walk-cold: 0.60 of fuse-overlayfs's time"),
        (row("memory", "MiB", mica=[66.0], fuse=[10.0]), "memory: 66 MiB, goal 65 MiB"),
    ],
)
def test_goal_that_is_missed_is_named(missed: Row, said: str):
    rows = [missed, row("find", mica=[0.1], fuse=[1.0])]
    assert [line[: len(said)] for line in shortfalls(rows, "mica")] == [said]


def test_mean_above_one_is_named():
    rows = [row(mica=[1.2], fuse=[1.0])]
    assert shortfalls(rows, "mica") == ["all workloads together: 1.20, goal 1.00"]


def test_shortfall_names_the_requests_behind_it():
    slow = row(mica=[2.0], fuse=[1.0])
    slow.cells["mica"].requests = dict(Counter(LOOKUP=5, GETATTR=2).most_common())
    assert (
        "requests: LOOKUP 5, GETATTR 2; fuse-overlayfs: not counted"
        in shortfalls([slow], "mica")[0]
    )


# --- the command line and the workloads --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--peers", "nobody"], ["--only", "nothing"]])
def test_unknown_name_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        parse(arguments)
    assert refused.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_every_workload_has_a_name_of_its_own():
    names = [workload.name for workload in WORKLOADS]
    assert len(names) == len(set(names))


def test_relative_options_mean_the_same_folders():
    base = Path("/s/fixtures")
    stack = Stack(base, [base / "a", base / "b"], Path("/s/r/u"), Path("/s/r/w"), Path("/s/r/mnt"))
    assert stack.options() == "lowerdir=/s/fixtures/a:/s/fixtures/b,upperdir=/s/r/u,workdir=/s/r/w"
    assert stack.options(relative=True) == "lowerdir=a:b,upperdir=../r/u,workdir=../r/w"


# --- children ----------------------------------------------------------------------------------------------------


def test_measured_piece_runs_in_another_process():
    assert measure(lambda: float(os.getpid())) != os.getpid()


def test_piece_that_measures_nothing_gives_nothing():
    assert measure(lambda: None) is None


def test_error_of_a_piece_is_told():
    def piece() -> float:
        raise ValueError("the reason")

    with pytest.raises(BenchError, match="ValueError: the reason"):
        measure(piece)


def test_command_that_fails_is_told_with_its_words():
    with pytest.raises(BenchError, match="sh ended with 3: the reason"):
        run(["sh", "-c", "echo the reason >&2; exit 3"])


def test_command_that_is_missing_is_told():
    with pytest.raises(BenchError, match="no-such-program"):
        run(["no-such-program"])


# --- the real thing ----------------------------------------------------------------------------------------------


@pytest.mark.root
def test_one_quick_workload_gives_a_median_and_leaves_nothing(scratch: Path):
    folder = scratch / "bench"
    folder.mkdir()
    report = scratch / "report.json"
    only = ["--runs", "1", "--peers", "overlay", "--only", "unlink"]
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", *only, "--scratch", folder, "--json", report],
        cwd=PROJECT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(report.read_text())
    assert [found["name"] for found in facts["workloads"]] == ["unlink"]
    assert facts["workloads"][0]["medians"]["overlay"] > 0
    assert "unlink 5 000 lower files" in ended.stdout
    assert list(folder.iterdir()) == []


@pytest.mark.root
@pytest.mark.fuse
def test_server_that_outlives_its_mount_is_ended_and_told(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another mount namespace holds a copy of the mount, so the kernel does not let go of the server."""
    for name in ("lower", "upper", "work", "mnt"):
        (scratch / name).mkdir()
    where = scratch / "mnt"
    stack = Stack(scratch, [scratch / "lower"], scratch / "upper", scratch / "work", where)
    PEERS["mica"].mount(stack)
    holds = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        monkeypatch.setattr(peers, "UNMOUNT_S", 0.5)
        with pytest.raises(BenchError, match="still there"):
            peers.unmount(where)
        holder.communicate()
    assert not peers.is_mounted(where)
    assert mounts.pids_that_name(scratch) == []
