"""The shipped templates on a real SLURM: nothing is mocked, jobs are lost and go on.

Scenarios run beside each other, since most of their time they wait for SLURM. Those that try
training train the embedded backbone on a few images of their own; ranks are frozen (SIGSTOP) while
a scenario waits for SLURM, so that runs can be short.
"""

import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock

import pytest

from shards.datasets import dataset_spec
from shards.write.conversion import write_shards
from tests.support import warm
from tests.support.image_folders import make_own_images
from tests.support.slurm_cluster import Cluster, missing
from tests.support.trainer_fixtures import ROOT, launch, rows

STEPS = 48
SETTINGS = {
    "recipe": "embedded",
    "data.dataset": "folder",
    "data.held_out": "clip art",
    "ds_config": "ds_configs/zero2.json",
    "moa.ep_size": "2",
    "train.steps": str(STEPS),
    "train.batch_per_domain": "2",
    "train.eval_every": "1000",
    "checkpoint.every": "1000",  # so that only a stop writes one before the end
}
ONE_NODE = ["--nodes=1", "--ntasks-per-node=2"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
TASK = ROOT / "tests" / "support" / "slurm_task.py"
SELDOM = 5
"""Looks at a file for each question to SLURM, which costs more than all of them."""
LOSSES = ("loss", "ce", "aux_loss", "grad_norm")
FORKING = Lock()
"""Held while a command runs: of two threads that ask for the end of a fork, one may be misled."""

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


@dataclass(frozen=True)
class Place:
    """What a scenario works with; `reference` are the same runs without SLURM, on two processes."""

    cluster: Cluster
    folder: Path
    images: Path
    shards: Path
    reference: "Future[Path]"


SCENARIOS: dict[str, Callable[[Place], None]] = {}


def scenario(function: Callable[[Place], None]) -> Callable[[Place], None]:
    SCENARIOS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def under_way(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, "Future[None]"]]:
    """The scenarios that were asked for, all begun."""
    names = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [spec.params["name"] for spec in names if spec and "name" in spec.params]
    root = tmp_path_factory.mktemp("slurm")
    make_own_images(root / "images")
    write_shards(root / "images", root / "shards", dataset_spec("folder", "--dataset"))
    warm.serve()
    with ThreadPoolExecutor(4) as pool:  # more would be in the way of the longest
        reference = pool.submit(train_without_slurm, root / "reference", root / "shards")
        begun = {}
        for name in SCENARIOS:
            if name in asked:
                (root / name).mkdir()
                place = Place(cluster, root / name, root / "images", root / "shards", reference)
                begun[name] = pool.submit(SCENARIOS[name], place)
        yield begun


def train_without_slurm(output: Path, shards: Path) -> Path:
    with FORKING:
        result = launch(*settings(output, shards), processes=2)
    assert result.returncode == 0, result.stderr
    return output


def settings(output: Path, shards: Path | None, **changes: str) -> list[str]:
    """`--key=value` of a short run; keyword `moa__method` stands for `moa.method`."""
    merged = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    root = [f"--data.root={shards}"] if shards else []
    return [*(f"--{k}={v}" for k, v in merged.items()), *root, f"--output_dir={output}"]


class Job:
    """A job of one template, its log and the run folder it writes."""

    def __init__(
        self, cluster: Cluster, log: Path, template: str, options: list[str], arguments: list[str],
        cwd: Path = ROOT, **extra: str,
    ) -> None:  # fmt: skip
        self.cluster, self.log = cluster, log
        environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SITE_ENV": "none"}
        script = str(ROOT / "slurm" / f"{template}.sh")
        command = ["sbatch", "--parsable", f"--output={log}", *options, script]
        shown = cluster.run(*command, *arguments, cwd=cwd, **(environment | extra))
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

    def is_left(self) -> bool:
        return self.cluster.is_left(self.facts()["JobId"])

    def wait_for_state(self, *states: str) -> Mapping[str, str]:
        self.cluster.wait_until(
            lambda: self.state() in states, lambda: f"{states}, is {self.facts()}: {self.text()}"
        )
        return self.facts()

    def wait_for_text(self, words: str, times: int = 1) -> None:
        ended = 0  # looks in a row: a job that is requeued has ended for a moment
        looks = count()

        def there() -> bool:
            nonlocal ended
            if self.text().count(words) >= times:
                return True
            if next(looks) % SELDOM == 0:
                over = self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
                ended = ended + 1 if over and not self.is_left() else 0
            assert ended < 6, f"no {words!r}, {self.facts()}: {self.text()}"
            return False

        self.cluster.wait_until(there, lambda: f"{words!r} in {self.facts()}: {self.text()}")

    def wait_for_steps(self, folder: Path, more: int) -> None:
        """Waits until a start has trained some steps beyond the newest checkpoint."""
        metrics, latest = folder / "metrics.jsonl", folder / "checkpoints" / "latest"
        step = more + (int(latest.read_text().removeprefix("step-")) if latest.exists() else 0)
        looks = count()

        def there() -> bool:
            if metrics.exists() and len(metrics.read_text().splitlines()) > step:
                return True
            if next(looks) % SELDOM == 0:
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
            lambda: not self.is_left() or self.state() == "RUNNING", lambda: "the end of a start"
        )
        if self.state() == "PENDING":
            self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+5")

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


