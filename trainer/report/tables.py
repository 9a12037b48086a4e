"""From scores to results: mean and standard error per cell, averages, the best of each column.

The conventions are DomainBed's: mean over repetitions, error = population standard deviation /
sqrt(repetitions), averages of unrounded means.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

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
        name: dataset, or `averages`; names its files.
        columns: their titles.
        lines: cells by row label.
    """

    title: str
    name: str
    columns: tuple[str, ...]
    lines: Mapping[str, tuple[Cell, ...]]

    def best(self) -> set[tuple[int, int]]:
        """(row, column) of the highest unrounded means of each column."""
        found = set()
        for column, cells in enumerate(zip(*self.lines.values(), strict=True)):
            top = max((cell.mean for cell in cells if cell.mean is not None), default=inf)
            found |= {(row, column) for row, cell in enumerate(cells) if cell.mean == top}
        return found

    def repetitions(self) -> int:
        """The largest number of repetitions in a cell."""
        return max((len(c.values) for cells in self.lines.values() for c in cells), default=0)


def mean_and_error(values: Collection[float]) -> tuple[float, float]:
    """Mean, and DomainBed's error: population standard deviation / sqrt(number of values)."""
    return statistics.fmean(values), statistics.pstdev(values) / len(values) ** 0.5


def cell_of(values: Mapping[Seeds, float], unfinished: int = 0) -> Cell:
    """A cell from the accuracies of its repetitions."""
    if not values:
        return Cell(unfinished=unfinished)
    mean, error = mean_and_error(values.values())
    return Cell(values, mean, error if len(values) > 1 else None, unfinished)


def mean_of(cells: Sequence[Cell]) -> float | None:
    """The plain mean of unrounded means; None if one of them is missing."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    return statistics.fmean(means) if len(means) == len(cells) else None


def average(cells: Sequence[Cell]) -> Cell:
    """`mean_of` some cells; if all have the same repetitions, with an error.

    Then `values` holds each repetition's own mean, and the error is taken over those.
    """
    mean = mean_of(cells)
    repetitions = {frozenset(cell.values) for cell in cells}
    if mean is None or len(repetitions) > 1 or not cells[0].values:
        return Cell(mean=mean)
    by_repetition = {s: statistics.fmean(c.values[s] for c in cells) for s in cells[0].values}
    return Cell(by_repetition, mean, cell_of(by_repetition).error)


def dataset_table(scored: Sequence[Score], title: str, name: str) -> ResultTable:
    """Rows against held-out domains, all scores being of one dataset.

    All domains of the dataset get a column, and an empty cell where there is no run.
    """
    domains = scored[0].run.domains
    lines = {}
    for label in dict.fromkeys(score.label for score in scored):
        cells = []
        for env in range(len(domains)):
            here = [s for s in scored if s.label == label and s.run.held_out == (env,)]
            values = {s.run.seeds: s.result for s in here if s.result is not None}
            cells.append(cell_of(values, sum(not s.run.finished for s in here)))
        lines[label] = (*cells, average(cells))
    return ResultTable(title, name, (*domains, AVERAGE), lines)


def averages_table(
    tables: Sequence[ResultTable], datasets: Sequence[str], title: str, name: str
) -> ResultTable:
    """Rows against datasets: each dataset's average over its held-out domains.

    As in DomainBed, a dataset's entry is the mean over domains within each repetition, then over
    repetitions, and the last column the plain mean over datasets.
    """
    lines = {}
    for label in dict.fromkeys(label for table in tables for label in table.lines):
        cells = [table.lines[label][-1] if label in table.lines else Cell() for table in tables]
        lines[label] = (*cells, Cell(mean=mean_of(cells)))
    return ResultTable(title, name, (*datasets, AVERAGE), lines)
