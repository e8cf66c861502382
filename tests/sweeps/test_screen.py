"""What a sweep prints and leaves behind: the plan, its progress, the comparison with failed arms in it."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sweeps.sweeping import PROGRAM, planned, starts, sweep, write_sweep

from crossft.cli import main
from crossft.cli.sweep import close, print_plan, report
from crossft.sweeps.local import Local
from crossft.sweeps.plan import Cost, Plan
from crossft.sweeps.progress import SweepProgress
from crossft.sweeps.state import tail

ARMS = {"plain": {"fake.leg": "x"}, "better": {"fake.leg": "x", "fake.gain": 0.2}, "bad": {"fake.end": "fail"}}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    targets = {"data.target": {"values": ["sketch", "cartoon"]}}
    metric = {"name": "target/test/accuracy"}
    return planned(write_sweep(tmp_path, arms=ARMS, seeds=2, baseline="plain", parameters=targets, metric=metric))


def test_plan_shows_arms_runs_legs_and_cost(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan, 2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "better (cartoon) 2 to start data.target=cartoon fake.gain=0.2" in printed
    assert "6 arms x 2 seeds = 12 runs in" in printed
    assert "1 source legs are fitted once each, for 8 runs" in printed
    assert "unknown until a run has finished, or --measure" in printed
    sweep(plan, slots=4)
    print_plan(plan, 2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "bad (sketch) 2 failed" in printed
    assert "left to do: 8 s of runs, about 4 s with 2 at a time" in printed


def test_measured_cost_counts_until_runs_have_finished(plan: Plan) -> None:
    labels = {run.arm.label for run in plan.runs}
    measured = {label: Cost(10.0 if label.startswith("plain") else 20.0, 7.0) for label in labels}
    assert plan.seconds_left() is None
    assert plan.seconds_left(measured) == 4 * 10 + 8 * 20 + 7, "12 runs, and one source leg that 8 of them share"
    sweep(plan, slots=4)
    assert plan.seconds_left(measured) == 4 * 20, "what is left are the failed runs, which have no time of their own"


def test_report_holds_every_arm_and_the_end_says_why_some_failed(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes, _ = sweep(plan, slots=4)
    report(plan)
    assert close(outcomes) == 1
    printed = capsys.readouterr().out
    assert "failed: bad (sketch) s0: TrainingError: the loss is NaN at step 3" in printed
    assert printed.count("best mean of target/test/accuracy, without a test: better (0.7050)") == 3
    rows = list(csv.DictReader(io.StringIO((plan.root / "comparison.csv").read_text())))
    tasks = {"small: photo → sketch", "small: photo → cartoon"}
    assert {row["group"] for row in rows} == {*tasks, "small: over 2 tasks"}, "one head for all tables"
    page = (plan.root / "comparison.html").read_text()
    assert "the loss is NaN at step 3" in page
    assert "| bad | 0, 2 failed |" in (plan.root / "comparison.md").read_text()
    assert sorted(p.name for p in plan.root.glob("*.png")) == ["tradeoff-1.png", "tradeoff-2.png"]


def test_a_run_that_was_killed_before_it_could_write_is_in_the_table(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms={"good": {}, "dead": {"fake.end": "dead"}}, seeds=2))
    outcomes, _ = sweep(plan, slots=2)
    assert {o.reason for o in outcomes if o.run.arm.name == "dead"} == {"killed by SIGKILL"}
    report(plan)
    assert "| dead | 0, " in (plan.root / "comparison.md").read_text()
    assert "killed by SIGKILL" in (plan.root / "comparison.html").read_text()
    assert "dead" in (plan.root / "comparison.csv").read_text()
    sweep(plan, slots=2)
    assert len(starts(plan, "fit")) == 6, "2 finished; 2 began twice, from nothing"


def test_other_runs_of_the_experiment_are_not_compared(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms=ARMS))
    sweep(plan, slots=3)
    changed = planned(plan.sweep.path, "--lr=1")
    sweep(changed, slots=3)
    report(changed)
    assert "| plain | 1 |" in (plan.root / "comparison.md").read_text()


def test_progress_is_lines_in_a_file_and_bars_on_a_terminal(plan: Plan) -> None:
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
        with SweepProgress(len(plan.runs), console) as progress:
            Local(plan, 4, program=PROGRAM, retry=terminal).run(progress)
        assert isinstance(console.file, io.StringIO)
        printed = console.file.getvalue()
        assert printed.count("failed    bad (sketch) s") == 2
        if terminal:
            assert "12/12" in printed
            assert "4 failed" in printed
        else:
            assert printed.count("started   ") == 12
            assert "finished  plain (sketch) s0: " in printed


def test_tail_of_a_log_is_the_last_processs_error(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert tail(log) == ""
    log.write_text("$ crossft fit\ncrossft: error: old\n$ crossft resume\na\n\nb\rc\n")
    assert tail(log, 2) == "b | c"
    log.write_text(log.read_text() + "crossft: error: new\nclosing\n")
    assert tail(log) == "new"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots=0"], "--slots=0 must be at least 1"),
        (["--gpus=a"], "--gpus=a must be device numbers"),
        (["sketch"], "'sketch': after the sweep file come flags of the config"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path)
    assert main(["sweep", "run", str(file), *words]) == 2
    assert message in capsys.readouterr().err


def test_sweep_and_compare_import_no_torch(tmp_path: Path) -> None:
    plan = planned(write_sweep(tmp_path, arms=ARMS))
    sweep(plan, slots=3)
    code = (
        "import sys, crossft.cli, crossft.cli.sweep, crossft.sweeps.progress; "
        f"code = crossft.cli.main(['compare', {str(plan.root)!r}]); "
        "assert code == 0; assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
