"""From scores to tables: mean and standard error per cell, averages, the best of each column.

The conventions are DomainBed's: mean over repetitions, error = population standard deviation /
sqrt(repetitions), averages of unrounded means.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.report.runs import Seeds
from trainer.report.scores import Score

AVERAGE = "mean"


@dataclass(frozen=True)
class Cell:
    """One entry of a table; accuracies in [0, 1].

    Attributes:
        values: accuracy by repetition.
        mean: their mean, or for an average that of other cells; None if something is missing.
        error: standard error; None where there are no repetitions to take it from.
        unfinished: runs of this cell that are not finished.
    """

    values: Mapping[Seeds, float] = field(default_factory=dict)
    mean: float | None = None
    error: float | None = None
    unfinished: int = 0


@dataclass(frozen=True)
class ResultTable:
    """Rows by label, each with one cell per column; the last column is the average.

    Attributes:
        title: what it shows.
        name: dataset, or `averages`; names its files.
        columns: titles.
        lines: cells by row label.
    """

    title: str
    name: str
    columns: tuple[str, ...]
    lines: Mapping[str, tuple[Cell, ...]]

    def best(self) -> set[tuple[str, int]]:
        """(row label, column number) of the highest unrounded mean of every column."""
        found = set()
        for number in range(len(self.columns)):
            known = {
                label: cells[number].mean
                for label, cells in self.lines.items()
                if cells[number].mean is not None
            }
            top = max((mean for mean in known.values() if mean is not None), default=None)
            found |= {(label, number) for label, mean in known.items() if mean == top}
        return found

    def repetitions(self) -> int:
        """The largest number of repetitions in a cell."""
        return max((len(c.values) for cells in self.lines.values() for c in cells), default=0)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and DomainBed's error: population standard deviation / sqrt(number of values)."""
    return statistics.fmean(values), statistics.pstdev(values) / len(values) ** 0.5


def cell_of(values: Mapping[Seeds, float], unfinished: int = 0) -> Cell:
    """A cell from the accuracies of its repetitions."""
    if not values:
        return Cell(unfinished=unfinished)
    mean, error = mean_and_error(list(values.values()))
    return Cell(values, mean, error if len(values) > 1 else None, unfinished)


def average(cells: Sequence[Cell]) -> Cell:
    """The plain mean of unrounded means; missing if one of them is.

    If all cells have the same repetitions, `values` holds each repetition's own mean, and the error
    is taken over those.
    """
    means = [cell.mean for cell in cells if cell.mean is not None]
    if not means or len(means) < len(cells):
        return Cell()
    repetitions = {frozenset(cell.values) for cell in cells}
    if len(repetitions) > 1 or not cells[0].values:
        return Cell(mean=statistics.fmean(means))
    by_repetition = {
        seeds: statistics.fmean(cell.values[seeds] for cell in cells) for seeds in cells[0].values
    }
    error = cell_of(by_repetition).error
    return Cell(by_repetition, statistics.fmean(means), error)


def dataset_table(scored: Iterable[Score], title: str, name: str) -> ResultTable:
    """Rows against held-out domains, all scores being of one dataset.

    All domains of the dataset get a column, and an empty cell where there is no run.
    """
    scored = list(scored)
    domains = scored[0].run.domains
    labels = dict.fromkeys(score.label for score in scored)
    lines = {}
    for label in labels:
        cells = [
            _cell([s for s in scored if s.label == label and s.run.held_out == (env,)])
            for env in range(len(domains))
        ]
        lines[label] = (*cells, average(cells))
    return ResultTable(title, name, (*domains, AVERAGE), lines)


def _cell(scored: Sequence[Score]) -> Cell:
    values = {s.run.seeds: s.choice.accuracy for s in scored if s.choice is not None}
    return cell_of(values, sum(not s.run.finished for s in scored))


def averages_table(
    tables: Sequence[ResultTable], datasets: Sequence[str], title: str, suffix: str = ""
) -> ResultTable:
    """Rows against datasets: each dataset's average over its held-out domains.

    As in DomainBed, a dataset's entry is the mean over domains within each repetition, then over
    repetitions, and the last column the plain mean over datasets.
    """
    labels = dict.fromkeys(label for table in tables for label in table.lines)
    lines = {}
    for label in labels:
        cells = [table.lines[label][-1] if label in table.lines else Cell() for table in tables]
        means = [cell.mean for cell in cells if cell.mean is not None]
        overall = statistics.fmean(means) if len(means) == len(cells) else None
        lines[label] = (*cells, Cell(mean=overall))
    return ResultTable(title, f"averages{suffix}", (*datasets, AVERAGE), lines)
