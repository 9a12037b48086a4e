"""A short run on the embedded data, started in the ways users start it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "trainer" / "run.py")
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
    """Runs `trainer/run.py`: plain, or under the deepspeed launcher with some processes."""
    launcher = [sys.executable, RUN]
    if processes:
        # A port of its own, in case another test's launcher has not yet let go of the default.
        port = str(20000 + os.getpid() % 20000)
        launcher = [DEEPSPEED, "--num_gpus", str(processes), "--master_port", port, RUN]
    return subprocess.run(
        [*launcher, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**extra),
        timeout=400,
        check=False,
    )


FORKS = """
import json, os, sys
root, folder, *commands = json.loads(sys.argv[1])
sys.path[0] = root
import trainer.train.assembly
from trainer.train.session import main
for number, command in enumerate(commands):
    if os.fork() == 0:
        for stream in (1, 2):
            name = os.path.join(folder, f"{number}.{stream}")
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
        os._exit(main(command))
    with open(os.path.join(folder, f"{number}.code"), "w") as file:
        print(os.waitstatus_to_exitcode(os.wait()[1]), file=file)
"""


def launch_all(commands: Iterable[list[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs plain commands one after the other, each in a fork of a process that has imported all.

    Half of what a short run takes is its imports.
    """
    given = list(commands)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", FORKS, json.dumps([str(ROOT), folder, *given])],
            capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=400, check=True,
        )  # fmt: skip
        found = [
            [Path(folder, f"{number}.{name}").read_text() for name in ("code", 1, 2)]
            for number in range(len(given))
        ]
    return [
        subprocess.CompletedProcess(command, int(code), *texts)
        for command, (code, *texts) in zip(given, found, strict=True)
    ]


def kill_after_step(command: list[str], metrics: Path, step: int) -> None:
    """Starts a plain run, and ends it and its children with SIGKILL once `step` is on record."""
    process = subprocess.Popen(
        [sys.executable, RUN, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) > step:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.01)  # only between two looks at the file
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def rows(path: Path) -> list[dict[str, object]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
