"""`Validation`: what is evaluated when, which adapter is the best, and which rows tell of it."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from moa.files.saving import save_adapter
from trainer.checkpoint.atomic_file import replace_text
from trainer.checkpoint.run_folder import ZERO_SHOT, RunFolder, read_rows
from trainer.engine.averaging import Averages
from trainer.engine.collectives import from_main
from trainer.engine.engine import Engine
from trainer.evaluate.evaluator import SPLITS, DomainSplit, Evaluator, accuracies
from trainer.evaluate.selection import columns_of, training_domain_validation, validation_accuracy
from trainer.monitor.insight import Insight
from trainer.monitor.monitor import Monitor
from trainer.prepare.parts import Parts
from trainer.process.world import World
from trainer.train.best import Best, Candidate, write_best
from trainer.train.result_row import card_figures, result_row

log = logging.getLogger(__name__)


class Validation:
    """Evaluates a run, keeps its best adapter by source validation, and writes the rows.

    With `--eval.mode full` each evaluation leaves a complete row in `results.jsonl`. With
    `selection` it leaves the sources' `out` accuracies in `evaluations.jsonl`, and at the end two
    of these rows are completed in `results.jsonl`: the selected adapter's and the last one's. A
    rule that looks at the sources' `out` splits selects the same step from either file. The
    averages are evaluated beside the adapter in training.
    """

    def __init__(
        self,
        parts: Parts,
        engine: Engine,
        evaluator: Evaluator,
        folder: RunFolder,
        best: Best,
        averages: Averages,
    ) -> None:
        self.parts, self.config = parts, parts.config
        self.engine, self.evaluator, self.folder, self.best = engine, evaluator, folder, best
        self.averages = averages
        self.closes = self.config.eval.mode == "selection"
        last = self.config.train.steps - 1
        self.insight = Insight(evaluator, engine.module, parts.withheld, last)

    def _cells(self) -> list[DomainSplit]:
        """What an evaluation looks at while the run trains."""
        cells = self.evaluator.domain_splits()
        return list(filter(self._validates, cells)) if self.closes else cells

    def _validates(self, cell: DomainSplit) -> bool:
        """Whether it is a source's `out` split."""
        domain, split = cell
        return split == "out" and domain not in self.parts.withheld

    def evaluate(self, step: int, monitor: Monitor | None, columns: Mapping[str, float]) -> None:
        """Evaluates after `step`, and keeps the adapter if it is the best; a collective.

        The main rank has a monitor, and writes a row with these `columns`, too.

        Raises `EvaluationBrokenOff`: the ranks agreed to stop; nothing of it is kept.
        """
        if monitor is not None:
            monitor.evaluating()
        cells = self._cells()
        with self.insight.watching(self.engine.model, step) as seen:
            counts, losses = seen.evaluator.with_losses(self.engine.model, cells)
        regular = step % self.config.train.eval_every == 0
        averages = self.averages.after(self._loss(losses), regular)
        found = accuracies(counts) | self._of_averages(averages, cells)
        self.averages = averages
        row = result_row(self.parts, self.folder.path, step, {**found, **columns})
        validation = validation_accuracy(row, self.parts.withheld)
        if better := self.best.is_beaten_by(validation):
            masters = self.engine.masters()
            best = Candidate(step, validation, card_figures(row), masters if monitor else {})
            self.best.put(best, self.config.train.eval_every)
        if monitor is None:
            return
        self.folder.append(self.folder.evaluations if self.closes else self.folder.results, row)
        self._show(step, found, monitor)
        if better:
            write_best(self.folder.adapter, self.parts.info, self.best)
        monitor.pages(step, self.insight, seen, better)

    def close(self, last: int, monitor: Monitor | None) -> None:
        """Completes the rows of the selected and the last adapter where that is due; a collective.

        What an earlier start has completed stays.

        Raises `EvaluationBrokenOff`: the ranks agreed to stop; whole rows are kept.
        """
        selected, results = self.best.current, self.folder.results
        if not self.closes or selected is None:
            return
        missing = dict.fromkeys((selected.step, last))
        if monitor is not None and results.exists():
            for complete in read_rows(results):
                missing.pop(complete["step"], None)
        cells = [cell for cell in self.evaluator.domain_splits() if cell not in self._cells()]
        for step in from_main(list(missing)):
            own = step == last
            held = nullcontext() if own else self.engine.holding(from_main(selected.tensors))
            with held, self.insight.watching(self.engine.model, step) as seen:
                found = accuracies(seen.evaluator(self.engine.model, cells))
            if own:
                found |= self._of_averages(self.averages, cells)
            if monitor is not None:
                rows = {row["step"]: row for row in read_rows(self.folder.evaluations)}
                row = rows[step] | found
                self.folder.append(results, row)
                self._show(step, row, monitor)
                monitor.pages(step, self.insight, seen, step == selected.step)
        if monitor is not None:  # the model card learns of all accuracies
            best = training_domain_validation(read_rows(results), self.parts.withheld)
            card = Best(replace(selected, results=card_figures(best)))
            write_best(self.folder.adapter, self.parts.info, card)

    def save_last(self, is_main: bool) -> None:
        """Writes the last adapter and the averages into folders of their own; a collective."""
        found = {"last": self.engine.masters(), **self.averages.whole()}
        if is_main:
            row = read_rows(self.folder.results)[-1]
            for name, values in found.items():
                info = replace(self.parts.info, results=card_figures(row, name))
                folder = self.folder.path / f"adapter-{name}"
                save_adapter(self.engine.module, folder, info, values)

    def _loss(self, losses: Mapping[DomainSplit, float]) -> float:
        """The unweighted mean loss of the sources' `out` splits; a collective."""
        found = [loss for cell, loss in losses.items() if self._validates(cell)]
        # From one rank: the others' sums may differ in the last bit, and a valley with it.
        return from_main(sum(found) / len(found)) if found else 0.0

    def _of_averages(self, averages: Averages, cells: Sequence[DomainSplit]) -> dict[str, float]:
        """Accuracies of each average, in the model's place for a while: `moa/ema/env0_in_acc`."""
        found = {}
        for name, values in averages.whole().items():
            with self.engine.holding(values):
                columns = accuracies(self.evaluator(self.engine.model, cells))
            for key, value in columns.items():
                found[f"moa/{name}/{key.removeprefix('moa/')}"] = value
        return found

    def _show(self, step: int, found: Mapping[str, float], monitor: Monitor) -> None:
        withheld, results = self.parts.withheld, self.folder.results
        rows = read_rows(results) if results.exists() else []  # cut back, it may be empty
        selected = training_domain_validation(rows or read_rows(self.folder.evaluations), withheld)
        target = selected.get(f"env{self.parts.held_out}_in_acc")
        chosen = (validation_accuracy(selected, withheld), target)
        averages = {
            name: self._by_domain(columns_of(name, found)) for name in self.config.average.names
        }
        monitor.evaluation(step, self._by_domain(found), chosen, averages)

    def _by_domain(self, found: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Accuracies by the domain's name and split, as far as they were found."""
        result = {
            name: {s: found[key] for s in SPLITS if (key := f"env{domain}_{s}_acc") in found}
            for domain, name in enumerate(self.parts.index.domains)
        }
        return {name: splits for name, splits in result.items() if splits}


def evaluate_zero_shot(
    parts: Parts, world: World, engine: Engine, evaluator: Evaluator, folder: RunFolder
) -> None:
    """Writes the accuracies of a classifier made from text, before any training; a collective.

    LoRA experts add nothing yet, Kronecker experts next to nothing. The file is `zero_shot.json`,
    not `results.jsonl`: selection, ours as DomainBed's, would take the row for a trained step.
    """
    columns = accuracies(evaluator(engine.model))
    if world.is_main:
        row = result_row(parts, folder.path, 0, columns)
        replace_text(folder.path / ZERO_SHOT, json.dumps(row) + "\n")
        log.info(
            "zero-shot, before training: %.3f on held-out %s, %.3f in validation",
            columns[f"env{parts.held_out}_in_acc"], parts.withheld_names[0],
            validation_accuracy(row, parts.withheld),
        )  # fmt: skip
