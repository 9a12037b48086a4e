"""What a run tells: TensorBoard, log file, and a live line on a terminal or plain lines elsewhere.

Only the main rank has a monitor.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from trainer.config import RunConfig, as_plain

log = logging.getLogger("trainer")


def terminal() -> Console:
    """The console all user-facing output goes to; rich itself honours NO_COLOR."""
    return Console(file=sys.stdout)


def set_up_logging(log_file: Path, console: Console) -> None:
    """Sends the main rank's log lines to the console and to `log_file`."""
    file = logging.FileHandler(log_file, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file]
    if console.is_terminal:
        handlers.append(RichHandler(console=console, show_path=False, show_time=False))
    else:
        handlers.append(logging.StreamHandler(sys.stdout))
    for name in ("trainer", "shards", "moa"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Monitor:
    """Live progress and TensorBoard curves of one run.

    Args:
        config: the run, for the text page.
        folder: TensorBoard's folder.
        first_step: where the run (re)starts; later events of an earlier start are purged.
        console: where progress is shown.
    """

    def __init__(self, config: RunConfig, folder: Path, first_step: int, console: Console) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        text = yaml.safe_dump(as_plain(config), sort_keys=False)
        self.writer.add_text("config", f"```yaml\n{text}```", first_step)
        self.total = config.train.steps
        self.console = console
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.started, self.first_step = time.monotonic(), first_step
        self.every = max(1, min(50, self.total // 10))  # steps between plain lines and router notes

    def __enter__(self) -> "Monitor":
        """Starts the live line if there is a terminal for it."""
        if self.console.is_terminal and os.environ.get("TERM") != "dumb":
            self.progress = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task(
                "train", total=self.total, completed=self.first_step, status="starting"
            )
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the live line and flushes TensorBoard."""
        if self.progress is not None:
            self.progress.stop()
        self.writer.close()

    def step(self, row: Mapping[str, float], perf: Mapping[str, float]) -> None:
        """Notes one training step.

        Args:
            row: the numbers of a `metrics.jsonl` row, `step` among them.
            perf: `img_s`, `step_ms`, `data_wait_ms`.
        """
        step = int(row["step"])
        for name in ("loss", "ce", "aux_loss", "lr", "grad_norm"):
            if math.isfinite(row[name]):  # not so in a step that was left out
                self.writer.add_scalar(f"train/{name}", row[name], step)
        if "skipped_steps" in row:
            self.writer.add_scalar("train/skipped_steps", row["skipped_steps"], step)
        for name, value in perf.items():
            self.writer.add_scalar(f"perf/{name}", value, step)
        for name, count in row.items():
            if name.startswith("moa/bad/"):
                self.writer.add_scalar(f"data/bad/{name.removeprefix('moa/bad/')}", count, step)
        if self.progress is not None and self.task is not None:
            status = f"loss {row['loss']:.4f}  {perf['img_s']:.0f} img/s"
            self.progress.update(self.task, completed=step + 1, status=status)
        elif step % self.every == 0 or step + 1 == self.total:
            self._plain_line(step, row, perf)

    def _plain_line(self, step: int, row: Mapping[str, float], perf: Mapping[str, float]) -> None:
        done, left = step + 1 - self.first_step, self.total - step - 1
        eta = (time.monotonic() - self.started) / done * left
        bad = sum(count for name, count in row.items() if name.startswith("moa/bad/"))
        log.info(
            "step %d/%d loss %.4f ce %.4f aux %.4f grad_norm %.3f %.0f img/s wait %.0f ms ETA %s%s",
            step, self.total, row["loss"], row["ce"], row["aux_loss"], row["grad_norm"],
            perf["img_s"], perf["data_wait_ms"], clock(eta),
            f" bad images {bad:.0f}" if bad else "",
        )  # fmt: skip

    def evaluation(
        self, step: int, by_domain: Mapping[str, Mapping[str, float]], selected: float
    ) -> None:
        """Notes an evaluation: accuracies per domain and split, and the selected target's."""
        for domain, splits in by_domain.items():
            for split, value in splits.items():
                self.writer.add_scalar(f"eval/{domain}/{split}_acc", value, step)
        self.writer.add_scalar("select/training_domain_validation/target_acc", selected, step)
        cells = " ".join(f"{d} {s['in']:.3f}/{s['out']:.3f}" for d, s in by_domain.items())
        log.info("eval step %d (in/out) %s", step, cells)

    def routing(self, step: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Notes the routers' state; one transfer from the device per value."""
        dead = 0
        for layer, values in stats.items():
            load = values["load"].tolist()
            dead += sum(share == 0 for share in load)
            for expert, share in enumerate(load):
                self.writer.add_scalar(f"router/{layer}/load_{expert}", share, step)
            for name in ("entropy", "max_prob", "temperature"):
                self.writer.add_scalar(f"router/{layer}/{name}", float(values[name]), step)
        if stats:
            self.writer.add_scalar("router/dead_experts", dead, step)


def clock(seconds: float) -> str:
    """`1:02:03` or `02:03` for a duration in seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
