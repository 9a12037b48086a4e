"""One table in three forms: nothing is lost, and no text is taken for markup."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from trainer.process.tables import WIDTH, Table

PATH = "/scratch/" + "very_long_folder/" * 12 + "adapter"
NAMES = Table(
    ["a|b", "50 % of x_y", "note"],
    [["lora [bold]x[/bold]", "-1.50", "two\nlines"], [PATH, "70.0 ± 0.1", "one word " * 30]],
    title="the_title of :smile: [red]",
    align="lr",
    bold={(1, 1)},
    mark=" *",
    names=1,
    sections=(0,),
)


def printed(table: Table, **console: object) -> str:
    file = io.StringIO()
    table.show(Console(file=file, **console))  # type: ignore[arg-type]
    return file.getvalue()


def test_a_file_gets_whole_words_and_no_markup() -> None:
    text = printed(NAMES, width=WIDTH)
    for word in ("lora [bold]x[/bold]", PATH, "70.0 ± 0.1 *", "the_title of :smile: [red]"):
        assert word in text
    assert "\x1b" not in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1, "a rectangle"
    assert text.count("├") == 1, "the section"
    words = set(re.sub("[│┃]", " ", text).split())
    assert {"word", "lines", "50", "x_y"} <= words
    assert not words & {"wo", "rd", "wor", "d"}


def test_a_terminal_folds_and_shows_bold() -> None:
    text = printed(NAMES, width=60, force_terminal=True, color_system="standard")
    body = text.splitlines()[4:]
    assert "70.0 ± 0.1 *" not in text
    assert re.search(r"\x1b\[1m *70.0 ± 0.1", text)
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in body) <= 60
    assert "title" not in printed(Table(["", ""], [["a", "b"]]), width=40)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_breaks_paths_at_slashes(width: int) -> None:
    table = Table(["adapter", "acc %"], [[PATH, "70.0"], ["写真" * 9, "1.0"]], align="lr")
    text = printed(table, width=width, force_terminal=True, color_system=None)
    pieces = re.findall(r"\S*very_long\S*|\S*adapter/?$|/scratch/\S*", text)
    assert "".join(pieces).replace("│", "") in PATH + "adapter"
    assert all(piece.endswith(("/", "adapter")) for piece in pieces)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "写真" * 9 in text


def test_markdown_has_no_cell_too_many() -> None:
    title, _, header, rule, *rows = re.sub(" +", " ", NAMES.markdown()).splitlines()
    assert title == r"**the_title of :smile: \[red\]**"
    assert header == r"| a\|b | 50 % of x_y | note |"
    assert re.fullmatch(r"\|:-+\|-+:\|-+:\|", rule)
    assert rows[0] == "| `lora [bold]x[/bold]` | -1.50 | two lines |"
    assert rows[1].startswith(f"| `{PATH}` | **70.0 ± 0.1** | one word one word")


def test_latex_is_escaped_once() -> None:
    text = re.sub(" +", " ", NAMES.latex("a_name"))
    assert r"\caption{the\_title of :smile: [red]}" in text
    assert r"\label{tab:a-name}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert "\\toprule\n a|b & 50 \\% of x\\_y & note \\\\\n\\midrule\n" in text
    assert r" lora [bold]x[/bold] & $-1.50$ & two lines \\" in text
    assert r"\textbf{70.0 $\pm$ 0.1}" in text
    assert "\\bottomrule\n\\end{tabular}\n\\end{table}" in text
    assert r"\label" not in NAMES.latex()


@pytest.mark.parametrize("text", ["_", "&", "%", "$", "#", "{", "}", "\\", "~", "^"])
def test_latex_specials(text: str) -> None:
    (row,) = re.findall(r"\\midrule\n (.*) \\\\", Table(["x"], [[text]]).latex())
    assert row.strip() != text
    assert row.lstrip().startswith("\\")
