"""Results and comparisons as tables for people, and as plain data."""

from collections.abc import Sequence
from typing import Any

from trainer.process.tables import Table
from trainer.report.scores import Score
from trainer.report.significance import Comparison
from trainer.report.tables import Cell, ResultTable


def cell_text(cell: Cell, repetitions: int) -> str:
    """`63.8 ± 0.5`, with a note where some of the table's `repetitions` are missing."""
    if cell.mean is None:
        return f"- ({cell.unfinished} unfinished)" if cell.unfinished else "-"
    text = f"{100 * cell.mean:.1f}"
    if cell.error is not None:
        text += f" ± {100 * cell.error:.1f}"
    if cell.values and len(cell.values) < repetitions:
        text += f" ({len(cell.values)} of {repetitions})"
    return text


def result_table(found: ResultTable) -> Table:
    """The best of each column stands out, if there are several rows."""
    repetitions = found.repetitions()
    return Table(
        ("held out", *found.columns),
        [[label, *(cell_text(c, repetitions) for c in row)] for label, row in found.lines.items()],
        found.title,
        align="lc",
        bold={(row, 1 + column) for row, column in found.best() if len(found.lines) > 1},
        mark=" *",
        names=1,
    )


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row for each comparison."""
    columns = (
        "method", "against", "difference", "pairs", "better in", "p", "p (Holm)", "p by domain",
    )  # fmt: skip
    rows = [
        [
            c.method, c.baseline, f"{100 * c.difference:+.2f}", str(c.pairs), str(c.better),
            _p(c.p_pairs), _p(c.p_adjusted), _p(c.p_domains),
        ]
        for c in comparisons
    ]  # fmt: skip
    title = "paired differences in points, two-sided sign-flip tests"
    return Table(columns, rows, title, align="llr", names=2)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def table_data(found: ResultTable) -> dict[str, Any]:
    """The table for JSON, unrounded and in [0, 1]."""
    best, rows = found.best(), []
    for row, (label, line) in enumerate(found.lines.items()):
        cells = [
            {
                "mean": cell.mean, "error": cell.error, "repetitions": len(cell.values),
                "unfinished": cell.unfinished, "best": (row, column) in best,
            }
            for column, cell in enumerate(line)
        ]  # fmt: skip
        rows.append({"label": label, "cells": cells})
    return {
        "title": found.title, "name": found.name, "columns": list(found.columns), "rows": rows
    }  # fmt: skip


def score_data(score: Score) -> dict[str, Any]:
    """A run and what the rule picked in it, for JSON."""
    run, choice = score.run, score.choice
    return {
        "folder": str(run.folder), "dataset": run.dataset, "label": score.label,
        "held_out": [run.domains[env] for env in run.held_out],
        "seed": run.seeds[0], "trial_seed": run.seeds[1],
        "data_hash": run.data, "split_hash": run.split, "finished": run.finished,
        "step": choice and choice.step, "validation": choice and choice.validation,
        "accuracy": choice and choice.accuracy, "class_mean": choice and choice.class_mean,
    }  # fmt: skip
