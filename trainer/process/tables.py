"""The one way to show a table: in a terminal, as Markdown, as LaTeX, as HTML.

Cells are plain texts; what a form must have escaped is escaped here and nowhere else (Markdown as
in an adapter's card).
"""

import html
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tabulate import LATEX_ESCAPE_RULES, tabulate

from moa.files.markdown import cell, escaped, visible

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""
MIN_PATH = 12
"""Columns that a path is left at least on a terminal."""
LATEX = str.maketrans(LATEX_ESCAPE_RULES | {"±": r"$\pm$"})
Side = Literal["left", "center", "right"]
SIDES: dict[str, Side] = {"l": "left", "c": "center", "r": "right"}


def output_console() -> "Console":
    """Standard output, `WIDTH` columns wide where it is no terminal."""
    from rich.console import Console  # here: `--help` need not wait for it

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


@dataclass(frozen=True)
class Table:
    """Rows of texts under titles.

    Attributes:
        columns: their titles; all empty if there is no such line.
        align: `l`, `c` or `r` for each column; the last one counts for all further columns.
        bold: (row, column) of the texts that stand out.
        mark: what follows these in a terminal that shows no bold.
        names: how many columns, from the left, hold names that Markdown shows as code.
        sections: rows that are the last before a line.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    align: str = "l"
    bold: Collection[tuple[int, int]] = ()
    mark: str = ""
    names: int = 0
    sections: Collection[int] = ()

    def show(self, console: "Console") -> None:
        """Prints it; where that is no terminal, lines rather grow than break within a word."""
        from rich.table import Table as RichTable
        from rich.text import Text

        styled = console.is_terminal
        if self.title:
            console.print(Text(visible(self.title), "italic"), soft_wrap=True)
        table = RichTable(show_header=any(self.columns))
        rows = self._texts(visible, lambda text: text + (self.mark if not styled else ""))
        lines = [list(map(visible, self.columns)), *rows]
        widths: Sequence[int | None] = _longest(lines, str.split)
        if styled:
            lines, widths = _fitted(lines, console.width - 1 - 3 * len(self.columns))
        titles, *rows = lines
        for title, side, width in zip(titles, self._sides(), widths, strict=True):
            most = width if styled else None
            table.add_column(
                Text(title), justify=side, overflow="fold", min_width=width, max_width=most
            )
        for place, row in enumerate(rows):
            styles = ["bold" if (place, n) in self.bold else "" for n in range(len(row))]
            table.add_row(*map(Text, row, styles), end_section=place in self.sections)
        console.print(table, crop=False)

    def markdown(self) -> str:
        """A Markdown table, its title in bold above it."""
        rows = self._texts(escaped, "**{}**".format)
        for row, texts in zip(rows, self.rows, strict=True):
            row[: self.names] = map(cell, texts[: self.names])
        title = f"**{escaped(self.title)}**\n\n" if self.title else ""
        return title + self._lines("pipe", rows, escaped)

    def latex(self, name: str = "") -> str:
        r"""A `table` environment, labelled if it has a name; needs `\usepackage{booktabs}`."""
        lines = self._lines("latex_raw", self._texts(_latex, r"\textbf{{{}}}".format), _latex)
        for rule in ("top", "mid", "bottom"):
            lines = lines.replace(r"\hline", rf"\{rule}rule", 1)
        place = re.sub(r"[^\w.:]|_", "-", name)
        label = rf"\label{{tab:{place}}}" + "\n" if name else ""
        caption = rf"\caption{{{_latex(self.title)}}}"
        return f"\\begin{{table}}\n\\centering\n{caption}\n{label}{lines}\n\\end{{table}}"

    def html(self) -> str:
        """A `table` element."""
        rows = self._texts(markup, "<b>{}</b>".format)
        title = f"<caption>{markup(self.title)}</caption>" if self.title else ""
        return self._lines("unsafehtml", rows, markup).replace("<table>", f"<table>{title}", 1)

    def _sides(self) -> list[Side]:
        letters = self.align.ljust(len(self.columns), self.align[-1])
        return [SIDES[letter] for letter in letters]

    def _texts(self, escape: Callable[[str], str], bold: Callable[[str], str]) -> list[list[str]]:
        """The rows with every text escaped, and those that stand out marked."""
        return [
            [bold(escape(t)) if (place, n) in self.bold else escape(t) for n, t in enumerate(row)]
            for place, row in enumerate(self.rows)
        ]

    def _lines(self, form: str, rows: Sequence[Sequence[str]], escape: Callable[[str], str]) -> str:
        columns = [escape(title) for title in self.columns]
        return tabulate(rows, columns, form, colalign=self._sides(), disable_numparse=True)


def _longest(rows: Sequence[Sequence[str]], cut: Callable[[str], list[str]]) -> list[int]:
    """Of each column the width of its longest piece."""
    from rich.cells import cell_len

    pieces = [cut("\n".join(column)) for column in zip(*rows, strict=True)]
    return [max(map(cell_len, column), default=0) for column in pieces]


def _fitted(rows: list[list[str]], room: int) -> tuple[list[list[str]], Sequence[int | None]]:
    """The rows, paths in them broken where there is no room, and the width of each column.

    None if words have to be broken all the same.
    """
    widths = _longest(rows, str.split)
    if (over := sum(widths) - room) > 0:
        most = [max(MIN_PATH, width - over) for width in widths]
        rows = [[_at_slashes(t, width) for t, width in zip(row, most, strict=True)] for row in rows]
        widths = _longest(rows, str.split)
    if sum(widths) > room:
        return rows, [None] * len(widths)
    for column, whole in enumerate(_longest(rows, str.splitlines)):
        widths[column] += min(whole - widths[column], room - sum(widths))
    return rows, widths


def _at_slashes(text: str, width: int) -> str:
    """Breaks a path after its slashes, into lines of a width where its parts allow it."""
    lines = [""]
    for part in re.findall("[^/]*/|[^/]+", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def markup(text: str) -> str:
    """A text for HTML, between tags or within a quoted attribute."""
    return html.escape(visible(text))


def _latex(text: str) -> str:
    """Signed numbers go into math mode, which has a minus."""
    if re.fullmatch(r"[-+][\d.,]+", text):
        return f"${text}$"
    return visible(" ".join(text.split())).translate(LATEX)
