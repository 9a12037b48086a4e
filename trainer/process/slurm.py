"""What SLURM tells a task beyond its rank: where the others meet, and whether the job still is."""

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

LOOK = 5.0
"""Seconds between two looks for what a task depends on."""

SCRIPT = "MOA_JOB_SCRIPT"
"""Environment variable of `slurm/common.sh`: node and process number of the batch script."""


def rendezvous(told: Mapping[str, str]) -> dict[str, str]:
    """Address and port at which the tasks of one step meet; nothing outside of a step.

    The batch scripts set both; this is for `srun` in an allocation of `salloc`.
    """
    nodes = told.get("SLURM_STEP_NODELIST")
    if nodes is None or "SLURM_STEP_ID" not in told:
        return {}
    # n[01-04,7] is n01, n02 ...: the first of each bracket, up to the first comma outside of one.
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]
    alone = told.get("SLURM_STEP_NUM_NODES") == "1"
    # One port a step: several may share a node. Below the range that systems hand out themselves.
    number = int(told["SLURM_JOB_ID"]) + 101 * int(told["SLURM_STEP_ID"])
    return {
        "MASTER_ADDR": "127.0.0.1" if alone else first,
        "MASTER_PORT": str(10000 + number % 20000),
    }


def watch_job(told: Mapping[str, str]) -> None:
    """Ends this task, as a signal would, once its job is gone; does nothing outside of a job.

    A node's SLURM may die and leave the tasks alone: the job is over or starts again elsewhere, and
    they would hold the run folder for as long as they train.
    """
    if "SLURM_STEP_ID" not in told:
        return
    node, _, pid = told.get(SCRIPT, "").partition(":")
    script = int(pid) if node == told.get("SLURMD_NODENAME") and pid.isdecimal() else None
    if script is not None and not is_there(script):
        script = None  # not seen from a container with process numbers of its own
    arguments = (os.getppid(), script)
    threading.Thread(target=_watch, args=arguments, name="job", daemon=True).start()


def _watch(parent: int, script: int | None) -> None:
    """Waits until SLURM's process of this step, or the batch script, has ended."""
    while os.getppid() == parent and (script is None or is_there(script)):
        time.sleep(LOOK)
    with suppress(OSError):
        os.write(2, b"the job of this task is gone: it saves and leaves\n")
    os.kill(os.getpid(), signal.SIGTERM)


def is_there(pid: int) -> bool:
    """Whether a process runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
