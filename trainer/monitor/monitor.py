"""What a run tells while it trains, brought together: curves, pages, warnings, the console.

Only the main rank has a monitor.
"""

import logging
import os
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.live import Live
from torch import Tensor

from trainer.checkpoint.run_folder import RunFolder
from trainer.monitor.console import Standing, evaluation_line, plain_line
from trainer.monitor.curves import MEAN_OUT, TARGET, VALIDATION, Curves
from trainer.monitor.efficiency import DataWait, hint, image_utilisation, peak_gib
from trainer.monitor.router_health import RouterHealth
from trainer.monitor.tracking import Tracking
from trainer.prepare.parts import Parts
from trainer.process.world import World

if TYPE_CHECKING:
    from trainer.monitor.insight import Insight, Seen

ByDomain = Mapping[str, Mapping[str, float]]
"""Domain -> split -> accuracy in [0, 1]."""

log = logging.getLogger("trainer")


class Monitor:
    """Shows one run.

    Args:
        first_step: where the run (re)starts; TensorBoard's later events are purged.
    """

    def __init__(
        self,
        parts: Parts,
        folder: RunFolder,
        world: World,
        device: torch.device,
        first_step: int,
        console: Console,
    ) -> None:
        self.config, self.folder, self.device, self.console = parts.config, folder, device, console
        moa, total = self.config.moa, self.config.train.steps
        layers = parts.report.layers if moa.routed else ()
        tracking = Tracking(self.config, folder, first_step) if self.config.log.active else None
        self.curves = Curves(self.config, folder.tensorboard, first_step, layers, tracking)
        self.standing = Standing(total, first_step, parts.withheld_names, done=first_step)
        self.every = max(1, min(50, total // 10))  # steps between plain lines and router notes
        balance = "--moa.balance bias, or raise --moa.aux_weight"
        balance += f"; now {moa.balance}, {moa.aux_weight}"
        self.health = RouterHealth(balance) if moa.routed else None
        self.wait = DataWait()
        classes = len(parts.index.classes)
        self.utilisation = image_utilisation(self.config, device, classes, world.size)
        self.live: Live | None = None

    def __enter__(self) -> "Monitor":
        """Starts the live display if there is a terminal that can move its cursor."""
        if self.console.is_terminal and os.environ.get("TERM") != "dumb":
            self.live = Live(self.standing, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Ends the live display and flushes TensorBoard."""
        self.standing.phase = "finished" if kind is None else "stopped"
        if self.live is not None:
            self.live.stop()
        self.curves.close(whole=kind is None)

    def step(self, row: Mapping[str, float], perf: Mapping[str, float]) -> None:
        """Notes one step: its `metrics.jsonl` row, and `img_s`, `step_ms`, `data_wait_ms`.

        The latter are left out where they would tell of something else.
        """
        step = int(row["step"])
        peak = peak_gib(self.device)
        points = {"mem/peak_gib": peak} | {f"perf/{name}": value for name, value in perf.items()}
        if perf and self.utilisation is not None:
            points["perf/mfu"] = self.utilisation * perf["img_s"]
        for name, value in row.items():
            if name in ("loss", "ce", "aux_loss", "penalty", "lr", "grad_norm", "skipped_steps"):
                points[f"train/{name}"] = value
            elif name.startswith("moa/bad/"):
                points[f"data/bad/{name.removeprefix('moa/bad/')}"] = value
        self.curves.scalars(points, step)
        standing = self.standing
        standing.done, standing.row = step + 1, row
        standing.img_s = perf.get("img_s", standing.img_s)
        standing.peak_gib, standing.phase = peak, "training"
        if (
            perf and step > standing.first_step
        ):  # the first step of a start waits for the loaders to start
            if self.wait.note(perf["data_wait_ms"], perf["step_ms"]):
                cores = len(os.sched_getaffinity(0))
                log.warning("%s", hint(self.wait.share, self.config, cores))
            standing.wait_share = self.wait.share
        if self.live is None and (step % self.every == 0 or step + 1 == standing.total):
            log.info("%s", plain_line(standing))

    def evaluating(self) -> None:
        """Says that an evaluation has begun."""
        self.standing.phase = "evaluating"

    def evaluation(
        self,
        step: int,
        by_domain: ByDomain,
        selected: tuple[float, float | None],
        averages: Mapping[str, ByDomain],
    ) -> None:
        """Notes an evaluation; `--eval.mode selection` gives few accuracies before the end.

        Args:
            step: the step evaluated.
            by_domain: accuracies.
            selected: validation accuracy and held-out accuracy of the adapter selected so far.
            averages: accuracies of each average of the weights, by its name.
        """
        points = tagged("eval", by_domain)
        for name, found in averages.items():
            points |= tagged(f"average/{name}", found)
        sources = [
            splits["out"]
            for domain, splits in by_domain.items()
            if domain not in self.standing.withheld and "out" in splits
        ]
        if sources:
            points[MEAN_OUT] = sum(sources) / len(sources)
        points[VALIDATION], target = selected
        if target is not None:
            points[TARGET] = target
        self.curves.scalars(points, step)
        self.standing.accuracies, self.standing.evaluated = by_domain, step
        log.info("%s", evaluation_line(step, by_domain))

    def pages(self, step: int, insight: "Insight", seen: "Seen", best: bool) -> None:
        """Adds the pages of an evaluation; `best` if its adapter is the best so far."""
        from trainer.monitor.pages import Pages

        ranks = self.config.moa.ranks or ()
        Pages(self.curves, insight, ranks, self.folder.routing).add(step, seen, best)

    def routing(self, step: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Notes the routers' state; one transfer from the device for all of it."""
        if not stats:
            return
        numbers = on_host(stats)
        dead = sum(values["load"].count(0.0) for values in numbers.values())
        points = {"router/dead_experts": float(dead)}
        for layer, values in numbers.items():
            points |= {f"router/{layer}/load_{e}": share for e, share in enumerate(values["load"])}
            for name in ("entropy", "max_prob", "temperature"):
                if name in values:
                    points[f"router/{layer}/{name}"] = values[name][0]
        if self.health is not None:
            for warning in self.health.note(numbers):
                log.warning("%s", warning)
                self.curves.writer.add_text("router/warnings", warning, step)
            points["router/active_warnings"] = float(len(self.health.active))
        self.curves.scalars(points, step)


def tagged(start: str, by_domain: ByDomain) -> dict[str, float]:
    """Points of curves, one for each domain and split."""
    return {
        f"{start}/{domain}/{split}_acc": value
        for domain, splits in by_domain.items()
        for split, value in splits.items()
    }


def on_host(stats: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """The numbers of some tensors as lists, fetched from the device at once."""
    tensors = [value.reshape(-1).float() for values in stats.values() for value in values.values()]
    fetched = iter(torch.cat(tensors).tolist())
    return {
        layer: {name: list(islice(fetched, value.numel())) for name, value in values.items()}
        for layer, values in stats.items()
    }