@scenario
def five_requeues_in_a_row_equal_one_run(place: Place) -> None:
    cluster, run = place.cluster, place.folder / "run"
    few = "--export=PYTHON,SITE_ENV,OMP_NUM_THREADS"  # the tasks need what the script sets, too
    node = ["--partition=doomed", "--nodelist=d0", "--time=60", few, *ONE_NODE]
    log = place.folder / "log"
    job = Job(cluster, log, "domainnet_vitl", node, settings(run, place.shards))

    job.wait_for_steps(run, 5)
    with frozen(run):
        cluster.run("scancel", "--signal=USR1", "--batch", job.number)
        job.wait_for_text("SIGUSR1: forwarded to the tasks")
    job.wait_for_state("PENDING")  # SLURM may end the script before it has said so
    saved = latest_step(run)
    assert saved > 5
    job.start_again()

    job.wait_for_steps(run, 4)
    job.requeue()
    job.wait_for_text("SIGTERM: SLURM ends this job")
    job.start_again()
    assert latest_step(run) > saved, "a requeue saves before it ends the tasks"

    job.wait_for_steps(run, 4)
    assert job.text().count("steps to repeat") == 0
    with frozen(run):  # five minutes before the time limit
        cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")
        job.wait_for_text("SIGUSR1: forwarded to the tasks", times=2)
    job.wait_for_state("PENDING")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60", "ReqNodeList=d1")
    job.start_again()

    job.wait_for_steps(run, 4)
    with frozen(run):
        cluster.lose("d1")
    job.wait_for_state("PENDING")
    lost = len(rows(run / "metrics.jsonl")) - latest_step(run)
    cluster.run("scontrol", "update", f"JobId={job.number}", "ReqNodeList=d0")
    job.start_again()

    job.wait_for_text("steps to repeat")  # nobody could save
    job.wait_for_steps(run, lost + 2)  # beyond the rows of the start before
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    facts = job.wait_for_state("FAILED", "COMPLETED")
    assert facts["ExitCode"] == "137:0", job.text()
    assert "not requeued: exit code 137, a task was killed by SIGKILL" in job.text()
    job.requeue()
    job.start_again()

    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.text()
    restarts = int(facts["Restarts"])
    assert restarts >= 5, "SLURM adds one of its own if a node of a busy machine is late to answer"
    for restart in range(restarts + 1):
        assert f"slurm: job {job.number}, restart {restart}:" in job.text()
    assert_same(run, place.reference.result())


def latest_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))


@scenario
def two_tasks_train_as_without_slurm(place: Place) -> None:
    left_by_another_launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "192.0.2.1"}
    run = place.folder / "run"
    job = Job(
        place.cluster, place.folder / "log", "domainnet_vitl", TWO_NODES,
        settings(run, place.shards), DOCTOR="1", **left_by_another_launcher,
    )  # fmt: skip
    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.text()
    assert facts["NumNodes"] == "2"
    assert_same(run, place.reference.result())
    text = job.text()
    assert text.index("trainable numbers") < text.index("2 on ") < text.index("curves: tensorboard")
    assert "2 on 1 host, all heard" in text, "of two nodes, but of one machine in truth"
    assert ", 0 failures" in text
    assert "slurm: finished:" in text


