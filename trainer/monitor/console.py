"""Where a user reads along: a live display on a terminal, plain lines that grep finds elsewhere."""

import logging
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger("trainer")


def set_up_logging(log_file: Path, console: Console) -> None:
    """Sends the main rank's log lines to the console and to `log_file`."""
    file = logging.FileHandler(log_file, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    shown: logging.Handler = logging.StreamHandler(sys.stdout)
    if console.is_terminal:
        shown = RichHandler(console=console, show_path=False, show_time=False)
    for name in ("trainer", "shards", "moa"):
        logger = logging.getLogger(name)
        logger.handlers = [file, shown]
        logger.setLevel(logging.INFO)
        logger.propagate = False


@dataclass
class Standing:
    """Where a run stands; rich draws it anew whenever it looks.

    Attributes:
        first_step: of this start.
        withheld: names of the domains that are not trained on.
        done: steps done, those of earlier starts included.
        row: the last step's numbers, as in `metrics.jsonl`.
        img_s: images per second in the last step.
        wait_share: share of the last steps' time that went into waiting for data.
        accuracies: of the last evaluation, per domain and split in [0, 1].
        evaluated: its step.
        started: when this start began, on the monotonic clock.
    """

    total: int
    first_step: int
    withheld: Collection[str]
    done: int = 0
    row: Mapping[str, float] = field(default_factory=dict)
    img_s: float = 0.0
    wait_share: float = 0.0
    peak_gib: float = 0.0
    phase: str = "starting"
    accuracies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluated: int = -1
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self.started

    @property
    def eta(self) -> str:
        """Time left at the average pace so far, evaluations included; `?` before the first step."""
        done = self.done - self.first_step
        return clock(self.elapsed / done * (self.total - self.done)) if done > 0 else "?"

    @property
    def bad_images(self) -> int:
        """Images that could not be used so far."""
        return int(sum(n for name, n in self.row.items() if name.startswith("moa/bad/")))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Progress, numbers, and the accuracies of the last evaluation, for any width."""
        width = options.max_width
        count = f"{self.done}/{self.total}"
        share = f"{100 * self.done // self.total} %"
        room = width - len(self.phase) - len(count) - len(share) - 4
        bar = ProgressBar(self.total, self.done, width=max(4, min(60, room)))
        progress = Table.grid(padding=(0, 1))
        progress.add_row(Text(self.phase, style="bold"), bar, count, share)
        yield progress
        yield Columns(self._numbers(), padding=(0, 3))
        if self.accuracies:
            title = f"accuracy % in/out after step {self.evaluated}"
            yield Text(title, style="dim", no_wrap=True, overflow="ellipsis")
            yield Columns(self._accuracies(width), padding=(0, 3))

    def _numbers(self) -> list[Text]:
        cells = []
        if self.row:
            wait = f"data wait {100 * self.wait_share:.0f} %"
            cells += [
                Text.assemble("loss ", (f"{self.row['loss']:.4f}", "bold")),
                Text(f"{self.img_s:.0f} img/s"),
                Text(wait, style="bold red" if self.wait_share > 0.5 else ""),
                Text(f"{self.peak_gib:.2f} GiB"),
            ]
        if self.bad_images:
            cells.append(Text(f"{self.bad_images} bad images", style="yellow"))
        return [*cells, Text(clock(self.elapsed)), Text(f"ETA {self.eta}")]

    def _accuracies(self, width: int) -> list[Text]:
        """A cell per domain, all equally wide and none wider than the terminal."""
        names = {d: f"{d} (held out)" if d in self.withheld else d for d in self.accuracies}
        widest = max(4, min(max(map(len, names.values())), width - 12))
        cells = []
        for domain, splits in self.accuracies.items():
            style = "yellow" if domain in self.withheld else ""
            name = f"{names[domain][:widest]:<{widest}}"
            cells.append(Text(f"{name} {both(splits, 100, 5, 1)}", style=style))
        return cells


def both(splits: Mapping[str, float], factor: float, width: int, digits: int) -> str:
    """`in/out` of one domain; `-` for a split that was not evaluated."""
    return "/".join(
        f"{factor * splits[name]:{width}.{digits}f}" if name in splits else f"{'-':>{width}}"
        for name in ("in", "out")
    )


def plain_line(standing: Standing) -> str:
    """One step for a log: names and values that grep and awk find."""
    row = standing.row
    bad = f" bad images {standing.bad_images}" if standing.bad_images else ""
    return (
        f"step {int(row['step'])}/{standing.total} loss {row['loss']:.4f} ce {row['ce']:.4f} "
        f"aux {row['aux_loss']:.4f} grad_norm {row['grad_norm']:.3f} {standing.img_s:.0f} img/s "
        f"wait {100 * standing.wait_share:.0f} % mem {standing.peak_gib:.2f} GiB "
        f"ETA {standing.eta}{bad}"
    )


def evaluation_line(step: int, accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """One evaluation for a log."""
    cells = (f"{domain} {both(splits, 1, 0, 3)}" for domain, splits in accuracies.items())
    return f"eval step {step} (in/out) {' '.join(cells)}"


def clock(seconds: float) -> str:
    """`1:02:03` or `02:03` for a duration in seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
