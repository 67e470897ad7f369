"""The submission path on a real SLURM: array, SLURM's own warning, requeue, dead ranks, cancellation (slow tier)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jmt_dist.cluster import network_check, site_check
from jmt_dist.cluster.site import check, slurm_parameters
from jmt_dist.config import Site
from jmt_dist.recipe import load_site
from tests.cluster.conftest import HERE, ROOT, Workplace, alive, attempts_of, minicluster, starts
from tests.cluster.test_local import wait_for

pytestmark = pytest.mark.slurm
WORDS = ["site.executor=slurm", "site.partition=mini", "site.signal_seconds=60"]


def job_of(out: Path, fold: str) -> str:
    return next(job["job"] for job in json.loads((out / "jobs.json").read_text())["jobs"] if job["fold"] == fold)


def test_an_array_survives_a_signal_and_a_killed_rank_and_is_compared(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    words = [*WORDS, "site.time=00:10:00", "site.ranks_per_node=2", "site.cpus_per_rank=2", "folds=[official,fold-1]"]
    toy = {"official": {"steps": 40, "seconds": 0.1}, "fold_1": {"steps": 4, "die_at": 2, "die_rank": 1}}
    code, text = workplace.submit(out, *words, **toy)
    assert code == 0, text
    wait_for(lambda: len([note for note in starts(out) if note["fold"] == "official"]) == 2)
    time.sleep(0.5)
    subprocess.run(["scancel", "--signal=USR2", job_of(out, "official")], check=True)
    wait_for(lambda: (out / "table1.csv").is_file(), 120)
    assert attempts_of(out, "official") == [("stopped", "time limit or preemption (SIGUSR2)"), ("done", "")]
    # srun asks the siblings of a dead rank to end before it kills them
    assert attempts_of(out, "fold-1") == [("stopped", "asked to end (SIGTERM)"), ("done", "")]
    begins = [note for note in starts(out) if note["fold"] == "official" and "from" in note]
    assert [note["SLURM_RESTART_COUNT"] for note in begins] == [None, None, "1", "1"]
    assert {note["OMP_NUM_THREADS"] for note in begins} == {"2"} and {note["world"] for note in begins} == {2}
    assert all(note["from"] > 0 for note in begins[2:])
    assert (out / "table1.csv").read_text().split() == ["fold", "fold-1", "official"]


def test_slurm_itself_warns_before_the_time_limit(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    words = ["site.executor=slurm", "site.partition=mini", "site.time=00:02:00", "site.signal_seconds=110", "folds=[official]"]
    code, text = workplace.submit(out, *words, official={"steps": 600, "seconds": 0.1})
    assert code == 0, text
    wait_for(lambda: (out / "official" / "attempts.json").exists() and len(attempts_of(out, "official")) == 2, 120)
    assert attempts_of(out, "official")[0] == ("stopped", "time limit or preemption (SIGUSR2)")
    cancel = [sys.executable, "launch/cancel_jobs.py", f"out={out}"]
    assert subprocess.run(cancel, cwd=ROOT, capture_output=True).returncode == 0
    wait_for(lambda: not any(alive(note["pid"]) for note in starts(out)))


def test_a_preempted_fold_saves_in_its_grace_and_goes_on_afterwards(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    words = [*WORDS, "site.time=00:10:00", "folds=[official]", "compare=false"]
    code, text = workplace.submit(out, *words, official={"steps": 60, "seconds": 0.1})
    assert code == 0, text
    wait_for(lambda: (out / "official" / "state-0").exists())
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    subprocess.run(urgent, check=True, capture_output=True)
    wait_for(lambda: status_of(out) in ("done", "failed"), 120)
    assert attempts_of(out, "official") == [("stopped", "asked to end (SIGTERM)"), ("done", "")]
    begins = [note["from"] for note in starts(out) if "from" in note]
    assert begins[0] == 0 < begins[1] < 60 and len(begins) == 2


def test_a_cancelled_array_stays_cancelled(workplace: Workplace, cluster: Path) -> None:
    out = workplace.out()
    code, text = workplace.submit(out, *WORDS, "site.time=00:10:00", "site.parallel=1", "folds=[official,fold-1]", star={"steps": 3000})
    assert code == 0, text
    wait_for(lambda: starts(out))
    show = subprocess.run([sys.executable, "launch/show_status.py", f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert "official   running" in show.stdout and "fold-1     pending" in show.stdout, show.stdout + show.stderr
    running, pending = show.stdout.splitlines()[:2]
    assert "  n1  heartbeat " in running and "JobArrayTaskLimit" in pending
    answer = subprocess.run([sys.executable, "launch/cancel_jobs.py", f"out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert "2 job(s) ended" in answer.stdout, answer.stderr
    wait_for(lambda: not any(alive(note["pid"]) for note in starts(out)))
    time.sleep(8)  # longer than a requeued job waits
    assert len(starts(out)) == 1
    assert subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout == ""


def test_check_site_is_content_with_it(cluster: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launch/check_site.py", "site=slurm/sites/minicluster.yaml", f"out={tmp_path}"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    assert "ok    SLURM accounting" in answer.stdout and "ok    SLURM takes the job" in answer.stdout
    assert "ok    node names: 2 node(s), 2 do not resolve" in answer.stdout
    wrong = load_site(ROOT / "slurm" / "sites" / "minicluster.yaml", ["partition=none"])
    findings = [*site_check._slurm_submission(wrong), *network_check.names(wrong)]  # all of it again would import the libraries again
    assert [(finding.name, finding.outcome) for finding in findings] == [("SLURM takes the job", "fail"), ("node names", "fail")]
    assert all(finding.remedy for finding in findings)


def test_ranks_of_two_nodes_meet_from_a_folder_of_any_name(workplace: Workplace, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes over srun and gloo, node names that do not resolve, and a run folder and recipe named to break any unquoted shell."""
    monkeypatch.setenv("TOY_FUNCTION", "toyjob:gloo")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cr3t-of-the-test")
    out = workplace.folder / "runs" / 'it\'s a "test" $HOME; touch `id` & *'
    words = [*WORDS, "site.time=00:10:00", "site.nodes=2", "folds=[official]", "name='it''s a \"test\" $HOME;'"]
    code, text = workplace.submit(out, *words)
    assert code == 0, text
    log = Path(json.loads((out / "jobs.json").read_text())["jobs"][0]["log"])
    wait_for(lambda: (out / "official" / "status.json").exists() and status_of(out) in ("done", "failed"), 120)
    assert status_of(out) == "done", log.read_text()
    assert {(out / f"sum-{rank}").read_text() for rank in range(2)} == {"3 1"}
    assert {(out / f"node-{rank}").read_text() for rank in range(2)} == {"n1", "n2"}
    wait_for(lambda: (out / "table1.csv").is_file())
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if path.stat().st_mode & 0o077]
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]  # jobs inherit it: nothing needs to write it down
    assert (out / "password-0").read_text() == "18 characters"


