"""Kills runs at random moments of their lives: `killed_worker.py FOLDER KILLS`, result as JSON.

The heavy imports are done once; every start is a fork that has them already, and does everything
else that a start does. Moments are drawn in CPU time of the process, so that a busy machine does
not move all of them to the beginning.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil  # noqa: E402  (needs the repaired path, as in run.py)

import trainer.train.assembly  # noqa: E402, F401  (what a start would import)
from tests.support.shards_fixtures import make_set  # noqa: E402
from trainer.checkpoint import checkpoint  # noqa: E402
from trainer.checkpoint.run_folder import SPEED, RunFolder, read_rows  # noqa: E402
from trainer.prepare import vit_embedded  # noqa: E402
from trainer.train import session  # noqa: E402

vit_embedded._SIZES["depth"] = 2  # a run that takes the same ways in less time
EVERY = 2
SETTINGS = {
    "moa.method": "moa_kron", "train.steps": 15, "train.batch_per_domain": 2,
    "train.eval_every": 6, "checkpoint.every": EVERY, "data.dataset": "folder",
}  # fmt: skip


class Start:
    """One start of a run in a fork; its output goes to a file beside the run folder."""

    def __init__(self, output: Path, data: Path, background: bool) -> None:
        settings = SETTINGS | {"data.root": data, "checkpoint.background": str(background).lower()}
        command = [f"--output_dir={output}", *(f"--{k}={v}" for k, v in settings.items())]
        self.log, self.metrics = output.with_suffix(".log"), output / "metrics.jsonl"
        self.began: float | None = None  # CPU seconds until the first step was on record
        self.pid = os.fork()
        if self.pid == 0:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(session.main(command))
        self.status: int | None = None

    def ended(self) -> bool:
        found, status = os.waitpid(self.pid, os.WNOHANG)
        self.status = status if found else self.status
        return bool(found)

    def live(self, moment: float) -> float:
        """Lets the process live for that many seconds of its CPU time; returns what it used."""
        used = 0.0
        while used < moment and not self.ended():
            used = sum(psutil.Process(self.pid).cpu_times()[:2])
            if self.began is None and self.metrics.exists():
                self.began = used
            time.sleep(0.01)  # only between two looks, which take from the same cores
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
        return used


def position(folder: RunFolder) -> tuple[int, int]:
    """Steps on record, and those of the newest checkpoint; every one that is there must verify."""
    recorded = len(read_rows(folder.metrics, torn=True)) if folder.metrics.exists() else 0
    for path in folder.checkpoints.glob("step-*"):
        if checkpoint.NAME.fullmatch(path.name):
            checkpoint.verify(path)
    newest = checkpoint.load_newest(folder.checkpoints) if folder.checkpoints.exists() else None
    return recorded, 0 if newest is None else int(newest.state["step"])


def content(folder: RunFolder) -> dict[str, Any]:
    """What a finished run leaves, without what a clock measures."""
    results = read_rows(folder.results)
    for row in results:
        row.pop(SPEED, None)  # the first row has none
        del row["args"]["output_dir"]
    newest = folder.checkpoints / f"step-{SETTINGS['train.steps']:08d}"
    files = [folder.metrics, *folder.adapter.iterdir(), *folder.adapter_last.iterdir(),
             newest / "adapter_model.safetensors", newest / "optimizer.safetensors"]  # fmt: skip
    return {"results": results} | {
        str(path.relative_to(folder.path)): path.read_bytes() for path in files
    }


def main(root: Path, kills: int) -> list[dict[str, Any]]:
    """Kills runs on a small data set so many times; what each start and kill met."""
    data, whole = make_set(root / "data").root, RunFolder(root / "whole")
    start = Start(whole.path, data, background=False)
    life = start.live(float("inf"))
    assert start.status == 0, start.log.read_text()
    assert start.began is not None
    early = start.began / 2  # most kills shall meet a run that trains
    wanted, draw, told, number = content(whole), random.Random(4), [], 0
    while True:
        folder, background = RunFolder(root / f"run-{number}"), number % 2 == 1
        before = position(folder)
        moment = draw.uniform(early, life) if len(told) < kills else float("inf")
        start = Start(folder.path, data, background)
        used = start.live(moment)
        if start.status == 0:
            assert content(folder) == wanted, folder.path
            if len(told) == kills:
                return told
            number += 1
            continue
        assert os.WIFSIGNALED(start.status), start.log.read_text()
        assert os.WTERMSIG(start.status) == signal.SIGKILL
        recorded, saved = position(folder)
        told.append({
            "background": background, "at": used, "recorded": recorded, "saved": saved,
            "before": before, "log": start.log.read_text(),
        })  # fmt: skip


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1]), int(sys.argv[2]))
    Path(sys.argv[1], "outcome.json").write_text(json.dumps(outcome))
