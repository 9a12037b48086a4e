"""The one way to show a table: in a terminal, as Markdown, as LaTeX.

Cells are plain texts; what a form must have escaped is escaped here and nowhere else (Markdown as
in an adapter's card).
"""

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
        for number, (title, side) in enumerate(zip(self.columns, self._sides(), strict=True)):
            title = visible(title)
            words = " ".join([title, *(row[number] for row in rows)]).split()
            longest = max(map(len, words), default=0)
            table.add_column(
                Text(title), justify=side, overflow="fold", min_width=None if styled else longest
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


def _latex(text: str) -> str:
    """Signed numbers go into math mode, which has a minus."""
    if re.fullmatch(r"[-+][\d.,]+", text):
        return f"${text}$"
    return visible(" ".join(text.split())).translate(LATEX)