def status_of(out: Path) -> str:
    return json.loads((out / "official" / "status.json").read_text())["state"]


@pytest.mark.parametrize("gres", [False, True])
def test_slurm_understands_every_field_of_a_site(cluster: Path, gres: bool, tmp_path: Path) -> None:
    """What squeue and scontrol say of a held job that was submitted with every field set."""
    from submitit.slurm.slurm import _make_sbatch_string

    site = Site(
        name="all", executor="slurm", partition="mini", account="root", qos="normal", constraint="fast", exclude="n2", nodes=1,
        ranks_per_node=2, gpus_per_node=2, gres=gres, cpus_per_rank=3, memory_gb=4, time="1-00:00:00", signal_seconds=300, parallel=2,
        environment=["echo '$HOME is \"here\"'"], extra={"hold": "", "comment": "a 'quoted' $word", "nice": "7"},
    )  # fmt: skip
    check(site)
    parameters = slurm_parameters(site, name="a 'b'", snapshot=tmp_path, out=tmp_path, teardown=[])
    (tmp_path / "script").write_text(_make_sbatch_string(command="true", folder=tmp_path, map_count=3, **parameters))
    answer = subprocess.run(["sbatch", str(tmp_path / "script")], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    job = answer.stdout.split()[-1]
    text = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    subprocess.run(["scancel", job], check=True)
    for part in (
        "JobName=jmt-a-b- ", "Account=root", "QOS=normal", "Partition=mini", "Features=fast", "ExcNodeList=n2", "NumTasks=2",
        "CPUs/Task=3", "MinMemoryNode=4G", "TimeLimit=1-00:00:00", "ArrayTaskThrottle=2", "Requeue=1", "Comment=a 'quoted' $word",
        "Nice=7", "Reason=JobHeldUser", "TresPerNode=gres:gpu:2",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "#SBATCH --gres=gpu:2" in (tmp_path / "script").read_text() or not gres


def test_defaults_of_sbatch_neither_overrule_the_site_nor_keep_the_environment_from_the_ranks(
    workplace: Workplace, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EXPORT": "NONE", "PARTITION": "urgent", "TIMELIMIT": "1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    out = workplace.out()
    words = [*WORDS, "site.time=00:10:00", f"site.environment=['export PYTHONPATH={HERE}:{ROOT}']", "site.tries=1"]
    code, text = workplace.submit(out, *words, "folds=[official]", "compare=false")
    assert code == 0, text
    said = subprocess.run(["scontrol", "show", "job", "-o", job_of(out, "official")], capture_output=True, text=True).stdout
    assert "Partition=mini" in said and "TimeLimit=00:10:00" in said
    wait_for(lambda: (out / "official" / "status.json").exists() and status_of(out) in ("done", "failed"), 120)
    assert status_of(out) == "done", (out / "official" / "status.json").read_text()
    assert starts(out)[0]["code"].startswith(str(out / "snapshot"))


def test_editing_the_checkout_changes_nothing_in_a_queued_job(workplace: Workplace, cluster: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "jmt_dist", checkout / "jmt_dist", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(checkout), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    with (checkout / "jmt_dist" / "errors.py").open("a") as file:
        file.write("\n# an edit that is not committed\n")
    out = workplace.out()
    recipe = Path(shutil.copy(workplace.recipe, checkout / "recipe.yaml"))
    words = [*WORDS, f"recipe={recipe}", "site.time=00:10:00", "site.extra={hold: ''}", "folds=[official]", "compare=false"]
    process = workplace.start(out, *words, home=str(checkout))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"commit {commit[:12]}, with changes" in text, text
    assert json.loads((out / "snapshot.json").read_text())["dirty"] == ["jmt_dist/errors.py"]
    shutil.rmtree(checkout)  # an edit of code or recipe could not go further
    subprocess.run(["scontrol", "release", json.loads((out / "jobs.json").read_text())["array"]], check=True)
    wait_for(lambda: (out / "official" / "status.json").exists() and status_of(out) in ("done", "failed"), 90)
    assert status_of(out) == "done"
    assert starts(out)[0]["code"].startswith(str(out / "snapshot"))


def test_up_again_is_the_same_cluster(cluster: Path) -> None:
    answer = minicluster("up")
    assert answer.returncode == 0 and "already up" in answer.stderr and answer.stdout.strip() == str(cluster)
