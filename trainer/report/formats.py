"""Tables and comparisons as text, Markdown, LaTeX and plain data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from trainer.report.scores import Score
from trainer.report.significance import Comparison
from trainer.report.tables import Cell, ResultTable

MISSING = "-"
COMPARISON_COLUMNS = (
    "method", "against", "difference", "pairs", "better in", "p", "p (Holm)", "p by domain",
)  # fmt: skip


def cell_text(cell: Cell, repetitions: int, plus_minus: str = " ± ") -> str:
    """`63.8 ± 0.5`, with a note where repetitions are missing or unfinished.

    Args:
        cell: the entry.
        repetitions: how many the table's fullest cell has.
        plus_minus: what stands between mean and error.
    """
    if cell.mean is None:
        return f"{MISSING} ({cell.unfinished} unfinished)" if cell.unfinished else MISSING
    text = f"{100 * cell.mean:.1f}"
    if cell.error is not None:
        text += f"{plus_minus}{100 * cell.error:.1f}"
    if cell.values and len(cell.values) < repetitions:
        text += f" ({len(cell.values)} of {repetitions})"
    return text


def _entries(
    table: ResultTable, bold: Callable[[str], str], plus_minus: str = " ± "
) -> Iterable[tuple[str, list[str]]]:
    """Row labels and formatted cells, the best of a column through `bold`."""
    best, repetitions = table.best(), table.repetitions()
    several = len(table.lines) > 1
    for label, cells in table.lines.items():
        texts = [cell_text(cell, repetitions, plus_minus) for cell in cells]
        yield (
            label,
            [bold(t) if several and (label, n) in best else t for n, t in enumerate(texts)],
        )


def text_table(table: ResultTable, styled: bool) -> Table:
    """For a console; where it shows no bold, an asterisk marks the best."""
    result = Table("held out", *map(escape, table.columns), title=escape(table.title))
    for label, cells in _entries(table, lambda t: f"[bold]{t}[/bold]" if styled else f"{t} *"):
        result.add_row(escape(label), *cells)
    return result


def markdown_table(table: ResultTable) -> str:
    """A Markdown table, its title above it."""
    rows = [["held out", *table.columns], ["---"] * (len(table.columns) + 1)]
    rows += [[f"`{label}`", *cells] for label, cells in _entries(table, lambda t: f"**{t}**")]
    return f"{table.title}\n\n{_markdown(rows)}"


def latex_table(table: ResultTable) -> str:
    r"""A `table` environment; needs `\usepackage{booktabs}`."""
    rows = [
        f"{latex(label)} & {' & '.join(cells)} \\\\"
        for label, cells in _entries(table, lambda t: rf"\textbf{{{t}}}", r" $\pm$ ")
    ]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(table.title)}}}",
            rf"\label{{tab:{table.name.replace('_', '-')}}}",
            rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(["held out", *map(latex, table.columns)]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def latex(text: str) -> str:
    """The text with LaTeX's special characters escaped."""
    return "".join(LATEX_SPECIAL.get(letter, letter) for letter in text)


def _comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    return [
        [
            c.method, c.baseline, f"{100 * c.difference:+.2f}", str(c.pairs), str(c.better),
            _p(c.p_pairs), _p(c.p_adjusted), _p(c.p_domains),
        ]
        for c in comparisons
    ]  # fmt: skip


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


COMPARISON_TITLE = "paired differences in points, two-sided sign-flip tests"


def text_comparisons(comparisons: Sequence[Comparison]) -> Table:
    """For a console."""
    table = Table(*COMPARISON_COLUMNS, title=COMPARISON_TITLE)
    for row in _comparison_rows(comparisons):
        table.add_row(*map(escape, row))
    return table


def markdown_comparisons(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table."""
    rows = [list(COMPARISON_COLUMNS), ["---"] * len(COMPARISON_COLUMNS)]
    rows += [[f"`{a}`", f"`{b}`", *rest] for a, b, *rest in _comparison_rows(comparisons)]
    return f"{COMPARISON_TITLE}\n\n{_markdown(rows)}"


def latex_comparisons(comparisons: Sequence[Comparison]) -> str:
    """A LaTeX table."""
    rows = [
        " & ".join([latex(a), latex(b), *(f"${text}$" for text in rest)]) + r" \\"
        for a, b, *rest in _comparison_rows(comparisons)
    ]
    columns = "ll" + "r" * (len(COMPARISON_COLUMNS) - 2)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(COMPARISON_TITLE)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(latex, COMPARISON_COLUMNS)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table_data(table: ResultTable) -> dict[str, Any]:
    """The table for JSON, unrounded and in [0, 1]."""
    best = table.best()
    return {
        "title": table.title,
        "name": table.name,
        "columns": list(table.columns),
        "rows": [
            {
                "label": label,
                "cells": [
                    {
                        "mean": cell.mean,
                        "error": cell.error,
                        "repetitions": len(cell.values),
                        "unfinished": cell.unfinished,
                        "best": (label, number) in best,
                    }
                    for number, cell in enumerate(cells)
                ],
            }
            for label, cells in table.lines.items()
        ],
    }


def score_data(score: Score) -> dict[str, Any]:
    """A run and what the rule picked in it, for JSON."""
    run, choice = score.run, score.choice
    return {
        "folder": str(run.folder),
        "dataset": run.dataset,
        "label": score.label,
        "held_out": [run.domains[env] for env in run.held_out],
        "seed": run.seeds[0],
        "trial_seed": run.seeds[1],
        "data_hash": run.data,
        "split_hash": run.split,
        "finished": run.finished,
        "step": choice and choice.step,
        "validation": choice and choice.validation,
        "accuracy": choice and choice.accuracy,
    }