@scenario
def cancelled_for_good_and_resumed_on_fewer_nodes_from_staged_shards(place: Place) -> None:
    cluster, folder, run = place.cluster, place.folder, place.folder / "run"
    made = Job(
        cluster, folder / "made", "make_shards", ["--cpus-per-task=2"],
        ["--dataset=folder", f"--root={place.images}", f"--out={folder / 'shards' / 'embedded'}"],
    )  # fmt: skip
    job = Job(cluster, folder / "log", "domainnet_vitl", TWO_NODES, settings(run, place.shards))
    job.wait_for_steps(run, 5)
    cluster.run("scancel", job.number)
    job.wait_for_text("slurm: saved; SLURM decides")
    assert job.wait_for_state("CANCELLED")["Restarts"] == "0"
    queue = cluster.run("squeue", "--noheader", f"--job={job.number}").stdout
    assert not queue.strip()
    assert made.wait_for_state("COMPLETED", "FAILED")["JobState"] == "COMPLETED", made.text()
    assert ", verified" in made.text()
    assert f"slurm: finished: {folder / 'shards' / 'embedded'}" in made.text()

    again = Job(
        cluster, folder / "again", "domainnet_vitl", ["--nodes=1", "--ntasks-per-node=1"],
        settings(run, None, moa__ep_size="1"),
        SHARDS=str(folder / "shards"), STAGE="yes", SCRATCH=str(folder / "scratch"),
    )  # fmt: skip
    facts = again.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", again.text()
    assert "resumed after step" in again.text()
    assert "steps to repeat" not in again.text()
    assert_same(run, place.reference.result())
    assert list((folder / "scratch").glob("moa-shards-*/embedded/**/*.tar"))


@scenario
def bad_configuration_is_refused_at_once(place: Place) -> None:
    """In a job that was submitted from elsewhere."""
    run = place.folder / "run"
    wrong = settings(run, place.shards, train__stepz="3", moa__method="moa_lara")
    options = [*TWO_NODES, f"--chdir={ROOT}"]
    log = place.folder / "log"
    job = Job(place.cluster, log, "domainnet_vitl", options, wrong, cwd=place.folder)
    facts = job.wait_for_state("FAILED", "COMPLETED")
    assert facts["ExitCode"] == "2:0", job.text()
    assert facts["Restarts"] == "0"
    text = job.text()
    assert "--train.stepz = '3': unknown setting; did you mean 'train.steps'?" in text
    assert "--moa.method = 'moa_lara': legal is" in text
    assert "not started: the plan ended with code 2" in text
    assert not run.exists(), "no task has started"


def stand_in(place: Place, stops: int, **extra: str) -> dict[str, str]:
    """Variables of a job whose tasks do not train; see `slurm_task`."""
    program = place.folder / "python"
    program.write_text(f'#!/bin/bash\nexec {sys.executable} {TASK} "$@"\n')
    program.chmod(0o755)
    run = str(place.folder / "run")
    return {"PYTHON": str(program), "RUN": run, "STOPS": str(stops), **extra}


@scenario
def warned_as_the_tasks_start_and_without_progress(place: Place) -> None:
    variables = stand_in(place, 9, DEAF="yes", REQUEUES_WITHOUT_PROGRESS="1")
    run = place.folder / "run"
    job = Job(place.cluster, place.folder / "log", "domainnet_vitl", TWO_NODES, [], **variables)
    for restart in range(2):
        deaf = run / f"deaf-{restart}"
        place.cluster.wait_until(deaf.exists, lambda: f"a task: {job.text()}")
        place.cluster.run("scancel", "--signal=USR1", "--batch", job.number)
        job.wait_for_text("SIGUSR1: forwarded", times=restart + 1)
        if not restart:
            job.wait_for_text("slurm: requeued: stopped before the tasks could listen")
            job.start_again()
    facts = job.wait_for_state("FAILED", "COMPLETED")
    assert facts["ExitCode"] == "75:0", job.text()
    assert "not requeued: 1 requeues in a row without progress" in job.text()


@scenario
def tasks_that_slurm_has_lost_make_room(place: Place) -> None:
    """Its daemon on the node of a job dies; tasks and script live on, and the job starts again."""
    cluster, run = place.cluster, place.folder / "run"
    options = ["--partition=doomed", "--nodelist=d2", "--nodes=1", "--ntasks-per-node=1"]
    log = place.folder / "log"
    job = Job(cluster, log, "domainnet_vitl", options, [], **stand_in(place, 1))
    cluster.wait_until((run / "start-0").exists, lambda: f"a task: {job.text()}")
    cluster.lose_slurmd("d2")
    job.wait_for_text("SLURM decides whether this job (state PENDING) runs again")
    assert "slurm: finished" not in job.text()
    job.wait_for_state("PENDING")
    cluster.run("scontrol", "update", f"JobId={job.number}", "ReqNodeList=d0")
    job.start_again()  # waits until the old tasks have gone
    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.text()
    assert (run / "start-1").exists()


