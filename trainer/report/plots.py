"""Pictures of a report: tables as bars with standard errors, and curves of the runs."""

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluate.drawing import label, literally
from trainer.process.errors import cannot_write
from trainer.report.tables import ResultTable

FORMATS: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}}
"""Kinds of files and their metadata: no date, so that the same numbers give the same file."""
STYLES = ("-", "--", ":", "-.")
"""Of lines; the next where ten colours are used up."""
MOST_DOMAINS = 24
"""Rows of panels in a figure of curves."""


class Lines(NamedTuple):
    """A run's curves as (step, value), to be coloured by the row of the tables it is in."""

    row: str
    loss: Sequence[tuple[int, float]]
    validation: Sequence[tuple[int, float]]


@literally
def save_plots(tables: Iterable[ResultTable], folder: Path) -> list[Path]:
    """Writes `NAME.png` and `NAME.svg` for every table that has a number.

    `OutputError` if the folder cannot be written.
    """
    written = []
    for table in tables:
        if not has_numbers(table):
            continue
        figure = bars_figure(table)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for kind, metadata in FORMATS.items():
                written.append(folder / f"{table.name}.{kind}")
                with rc_context({"svg.hashsalt": "moa-trainer", "svg.fonttype": "none"}):
                    figure.savefig(written[-1], dpi=150, metadata=metadata)
        except OSError as error:
            raise cannot_write("--plots", folder, error) from error
    return written


def has_numbers(table: ResultTable) -> bool:
    """Whether there is anything to draw."""
    return any(cell.mean is not None for cells in table.lines.values() for cell in cells)


@literally
def bars_figure(table: ResultTable, most: float = 18.0) -> Figure:
    """The table as bars, at most so many inches wide."""
    width = 2.0 + (0.28 * len(table.lines) + 0.3) * len(table.columns)
    figure = Figure(figsize=(min(max(width, 6.0), most), 4.2), layout="constrained")
    _bars(figure.subplots(), table)
    return figure


@literally
def curves_figure(by_domain: Mapping[str, Sequence[Lines]], title: str) -> Figure:
    """Loss and validation accuracy over the steps: a row of panels for each held-out domain."""
    domains = list(by_domain)[:MOST_DOMAINS]
    rows = list(dict.fromkeys(lines.row for domain in domains for lines in by_domain[domain]))
    size = (11.0, 0.9 + 2.1 * len(domains))
    figure = Figure(figsize=size, dpi=90, layout="constrained")
    panels = figure.subplots(len(domains), 2, squeeze=False, sharex=True, sharey="col")
    shown = {}
    for domain, (left, right) in zip(domains, panels, strict=True):
        for lines in by_domain[domain]:
            place = rows.index(lines.row)
            style = {
                "color": f"C{place % 10}", "linestyle": STYLES[place // 10 % len(STYLES)],
                "linewidth": 0.9, "alpha": 0.8,
            }  # fmt: skip
            for axes, points, scale in ((left, lines.loss, 1), (right, lines.validation, 100)):
                steps, values = [s for s, _ in points], [scale * v for _, v in points]
                (shown[lines.row],) = axes.plot(steps, values, **style)
        left.set_ylabel(label(domain), fontsize=9)
    for axes, what in zip(panels[0], ("loss", "validation accuracy %"), strict=True):
        axes.set_title(f"{label(title)}: {what}", fontsize=10)
    for axes in panels.flat:
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.tick_params(labelsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=9)
    legend = figure.legend(
        shown.values(), [label(row) for row in shown], loc="outside lower center",
        ncols=min(5, len(shown)), fontsize=8, frameon=False,
    )  # fmt: skip
    for line in legend.get_lines():
        line.set_linewidth(3)
    return figure


def _bars(axes: Axes, table: ResultTable) -> None:
    """One group of bars per column; no bar where a number is missing."""
    share = 0.8 / len(table.lines)
    highest = 0.0
    for place, (row, cells) in enumerate(table.lines.items()):
        known = [(n, c.mean, c.error) for n, c in enumerate(cells) if c.mean is not None]
        highest = max([highest, *(100 * (mean + (error or 0)) for _, mean, error in known)])
        axes.bar(
            [n - 0.4 + (place + 0.5) * share for n, _, _ in known],
            [100 * mean for _, mean, _ in known], width=0.92 * share,
            yerr=[nan if error is None else 100 * error for _, _, error in known],
            error_kw={"capsize": 2, "elinewidth": 1, "ecolor": "#333333"},
            label=row, color=f"C{place % 10}", hatch="//" if place >= 10 else None,
        )  # fmt: skip
    axes.axvline(len(table.columns) - 1.5, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(table.columns)), table.columns)
    axes.set_xlim(-0.6, len(table.columns) - 0.4)
    # Bars start at zero, or their lengths would lie about ratios.
    axes.set_ylim(0, min(100.0, 1.08 * highest) if highest else 1.0)
    axes.set_ylabel("%")
    axes.set_title(table.title, fontsize=10)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.legend(ncols=min(5, len(table.lines)), fontsize=8, loc="upper center",
                bbox_to_anchor=(0.5, -0.1), frameon=False)  # fmt: skip
