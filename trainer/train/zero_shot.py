"""Accuracy of a classifier made from text before any training, in a file of its own.

It is no row of `results.jsonl`: selection, ours as DomainBed's, would take it for a trained step.
"""

import json
import logging
from dataclasses import replace
from functools import partial

from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.run_folder import ZERO_SHOT, RunFolder
from trainer.engine.engine import Engine
from trainer.evaluate.evaluator import Evaluator, accuracies
from trainer.evaluate.selection import validation_accuracy
from trainer.prepare.parts import Parts
from trainer.process.watchdog import EVALUATING, Watchdog
from trainer.process.world import World
from trainer.train.result_row import result_row

log = logging.getLogger(__name__)


def evaluate_zero_shot(
    parts: Parts,
    world: World,
    engine: Engine,
    evaluator: Evaluator,
    folder: RunFolder,
    watch: Watchdog,
) -> None:
    """Evaluates all domains and writes `zero_shot.json`; a collective.

    LoRA experts add nothing yet, Kronecker experts next to nothing. It belongs to the start of a
    run: a signal ends it at once, and the same command starts again.

    Args:
        parts: the run.
        world: this process.
        engine: holds the model that is about to be trained.
        evaluator: counts correct predictions on all domains.
        folder: the run's files.
        watch: notes where this rank is.
    """
    alive = partial(watch.note, EVALUATING)
    columns = accuracies(replace(evaluator, pause=alive)(engine.ds))
    if world.is_main:
        row = result_row(parts, folder.path, 0, columns)
        replace_text(folder.path / ZERO_SHOT, json.dumps(row) + "\n")
        log.info(
            "zero-shot, before training: %.3f on held-out %s, %.3f in validation",
            columns[f"env{parts.held_out}_in_acc"], parts.held_out_name,
            validation_accuracy(row, parts.withheld),
        )  # fmt: skip