@scenario
def a_chain_of_jobs_that_may_not_be_requeued(place: Place) -> None:
    cluster, options = place.cluster, ["--no-requeue", "--dependency=singleton", "--time=60"]
    variables, run = stand_in(place, 1), place.folder / "run"
    size = [
        "--nodes=1",
        "--ntasks-per-node=1",
        "--job-name=chain",
        "--mem=0",
        "--gpu-bind=single:1",
    ]
    first, second = (
        Job(cluster, place.folder / name, "domainnet_vitl", [*options, *size], [], **variables)
        for name in ("first", "second")
    )
    cluster.wait_until((run / "start-0").exists, lambda: f"a task: {first.text()}")
    assert second.state() == "PENDING"
    cluster.run("scancel", "--signal=USR1", "--batch", first.number)
    assert first.wait_for_state("FAILED", "COMPLETED")["ExitCode"] == "75:0"
    assert "this job may not be requeued (--no-requeue" in first.text()
    assert second.wait_for_state("COMPLETED", "FAILED")["JobState"] == "COMPLETED", second.text()


MEET = """
from trainer.process.world import world_from_environment
world = world_from_environment()
from trainer.engine import collectives
collectives.start(world)
print(world.rank, "of", world.size, "heard", collectives.from_main(f"rank {world.rank}"))
collectives.stop()
"""


@scenario
def srun_in_an_allocation_needs_no_script(place: Place) -> None:
    (place.folder / "meet.py").write_text(MEET)
    task = ["srun", sys.executable, str(place.folder / "meet.py")]
    shown = place.cluster.run(
        "salloc", "--nodes=1", "--ntasks=2", *task, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"
    )
    found = [line for line in shown.stdout.splitlines() if "heard" in line]
    assert sorted(found) == ["0 of 2 heard rank 0", "1 of 2 heard rank 0"], shown.stderr


@scenario
def an_array_fills_its_gaps(place: Place) -> None:
    cluster, root = place.cluster, place.folder / "grid"
    changes = {"moa__method": "linear", "moa__ep_size": "1", "train__steps": "3"}
    shared = [
        word
        for word in settings(root, place.shards, **changes)
        if not word.startswith("--data.held_out")
    ]
    shared.append("--held-out=photo,clip art,sketch")
    # Two at a time on one node.
    size = ["--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=60", "--nodelist=n0"]
    log = place.folder / "log-%a"
    job = Job(cluster, log, "leave_one_out", ["--array=0-2%2", *size], shared)
    cluster.run("scancel", f"{job.number}_0", f"{job.number}_2")
    wait_for_none_of(cluster, job)
    found = report(cluster, root)
    names = [f"linear-{name}-0" for name in ("photo", "sketch")]
    assert "3 runs, 1 finished, 0 running or queued, 2 missing" in found, found + job.text()
    for line in (f"missing: 0 {names[0]}", f"missing: 2 {names[1]}"):
        assert line in found
    line = next(line for line in found.splitlines() if line.startswith("sbatch "))
    words = shlex.split(line)
    script = words.index("slurm/leave_one_out.sh")
    assert words[:2] == ["sbatch", "--array=0,2%2"]
    assert {*size, "--nodes=1", "--time=12:00:00"} <= set(words[2:script])
    options, rest = [*words[1:script]], words[script + 1 :]
    job = Job(cluster, log, "leave_one_out", options, rest)
    cluster.wait_until(
        lambda: "running or queued: 0 " in report(cluster, root), lambda: "a queued cell"
    )
    # The last element to start has the number of the array, by which SLURM means all of them.
    last = job.element(2)
    last.wait_for_text("restart 0")
    cluster.run("scancel", "--signal=USR1", "--batch", last.number)
    last.wait_for_text("slurm: requeued")
    last.start_again()
    wait_for_none_of(cluster, job)
    assert [job.element(index).facts()["Restarts"] for index in (0, 2)] == ["0", "1"]
    found = report(cluster, root)
    assert "3 runs, 3 finished, 0 running or queued, 0 missing" in found, found
    assert "sbatch" not in found
    assert "linear" in found.partition("clip art")[2], "the table"


def wait_for_none_of(cluster: Cluster, job: Job) -> None:
    queue = ("squeue", "--noheader", f"--job={job.number}")
    cluster.wait_until(lambda: not cluster.run(*queue).stdout.strip(), lambda: "an empty queue")


def report(cluster: Cluster, root: Path) -> str:
    with FORKING:
        result = warm.run("-m", "trainer.report", str(root), env=cluster.environment)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_templates_fit_as_they_are(cluster: Cluster) -> None:
    for template in sorted(ROOT.glob("slurm/*.sh")):
        if template.name != "common.sh":
            shown = cluster.run("sbatch", "--test-only", f"slurm/{template.name}")
            assert "to start at" in shown.stderr, template


@pytest.mark.parametrize("name", [*SCENARIOS])
def test_on_a_cluster(under_way: dict[str, "Future[None]"], name: str) -> None:
    under_way[name].result()
