"""A short run on the embedded data, started in the ways users start it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import warm
from tests.support.warm import ROOT, free_port

RUN = str(ROOT / "trainer" / "run.py")
KILLED = str(ROOT / "tests" / "support" / "killed_run.py")
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")

# Small, with everything switched on that could depend on the world size: routing noise, balance
# loss, augmentation, clipping, evaluations and checkpoints that do not coincide.
SETTINGS = {
    "moa.method": "moa_kron",
    "train.steps": "13",
    "train.batch_per_domain": "4",
    "train.eval_every": "6",
    "checkpoint.every": "4",
    "optim.clip": "0.5",
    "train.seed": "3",
}


def arguments(output: Path, **changes: str) -> list[str]:
    """`--key=value` for the short run; keyword `moa__method` stands for `moa.method`."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--output_dir={output}", *(f"--{key}={value}" for key, value in settings.items())]


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, so that a busy machine stays usable and sums keep their order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def launch(*command: str, processes: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs `trainer/run.py`: plain, or in some processes that know of each other."""
    return warm.run(RUN, *command, processes=processes, env=environment(**extra))


def launch_anew(
    *command: str, processes: int = 0, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs it in new interpreters, under the deepspeed launcher if in several, as users do."""
    if processes:
        return warm.run(*under_deepspeed(processes), *command, env=environment(**extra))
    return subprocess.run(
        [sys.executable, RUN, *command],
        capture_output=True, text=True, cwd=ROOT, timeout=400, check=False,
        env=environment(**extra),
    )  # fmt: skip


def under_deepspeed(processes: int) -> tuple[str, ...]:
    """What comes before the arguments of a run to have deepspeed start its processes."""
    return DEEPSPEED, "--num_gpus", str(processes), "--master_port", free_port(), RUN


def kill_after_step(command: list[str], step: int) -> None:
    """Runs it until `step` is on record, where it and its children end by SIGKILL."""
    result = warm.run(KILLED, str(step), *command, env=environment())
    assert result.returncode == -signal.SIGKILL, result.stderr


def rows(path: Path) -> list[dict[str, object]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
