"""The shipped templates on a real SLURM: nothing is mocked, jobs are lost and go on.

Every job trains the embedded backbone on the embedded data; ranks are frozen (SIGSTOP) while a test
waits for SLURM, so that runs can be short.
"""

import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.slurm_cluster import Cluster, missing
from tests.support.trainer_fixtures import ROOT, launch, rows

STEPS = 60
SETTINGS = {
    "recipe": "embedded",
    "ds_config": "ds_configs/zero2.json",
    "moa.ep_size": "2",
    "train.steps": str(STEPS),
    "train.batch_per_domain": "2",
    "train.eval_every": "1000",
    "checkpoint.every": "1000",  # so that only a stop writes one before the end
}
ONE_NODE = ["--nodes=1", "--ntasks-per-node=2"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
LOSSES = ("loss", "ce", "aux_loss", "grad_norm")

absent = missing()
if absent and os.environ.get("MOA_NO_SKIPS"):  # where nothing may be skipped, this is an error
    raise RuntimeError(f"SLURM is not installed: no {', '.join(absent)}")
pytestmark = [
    pytest.mark.skipif(
        bool(absent), reason=f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    ),
    pytest.mark.timeout(1800),  # what ends a wait is that nothing moves any more
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not in pytest's own folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="moa-slurm-") as folder, Cluster(Path(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same training without SLURM, on two processes."""
    output = tmp_path_factory.mktemp("plain") / "run"
    result = launch(*settings(output), processes=2)
    assert result.returncode == 0, result.stderr
    return output


def settings(output: Path, **changes: str) -> list[str]:
    """`--key=value` of a short run; keyword `moa__method` stands for `moa.method`."""
    merged = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [*(f"--{key}={value}" for key, value in merged.items()), f"--output_dir={output}"]


class Job:
    """A job of one template, its log and the run folder it writes."""

    def __init__(
        self, cluster: Cluster, log: Path, template: str, options: list[str], arguments: list[str],
        **extra: str,
    ) -> None:  # fmt: skip
        self.cluster, self.log = cluster, log
        environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SITE_ENV": "none"}
        command = ["sbatch", "--parsable", f"--output={log}", *options, f"slurm/{template}.sh"]
        shown = cluster.run(*command, *arguments, **(environment | extra))
        self.number = shown.stdout.strip()

    def element(self, index: int) -> "Job":
        """One job of an array."""
        one = copy(self)
        one.number = f"{self.number}_{index}"
        one.log = Path(str(self.log).replace("%a", str(index)))
        return one

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def facts(self) -> Mapping[str, str]:
        return self.cluster.facts(self.number)

    def state(self) -> str:
        return self.facts()["JobState"]

    def wait_for_state(self, *states: str) -> Mapping[str, str]:
        self.cluster.wait_until(
            lambda: self.state() in states, lambda: f"{states}, is {self.facts()}: {self.text()}"
        )
        return self.facts()

    def wait_for_text(self, words: str, times: int = 1) -> None:
        ended = 0  # looks in a row: a job that is requeued has ended for a moment

        def there() -> bool:
            nonlocal ended
            over = self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            ended = ended + 1 if over and self.cluster.is_quiet() else 0
            enough = self.text().count(words) >= times
            assert enough or ended < 30, f"no {words!r}, {self.facts()}: {self.text()}"
            return enough

        self.cluster.wait_until(there, lambda: f"{words!r} in {self.facts()}: {self.text()}")

    def wait_for_step(self, folder: Path, step: int) -> None:
        metrics = folder / "metrics.jsonl"

        def there() -> bool:
            if metrics.exists() and len(metrics.read_text().splitlines()) > step:
                return True
            assert self.state() in ("PENDING", "RUNNING"), f"{self.state()}: {self.text()}"
            return False

        self.cluster.wait_until(there, lambda: f"step {step}: {self.facts()}: {self.text()}")

    def start_again(self) -> None:
        """Spares the two minutes that SLURM lets a requeued job wait.

        Not before all is gone, and a little later for what cannot be seen: SLURM would take the
        end of the old start for that of the new one.
        """
        self.wait_for_state("PENDING", "RUNNING")
        self.cluster.wait_until(
            lambda: self.cluster.is_quiet() or self.state() == "RUNNING", lambda: "idle nodes"
        )
        if self.state() == "PENDING":
            self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+8")

    def requeue(self) -> None:
        self.cluster.run("scontrol", "requeue", self.number)


def ranks_of(folder: Path) -> list[int]:
    """Process numbers of the ranks that train in a folder, main rank first."""
    notes = sorted((folder / "heartbeats").glob("rank-*.json"))
    return [json.loads(note.read_text())["pid"] for note in notes]


@contextmanager
def frozen(folder: Path) -> Iterator[list[int]]:
    """Nothing moves within the block, however long SLURM takes."""
    pids = ranks_of(folder)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def assert_same(folder: Path, other: Path) -> None:
    """Steps and sample keys are equal, losses and accuracies to 1e-6."""
    ours, theirs = rows(folder / "metrics.jsonl"), rows(other / "metrics.jsonl")
    assert [row["step"] for row in ours] == list(range(STEPS))
    assert [r["batch_digest"] for r in ours] == [r["batch_digest"] for r in theirs]
    for name in LOSSES:
        values = [row[name] for row in theirs]
        # The balance loss is tiny beside the others, a difference of nearly equal numbers.
        assert [row[name] for row in ours] == pytest.approx(values, rel=1e-6, abs=1e-8), name
    mine, wanted = rows(folder / "results.jsonl"), rows(other / "results.jsonl")
    assert [row["step"] for row in mine] == [row["step"] for row in wanted]
    for row, expected in zip(mine, wanted, strict=True):
        columns = [key for key in expected if key.endswith("_acc")]
        assert columns
        assert {k: row[k] for k in columns} == pytest.approx({k: expected[k] for k in columns})
    assert (folder / "done").exists()


def test_templates_fit_as_they_are(cluster: Cluster) -> None:
    for template in sorted(ROOT.glob("slurm/*.sh")):
        if template.name != "common.sh":
            shown = cluster.run("sbatch", "--test-only", f"slurm/{template.name}")
            assert "to start at" in shown.stderr, template


def test_two_tasks_train_as_without_slurm(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    left_by_another_launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1"}
    job = Job(
        cluster, tmp_path / "log", "domainnet_vitl", TWO_NODES, settings(tmp_path / "run"),
        **left_by_another_launcher,
    )  # fmt: skip
    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.text()
    assert facts["NumNodes"] == "2"
    assert_same(tmp_path / "run", reference)
    text = job.text()
    assert text.index("trainable numbers") < text.index("curves: tensorboard")
    assert "slurm: finished:" in text


def test_five_requeues_in_a_row_equal_one_run(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = "--export=PYTHON,SITE_ENV,OMP_NUM_THREADS"  # the tasks need what the script sets, too
    node = ["--nodelist=n3", "--time=60", few, *ONE_NODE]
    job = Job(cluster, tmp_path / "log", "domainnet_vitl", node, settings(run))

    job.wait_for_step(run, 5)
    with frozen(run):
        cluster.run("scancel", "--signal=USR1", "--batch", job.number)
        job.wait_for_text("SIGUSR1: forwarded to the tasks")
    job.wait_for_text("slurm: requeued")
    saved = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert saved > 5
    job.start_again()

    job.wait_for_step(run, saved + 5)
    job.requeue()
    job.wait_for_text("SIGTERM: SLURM ends this job")
    job.start_again()
    job.wait_for_text(f"resumed after step {saved - 1}")
    assert job.text().count("steps to repeat") == 0, "a requeue saves before it ends the tasks"

    job.wait_for_step(run, saved + 12)
    with frozen(run):  # five minutes before the time limit
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")
        job.wait_for_text("SIGUSR1: forwarded to the tasks", times=2)
    job.wait_for_text("slurm: requeued", times=2)
    job.wait_for_state("PENDING")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60", "ReqNodeList=n2")
    job.start_again()

    job.wait_for_step(run, saved + 18)
    with frozen(run):
        cluster.lose("n2")
    job.wait_for_state("PENDING")
    cluster.run("scontrol", "update", f"JobId={job.number}", "ReqNodeList=n1")
    job.start_again()

    job.wait_for_text("steps to repeat")  # nobody could save
    job.wait_for_step(run, saved + 28)  # beyond the rows of the start before
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    facts = job.wait_for_state("FAILED", "COMPLETED")
    assert facts["ExitCode"] == "137:0", job.text()
    assert "not requeued: exit code 137, a task was killed by SIGKILL" in job.text()
    job.requeue()
    job.start_again()

    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.text()
    assert facts["Restarts"] == "5"
    cluster.repair("n2")
    for restart in range(6):
        assert f"slurm: job {job.number}, restart {restart}:" in job.text()
    assert_same(run, reference)


def test_cancelled_for_good_and_resumed_on_fewer_nodes_from_staged_shards(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    run, shards = tmp_path / "run", tmp_path / "shards"
    made = Job(
        cluster, tmp_path / "made", "make_shards", ["--cpus-per-task=2"],
        ["--dataset=digits", f"--out={shards / 'embedded'}"],
    )  # fmt: skip
    job = Job(cluster, tmp_path / "log", "domainnet_vitl", TWO_NODES, settings(run))
    job.wait_for_step(run, 5)
    cluster.run("scancel", job.number)
    job.wait_for_text("slurm: saved; SLURM decides")
    assert job.wait_for_state("CANCELLED")["Restarts"] == "0"
    queue = cluster.run("squeue", "--noheader", f"--job={job.number}").stdout
    assert not queue.strip()
    assert made.wait_for_state("COMPLETED", "FAILED")["JobState"] == "COMPLETED", made.text()
    assert ", verified" in made.text()

    again = Job(
        cluster, tmp_path / "again", "domainnet_vitl", ["--nodes=1", "--ntasks-per-node=1"],
        settings(run, moa__ep_size="1"),
        SHARDS=str(shards), STAGE="yes", SCRATCH=str(tmp_path / "scratch"),
    )  # fmt: skip
    facts = again.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", again.text()
    assert "resumed after step" in again.text()
    assert "steps to repeat" not in again.text()
    assert_same(run, reference)
    assert list((tmp_path / "scratch").glob("moa-shards-*/embedded/**/*.tar"))


def test_bad_configuration_is_refused_at_once(cluster: Cluster, tmp_path: Path) -> None:
    wrong = settings(tmp_path / "run", train__stepz="3", moa__method="moa_lara")
    job = Job(cluster, tmp_path / "log", "domainnet_vitl", TWO_NODES, wrong)
    facts = job.wait_for_state("FAILED", "COMPLETED")
    assert facts["ExitCode"] == "2:0"
    assert facts["Restarts"] == "0"
    text = job.text()
    assert "--train.stepz = '3': unknown setting; did you mean 'train.steps'?" in text
    assert "--moa.method = 'moa_lara': legal is" in text
    assert "not started: the plan ended with code 2" in text
    assert not (tmp_path / "run").exists(), "no task has started"


def test_guard_ends_requeues_without_progress(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(
        cluster, tmp_path / "log", "domainnet_vitl", TWO_NODES, settings(tmp_path / "run"),
        REQUEUES_WITHOUT_PROGRESS="1",
    )  # fmt: skip
    job.wait_for_text("restart 0")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for_text("slurm: requeued")
    job.start_again()
    job.wait_for_text("restart 1")
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    facts = job.wait_for_state("FAILED", "COMPLETED")
    assert facts["ExitCode"] == "75:0", job.text()
    assert "not requeued: 1 requeues in a row without progress" in job.text()


def test_array_fills_its_gaps(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "grid"
    shared = settings(root, moa__method="linear", moa__ep_size="1", train__steps="3")
    shared.append("--held-out=plain,inverted,outline")
    size = ["--ntasks-per-node=1", "--cpus-per-task=60", "--nodelist=n0"]  # two at a time
    log = tmp_path / "log-%a"
    job = Job(cluster, log, "leave_one_out", ["--array=0-2", *size], shared)
    cluster.run("scancel", f"{job.number}_0", f"{job.number}_2")
    wait_for_no_job(cluster)
    found = report(cluster, root)
    names = [f"linear-{name}-0" for name in ("plain", "outline")]
    assert "3 runs, 1 finished, 0 running or queued, 2 missing" in found
    for line in (f"missing: 0 {names[0]}", f"missing: 2 {names[1]}"):
        assert line in found
    line = next(line for line in found.splitlines() if line.startswith("sbatch "))
    start = "sbatch --array=0,2 slurm/leave_one_out.sh "
    assert line.startswith(start)
    rest = shlex.split(line.removeprefix(start))
    job = Job(cluster, log, "leave_one_out", ["--array=0,2", *size], rest)
    cluster.wait_until(
        lambda: "running or queued: 0 " in report(cluster, root), lambda: "a queued cell"
    )
    # The last element to start has the number of the array, by which SLURM means all of them.
    last = job.element(2)
    last.wait_for_text("restart 0")
    cluster.run("scancel", "--signal=USR1", "--batch", last.number)
    last.wait_for_text("slurm: requeued")
    last.start_again()
    wait_for_no_job(cluster)
    assert [job.element(index).facts()["Restarts"] for index in (0, 2)] == ["0", "1"]
    found = report(cluster, root)
    assert "3 runs, 3 finished, 0 running or queued, 0 missing" in found, found
    assert "sbatch" not in found
    assert "linear" in found.partition("inverted")[2], "the table"


def wait_for_no_job(cluster: Cluster) -> None:
    cluster.wait_until(
        lambda: not cluster.run("squeue", "--noheader").stdout.strip(), lambda: "an empty queue"
    )


def report(cluster: Cluster, root: Path) -> str:
    result = warm.run("-m", "trainer.report", str(root), env=cluster.environment)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr
