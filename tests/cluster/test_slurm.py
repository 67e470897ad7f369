"""The SLURM path with SLURM's commands faked: scripts, submission, restarts, queue and cancellation run for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jmt_dist.cluster import control, status, submit, watch
from jmt_dist.cluster import slurm as slurm_queue
from jmt_dist.cluster.options import SubmitOptions
from jmt_dist.cluster.site import compare_parameters, seconds, slurm_parameters
from jmt_dist.config import Site
from jmt_dist.errors import UsageError, UserError
from jmt_dist.recipe import load_recipe, load_site
from tests.cluster import fakeslurm
from tests.cluster.conftest import ROOT, Workplace, alive, attempts_of, starts
from tests.cluster.test_local import wait_for

SLURM = ["site.executor=slurm", "site.time=00:10:00", "site.signal_seconds=60"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    fakeslurm.install(tmp_path / "bin")
    state = tmp_path / "slurm"
    state.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setattr(fakeslurm, "HOME", state)
    yield state
    for job in state.glob("*.json"):  # what a failed test left
        fakeslurm.write(job.stem, state="CANCELLED", requeue=False)
        for pid in fakeslurm.read(job.stem).get("pids", []):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def states(out: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["state"] for path in out.glob("*/status.json")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("00:00:30", 30), ("12:30:00", 45000), ("100:00:00", 360000), ("1-00:00:00", 86400), ("2-03:04:05", 183845)],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "24h", "1:2", "12:60:00", "1-2", "-5", "0", "00:00:00", "1.5"])
def test_other_times_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"`site\.time` should be") as caught:
        seconds(text)
    assert "\n" not in str(caught.value)


def test_every_field_of_a_site_reaches_the_script() -> None:
    site = Site(
        executor="slurm", nodes=2, ranks_per_node=4, gpus_per_node=4, cpus_per_rank=8, memory_gb=200, partition="gpu", account="1234",
        qos="long", constraint="a100", exclude="n[7-8]", parallel=3, time="1-02:00:30", signal_seconds=300,
        environment=["module load cuda"], extra={"mail-type": "END"},
    )  # fmt: skip
    from submitit.slurm.slurm import _make_sbatch_string

    parameters = slurm_parameters(site, name="my recipe", snapshot=Path("/s n"), out=Path("/o"), teardown=["code=$?", 'exit "$code"'])
    script = _make_sbatch_string(command="COMMAND", folder="/o/jobs", map_count=6, **parameters)
    for line in (
        "--account=1234", "--array=0-5%3", "--constraint=a100", "--cpus-per-task=8", "--exclude='n[7-8]'", "--gpus-per-node=4",
        "--job-name=jmt-my-recipe", "--mail-type=END", "--mem=200GB", "--nodes=2", "--ntasks-per-node=4", "--partition=gpu", "--qos=long",
        "--requeue", "--signal=USR2@300", "--time=1561", "--open-mode=append",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in script, line
    assert "wckey" not in script
    lines = script.splitlines()
    order = ["umask 077", "module load cuda", "export PYTHONPATH='/s n'${PYTHONPATH:+:$PYTHONPATH}", "export OMP_NUM_THREADS=8"]
    order += ["unset SLURM_EXPORT_ENV", "set +e"]
    places = [lines.index(line) for line in order]
    run = next(index for index, line in enumerate(lines) if line.startswith("srun "))
    assert places == sorted(places) and places[-1] < run < lines.index("code=$?")
    assert "--kill-on-bad-exit=1" in lines[run] and "--cpus-per-task=8" in lines[run]
    gres = slurm_parameters(site.model_copy(update={"gres": True}), name="r", snapshot=Path("/s"), out=Path("/o"), teardown=[])
    assert gres["gres"] == "gpu:4" and "gpus_per_node" not in gres
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_dependency_of_the_site_is_waited_for_beside_ours() -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    place: dict[str, Any] = {"name": "r", "snapshot": Path("/s"), "out": Path("/o")}
    for theirs, ours, line in (
        ("afterok:5", "afterany:7", "#SBATCH --dependency=afterany:7,afterok:5"),
        ("", "afterany:7", "#SBATCH --dependency=afterany:7"),
        ("afterok:5", "", "#SBATCH --dependency=afterok:5"),
    ):
        site = Site(executor="slurm", extra={"dependency": theirs} if theirs else {})
        for parameters in (
            slurm_parameters(site, **place, teardown=[], dependency=ours),
            *([compare_parameters(site, **place, dependency=ours)] if ours else []),
        ):
            script = _make_sbatch_string(command="COMMAND", folder="/o/jobs", **parameters)
            assert [found for found in script.splitlines() if "dependency" in found] == [line]


def test_dry_prints_the_very_scripts_that_are_sent_and_writes_nothing(
    workplace: Workplace, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    out = workplace.out()
    code, text = workplace.submit(out, *SLURM, "dry=true", "site.partition=gpu")
    assert code == 0, text
    assert "#SBATCH --array=0-5%2" in text and not out.exists()
    printed = [part.split("\n### ")[0] for part in text.split("### sbatch script of: ")[1:]]
    code, answer = workplace.submit(out, *SLURM, "site.partition=gpu")
    assert code == 0, answer
    printed[-1] = printed[-1].rpartition("dry run: ")[0]
    for place, part in enumerate(printed):
        name, script = part.split("\n", 1)
        sent = (slurm / f"{100 + place}.script").read_text()
        assert _without_time(script.strip().replace("'afterany:<array>'", "afterany:100")) == _without_time(sent.strip()), name
    assert len(printed) == len(list(slurm.glob("*.script"))) == 2


def _without_time(text: str) -> str:
    return re.sub(r"\d{8}T\d{6}\.\d+Z", "<time of submission>", text)


def test_an_array_runs_every_fold_then_compares(workplace: Workplace, slurm: Path) -> None:
    out = workplace.out()
    code, text = workplace.submit(out, *SLURM, "folds=[official,fold-1]", "site.ranks_per_node=2")
    assert code == 0 and "submitted array 100" in text, text
    wait_for(lambda: (out / "table1.csv").is_file())
    assert states(out) == {"official": "done", "fold-1": "done"}
    begins = [note for note in starts(out) if "from" in note]
    assert sorted((note["fold"], note["rank"], note["world"], note["LOCAL_RANK"]) for note in begins) == [
        ("fold-1", 0, 2, "0"), ("fold-1", 1, 2, "1"), ("official", 0, 2, "0"), ("official", 1, 2, "1")
    ]  # fmt: skip
    assert {note["MASTER_ADDR"] for note in begins} == {"127.0.0.1"}
    assert len({note["MASTER_PORT"] for note in begins}) == 2  # one per job, the same for its ranks
    assert all(note["code"].startswith(str(out / "snapshot")) for note in begins)
    assert (out / "table1.csv").read_text().split() == ["fold", "fold-1", "official"]
    options = json.loads((slurm / "101.options").read_text())
    assert options["dependency"] == "afterany:100" and "array" not in options
    jobs = json.loads((out / "jobs.json").read_text())
    assert (jobs["array"], jobs["compare"], jobs["jobs"][1]["job"]) == ("100", "101", "100_1")
    assert "toy" not in Path(jobs["jobs"][1]["log"]).name and "Starting with JobEnvironment" in Path(jobs["jobs"][1]["log"]).read_text()
    code, text = workplace.submit(out, *SLURM, "folds=[official,fold-1]", "site.ranks_per_node=2")
    assert code == 0 and "nothing to do" in text


def test_a_warning_before_the_limit_puts_the_job_back_into_the_queue(workplace: Workplace, slurm: Path) -> None:
    out = workplace.out()
    words = ["folds=[official,fold-1]", "site.tries=3"]
    code, text = workplace.submit(out, *SLURM, *words, official={"steps": 8, "warn_at": 3}, fold_1={"steps": 2})
    assert code == 0, text
    wait_for(lambda: (out / "table1.csv").is_file())
    assert attempts_of(out, "official") == [("stopped", "time limit or preemption (SIGUSR2)"), ("done", "")]
    assert [(note["from"], note["SLURM_RESTART_COUNT"]) for note in starts(out) if note["fold"] == "official" and "from" in note] == [
        (0, None),
        (3, "1"),
    ]
    assert json.loads((out / "official" / "status.json").read_text())["try"] == 2
    assert attempts_of(out, "fold-1") == [("done", "")]


def test_crashes_are_queued_again_within_the_tries_whichever_rank_dies_and_however(workplace: Workplace, slurm: Path) -> None:
    out = workplace.out()
    words = ["folds=[official,fold-1,fold-2]", "site.tries=2", "site.ranks_per_node=2"]
    killed = {"steps": 4, "die_at": 2, "die_rank": 1, "seconds": 0.3}
    raised = {"steps": 4, "raise_at": 2, "raise_rank": 1, "seconds": 0.3}
    code, text = workplace.submit(out, *SLURM, *words, official=killed, fold_1=raised, fold_2={"raise_at": 1, "user": "no weights"})
    assert code == 0, text
    wait_for(lambda: (out / "table1.csv").is_file())
    assert [outcome for outcome, _ in attempts_of(out, "official")] == ["crashed", "done"]
    assert attempts_of(out, "official")[0][1] == "the ranks were killed by signal 9"
    assert attempts_of(out, "fold-1")[0] == ("crashed", "rank 1: RuntimeError: toy failure at start 1")
    assert attempts_of(out, "fold-2") == [("crashed", "rank 0: no weights")]  # not queued again
    assert states(out) == {"official": "done", "fold-1": "done", "fold-2": "failed"}


def test_a_folder_with_live_jobs_is_not_submitted_again_until_they_are_cancelled(workplace: Workplace, slurm: Path) -> None:
    out = workplace.out()
    words = ["folds=[official,fold-1]"]
    code, text = workplace.submit(out, *SLURM, *words, star={"steps": 3000})
    assert code == 0, text
    wait_for(lambda: starts(out))
    code, text = workplace.submit(out, *SLURM, *words)
    assert code == 1 and "jobs of an earlier submission are still there: official (job 100_0), fold-1 (job 100_1)" in text
    show = [sys.executable, "launch/show_status.py", f"out={out}"]
    answer = subprocess.run(show, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and "official   running" in answer.stdout and "fold-1     pending" in answer.stdout
    answer = subprocess.run([sys.executable, "launch/cancel_jobs.py", f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and "2 job(s) ended" in answer.stdout, answer.stderr
    wait_for(lambda: attempts_of(out, "official") == [("stopped", "asked to end (SIGTERM)")])
    time.sleep(0.5)
    assert states(out) == {"official": "stopped", "fold-1": "stopped"} and len(starts(out)) == 1  # and nobody queued it again


def test_a_fold_that_is_done_while_its_job_is_still_ending_stays_done(tmp_path: Path, slurm: Path) -> None:
    entries = [{"fold": fold, "job": f"77_{n}"} for n, fold in enumerate(("official", "fold-1"))]
    jobs = {"executor": "slurm", "array": "77", "folds": ["official", "fold-1"], "jobs": entries}
    status.write_json(tmp_path / "jobs.json", jobs)
    for entry, state in zip(entries, ("done", "running"), strict=True):
        status.update_status(tmp_path, entry["fold"], state=state, work="w")
        fakeslurm.write(entry["job"], state="RUNNING")
    control.cancel(tmp_path)
    assert states(tmp_path) == {"official": "done", "fold-1": "stopped"} and status.is_done(tmp_path, "official", "w")


def test_slurms_refusal_is_one_line(workplace: Workplace, slurm: Path) -> None:
    code, text = workplace.submit(workplace.out(), *SLURM, "site.partition=nowhere")
    assert code == 1 and "SLURM refused the job: sbatch: error: invalid partition specified: nowhere" in text.splitlines()[-1]


def test_a_refused_comparison_is_said_and_leaves_the_folds_in_the_queue(
    workplace: Workplace, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    out = workplace.out()
    code, text = workplace.submit(out, *SLURM, "site.partition=gpus-only", "site.gpus_per_node=1")
    assert code == 3 and "submitted array 100: 6 fold job(s)" in text, text
    assert "missing: the comparison: SLURM refused the job: sbatch: error: this partition takes no job without a GPU" in text
    assert f"python launch/compare_runs.py out={out}" in text
    assert len(control.live_jobs(out)) == 6 and "compare" not in json.loads((out / "jobs.json").read_text())


def test_the_comparison_has_a_row_and_its_failure_is_shown(tmp_path: Path, slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a run"
    status.update_status(out, "official", state="done")
    entry = {"fold": "official", "job": "77_0", "log": "x"}
    jobs = {"executor": "slurm", "array": "77", "folds": ["official"], "submission": "now", "compare": "78", "jobs": [entry]}
    status.write_json(out / "jobs.json", jobs)
    (out / "jobs" / "now" / "compare").mkdir(parents=True)
    (out / "jobs" / "now" / "compare" / "78_0_log.out").write_text("oom-kill\n")
    fakeslurm.write("77_0", state="COMPLETED")
    fakeslurm.write("78", state="PENDING")
    assert [(row.fold, row.state, row.reason) for row in watch.rows(out)][1:] == [("comparison", "pending", "Priority")]
    fakeslurm.write("78", state="OUT_OF_MEMORY")
    assert watch.watch(out, lines=5) == 3
    text = capsys.readouterr().out
    assert "1 of 1 folds are done" in text and "comparison  failed" in text and "  oom-kill" in text
    assert f"(OUT_OF_MEMORY; run: python launch/compare_runs.py out='{out}')" in text
    (out / "table1.csv").write_text("by hand\n")
    assert watch.watch(out, lines=5) == 0


def test_a_variable_of_sbatch_does_not_overrule_the_site_file(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"ACCOUNT": "theirs", "QOS": "low", "TIMELIMIT": "1", "RESERVATION": "r", "GRES": "gpu:1", "MAIL_TYPE": "ALL"}
    given |= {"OUTPUT": "mine.log", "ERROR": "mine.err", "WAIT": "1", "CPUS_PER_GPU": "2"}  # our logs would be elsewhere
    for name, value in given.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    with slurm_queue.submitting(Site(account="mine", extra={"mail-type": "END"})):
        left = {name.removeprefix("SBATCH_"): value for name, value in os.environ.items() if name.startswith("SBATCH_")}
    assert left == {"QOS": "low", "RESERVATION": "r", "GRES": "gpu:1"}  # what the site leaves open


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError])
def test_jobs_that_could_not_be_recorded_are_not_left_in_the_queue(
    workplace: Workplace, slurm: Path, monkeypatch: pytest.MonkeyPatch, trouble: type[BaseException]
) -> None:
    monkeypatch.setenv("FAKE_SLURM_HOLD", "1")
    recipe = load_recipe(workplace.recipe)
    site = load_site(workplace.site, ["executor=slurm"])
    options = SubmitOptions(recipe="", site="", out=str(workplace.out()), folds=["official", "fold-1"])
    plan = submit.make_plan(options, recipe, site, "toyjob:run_fold", "")

    def write(path: Path, value: object) -> None:
        if path.name == "jobs.json":
            raise trouble
        write_json(path, value)

    write_json = status.write_json
    monkeypatch.setattr(status, "write_json", write)
    with pytest.raises(trouble), slurm_queue.submitting(site):
        slurm_queue.submit_array(slurm_queue.of_plan(plan))
    assert [fakeslurm.read(name)["state"] for name in ("100_0", "100_1")] == ["CANCELLED", "CANCELLED"]


def test_too_many_tasks_for_an_array_name_the_limit(slurm: Path) -> None:
    from submitit.core.utils import FailedJobError

    with pytest.raises(UserError, match="MaxArraySize"), slurm_queue.submitting(Site()):
        raise FailedJobError("sbatch: error: Batch job submission failed: Invalid job array specification")


def test_a_job_that_slurm_has_lost_shows_as_lost(workplace: Workplace, slurm: Path) -> None:
    out = workplace.out()
    (out / "official").mkdir(parents=True)
    (out / "official" / "status.json").write_text('{"state": "running", "stage": "visual"}')
    entry = {"fold": "official", "job": "77_0", "log": "x"}
    (out / "jobs.json").write_text(json.dumps({"executor": "slurm", "array": "77", "folds": ["official"], "jobs": [entry]}))
    assert control.alive_states(control.read_jobs(out)) == {}
    answer = subprocess.run([sys.executable, "launch/show_status.py", f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 1 and "official   lost" in answer.stdout


def test_what_a_user_likes_to_see_of_the_queue_hides_no_job(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakeslurm.write("77_0", state="PENDING")
    fakeslurm.write("77_1", state="RUNNING")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert set(slurm_queue.squeue("77")) == {"77_0", "77_1"}


def test_rows_say_what_the_scheduler_says(tmp_path: Path) -> None:
    jobs = {"jobs": [{"fold": fold, "job": f"7_{n}"} for n, fold in enumerate(("a", "b", "c", "d"))]}
    for fold, state in (("a", "running"), ("b", "stopped"), ("c", "stopped"), ("d", "waiting")):
        status.update_status(tmp_path, fold, state=state, node="n1", reason="asked to end (SIGTERM)" if state == "stopped" else "")
    queued = {"a": slurm_queue.Queued("RUNNING", "", "n2"), "b": slurm_queue.Queued("PENDING", "BeginTime")}
    queued["d"] = slurm_queue.Queued("PENDING", "Dependency")
    rows = [status.row(tmp_path, fold, jobs, queued) for fold in "abcd"]
    assert [row.state for row in rows] == ["running", "pending", "stopped", "pending"]  # b was stopped and goes on by itself
    assert [row.node for row in rows] == ["n2", "", "n1", ""] and rows[0].heartbeat.endswith("s ago") and not rows[1].heartbeat
    assert rows[1].reason == "asked to end (SIGTERM); BeginTime" and rows[3].reason == "Dependency"
    assert status.row(tmp_path, "a", jobs, {}).state == "lost"
