"""What monitoring costs: steps and evaluations of the embedded run with it and without, in turns.

Its model is the smallest there is, so a step is short and the share of monitoring the largest.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

import moa
from shards import Batch, finish_images
from trainer.bench.timing import Table, Work, interleaved
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.command_line import parse
from trainer.evaluate.evaluator import Evaluator
from trainer.monitor.insight import Insight
from trainer.monitor.monitor import Monitor
from trainer.prepare.parts import Parts, build
from trainer.process.world import ALONE

CPU = torch.device("cpu")


def measure(rounds: int) -> dict[str, Table]:
    """Steps between two router notes, and an evaluation, each with monitoring and without."""
    with tempfile.TemporaryDirectory(prefix="bench-monitor-") as name:
        parts, folder = build(parse([]), ALONE), RunFolder(Path(name))
        # A file of our own, so that a terminal does not draw in between.
        console = Console(file=(Path(name) / "console.txt").open("w", encoding="utf-8"))
        with Monitor(parts, folder, ALONE, CPU, 0, console) as monitor:
            steps = interleaved(_steps(parts, monitor), rounds, CPU)
            evaluations = interleaved(_evaluations(parts, monitor), max(2, rounds // 2), CPU)
        console.file.close()
    size = parts.stream.global_batch
    return {
        f"monitoring, {monitor.every} steps of {size} images, embedded backbone": steps,
        "monitoring, one evaluation of the embedded data with all pages": evaluations,
    }


def _steps(parts: Parts, monitor: Monitor) -> dict[str, Work]:
    model = parts.model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = next(iter(parts.stream.loader(0, 1, 0, 1)))
    number = itertools.count()

    def step() -> dict[str, float]:
        loss, aux = _loss(model, parts, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss + aux)
        optimizer.step()
        numbers = torch.stack([loss + aux, loss, aux]).detach().tolist()
        row: dict[str, Any] = dict(zip(("loss", "ce", "aux_loss"), numbers, strict=True))
        return row | {"lr": 1e-3, "grad_norm": 1.0}

    def without() -> None:
        for _ in range(monitor.every):
            step()

    def noted(row: dict[str, float]) -> None:
        place = next(number)
        monitor.step(row | {"step": place}, {"img_s": 1.0, "step_ms": 100.0, "data_wait_ms": 1.0})
        if place % monitor.every == 0:
            monitor.routing(place, moa.routing_stats(model))

    def monitored() -> None:
        for _ in range(monitor.every):
            noted(step())

    def alone() -> None:  # the share itself, where noise hides a difference of two long times
        row = {name: 1.0 for name in ("loss", "ce", "aux_loss", "lr", "grad_norm")}
        for _ in range(monitor.every):
            noted(row)

    return {
        "without": without,
        "with curves, router notes and console": monitored,
        "these alone": alone,
    }


def _loss(model: torch.nn.Module, parts: Parts, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    scores = model(finish_images(batch, CPU, parts.info.data_config))
    return F.cross_entropy(scores, batch.labels), moa.aux_loss(model)


def _evaluations(parts: Parts, monitor: Monitor) -> dict[str, Work]:
    train, data = parts.config.train, parts.config.data
    evaluator = Evaluator(
        index=parts.index, data_config=parts.info.data_config, trial_seed=train.trial_seed,
        holdout_fraction=data.holdout_fraction, batch_size=train.eval_batch, workers=0, world=ALONE,
        device=CPU, dtype=torch.float32, sum_over_ranks=lambda counts: counts,
    )  # fmt: skip
    insight = Insight(evaluator, parts.model, parts.withheld, last=-1)
    number = itertools.count()

    def watched() -> None:
        step = next(number)
        with insight.watching(parts.model, step) as seen:
            seen.evaluator(parts.model)
        monitor.pages(step, insight, seen, best=True)

    return {"without": lambda: evaluator(parts.model), "watched, pages drawn": watched}
