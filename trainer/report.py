"""Tables: the closing table of a run, and held-out accuracy by method and domain over many runs.

`python -m trainer.report RUN [RUN ...] [--format text|markdown]`.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.errors import CheckpointError, ConfigError, exit_code
from trainer.run_folder import read_rows
from trainer.selection import Row, training_domain_validation, validation_accuracy


@dataclass(frozen=True)
class Cell:
    """One finished run: what was trained, and the target accuracy that selection reports.

    `seed` holds the run's seed and its trial seed.
    """

    dataset: str
    method: str
    held_out: str
    seed: tuple[int, int]
    accuracy: float
    folder: str = ""


def closing_table(
    rows: Sequence[Row], domains: Sequence[str], held_out: int, facts: Mapping[str, str]
) -> Table:
    """Per-domain accuracies at the selected step, and the facts of the run below them."""
    selected = training_domain_validation(rows, held_out)
    table = Table(title=f"Selected step {selected['step']} (training-domain validation)")
    table.add_column("domain")
    table.add_column("in accuracy %", justify="right")
    table.add_column("out accuracy %", justify="right")
    for i, name in enumerate(domains):
        cells = (f"{100 * selected[f'env{i}_{split}_acc']:.1f}" for split in ("in", "out"))
        table.add_row(escape(f"{name} (held out)" if i == held_out else name), *cells)
    table.add_section()
    table.add_row("validation (mean source out)", "", f"{_percent(selected, held_out)}")
    target = 100 * selected[f"env{held_out}_in_acc"]
    table.add_row(escape(f"held-out accuracy, {domains[held_out]}"), f"[bold]{target:.1f}", "")
    table.add_section()
    for name, value in facts.items():
        table.add_row(name, value, "")
    return table


def _percent(row: Row, held_out: int) -> str:
    return f"{100 * validation_accuracy(row, held_out):.1f}"


def read_cell(folder: Path) -> Cell:
    """The result of one finished run folder.

    Raises:
        ConfigError: the folder is not that of a finished run.
        CheckpointError: its results cannot be read.
    """
    for name in ("config.yaml", "results.jsonl", "done"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: no {name}; give the folder of a finished run")
    try:
        config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        rows = read_rows(folder / "results.jsonl")
        held_out = rows[0]["args"]["test_envs"][0]
        accuracy = training_domain_validation(rows, held_out)[f"env{held_out}_in_acc"]
        data, train = config["data"], config["train"]
        seed = (train["seed"], train["trial_seed"])
        method = config["moa"]["method"]
        return Cell(data["dataset"], method, data["held_out"], seed, accuracy, str(folder))
    except (yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{folder}: its results cannot be read ({error!r})") from error


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and DomainBed's error: population standard deviation / sqrt(number of values)."""
    return statistics.fmean(values), statistics.pstdev(values) / len(values) ** 0.5


def summary(cells: Sequence[Cell]) -> tuple[list[str], dict[str, list[str]]]:
    """Methods against held-out domains, as formatted cells.

    The last column is the mean over domains, per seed first and then over seeds. A method that
    lacks a cell gets `-` there and in the mean.

    Returns:
        Column titles, and per method the cells, in order of first appearance.

    Raises:
        ConfigError: two runs claim one cell, or the runs are of different datasets.
    """
    domains = list(dict.fromkeys(c.held_out for c in cells))
    grid: dict[str, dict[str, dict[tuple[int, int], float]]]
    grid = defaultdict(lambda: defaultdict(dict))
    first: dict[tuple[str, str, tuple[int, int]], Cell] = {}
    for c in cells:
        other = first.setdefault((c.method, c.held_out, c.seed), c)
        if other is not c or c.dataset != cells[0].dataset:
            raise ConfigError(
                f"{other.folder} and {c.folder if other is not c else cells[0].folder} do not fit "
                "one table: the same method, held-out domain and seeds twice, or two datasets; "
                "report them apart"
            )
        grid[c.method][c.held_out][c.seed] = c.accuracy
    lines: dict[str, list[str]] = {}
    for method, by_domain in grid.items():
        line = [_cell(list(by_domain[d].values())) for d in domains]
        seeds = [set(by_domain[d]) for d in domains]
        complete = sorted(set.intersection(*seeds)) if all(s == seeds[0] for s in seeds) else []
        per_seed = [statistics.fmean(by_domain[d][s] for d in domains) for s in complete]
        lines[method] = [*line, _cell(per_seed)]
    return [*domains, "mean"], lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if len(values) > 1 else "")


def markdown(titles: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    """The summary as a Markdown table."""
    rows = [["held out", *titles], ["---"] * (len(titles) + 1)]
    rows += [[f"`{method}`", *cells] for method, cells in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--format", choices=["text", "markdown", "json"], default="text", help="default: text"
    )
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    complaints, cells = Console(stderr=True), []
    for folder in args.runs:
        try:
            cells.append(read_cell(folder))
        except (ConfigError, CheckpointError) as error:
            complaints.print(f"left out: {error}", markup=False, soft_wrap=True)
    try:
        if not cells:
            raise ConfigError("none of the folders is that of a finished run")
        titles, lines = summary(cells)
    except ConfigError as error:
        complaints.print(f"error: {error}", markup=False, soft_wrap=True)
        return exit_code(error) or 1
    if args.format == "markdown":
        console.print(markdown(titles, lines), markup=False, soft_wrap=True)
    elif args.format == "json":
        console.print(json.dumps([vars(c) for c in cells], indent=1), markup=False, soft_wrap=True)
    else:
        table = Table("method", *titles, title="held-out accuracy %, mean ± standard error")
        for method, line in lines.items():
            table.add_row(method, *line)
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
