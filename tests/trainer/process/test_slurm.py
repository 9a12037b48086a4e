"""What a task of SLURM's finds out by itself: where the others meet, and that its job is gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.trainer_fixtures import ROOT, RUN, environment
from trainer.process import slurm
from trainer.process.errors import RESUBMIT
from trainer.process.slurm import SCRIPT, rendezvous, watch_job
from trainer.process.world import World, world_from_environment

STEP = {"SLURM_JOB_ID": "19999", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[01-04,07]", "gpu01"),
        ("gpu[3,5],cpu1", "gpu3"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]-n[08,10]", "rack1-n08"),
    ],
)
def test_tasks_meet_at_the_first_node(nodes: str, first: str) -> None:
    told = {**STEP, "SLURM_STEP_NODELIST": nodes}
    assert rendezvous(told) == {"MASTER_ADDR": first, "MASTER_PORT": "29999"}
    alone = rendezvous({**told, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_ID": "1"})
    assert alone == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "10100"}
    assert rendezvous({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": nodes}) == {}, "no step"


def test_what_a_script_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"}
    for name, value in {**STEP, **launched, "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World(rank=1, size=2, local_rank=0, local_size=1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29999")


@pytest.mark.parametrize(
    ("node", "stops"), [("n1", True), ("n2", False)], ids=["beside the script", "on another node"]
)
def test_a_task_whose_job_is_gone_is_told_to_stop(
    node: str, stops: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "LOOK", 0.02)
    script = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        watch_job({**STEP, "SLURMD_NODENAME": node, SCRIPT: f"n1:{script.pid}"})
        assert signal.sigtimedwait([signal.SIGTERM], 0.1) is None, "the script is there"
        script.communicate(b"\n")
        assert (signal.sigtimedwait([signal.SIGTERM], 20 if stops else 0.1) is not None) == stops
        assert ("the job of this task is gone" in capfd.readouterr().err) == stops
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_task_of_no_job_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.threading, "Thread", None)
    watch_job({SCRIPT: ":1"})


# The warning comes with the first import of ours, which is the second statement of run.py.
WARNED = """
import os, runpy, signal, sys
class Warning:
    def find_spec(name, path, target=None):
        if name == "trainer":
            sys.meta_path.remove(Warning)
            os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Warning)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_warning_before_anybody_listens_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "warned.py"
    script.write_text(WARNED)
    result = subprocess.run(
        [sys.executable, str(script), RUN, f"--output_dir={tmp_path / 'run'}"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert result.returncode == RESUBMIT, result.stderr
    assert "stopped by SIGUSR1 before training began" in result.stderr
    assert not (tmp_path / "run").exists()
