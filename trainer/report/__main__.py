"""`python -m trainer.report RUN [RUN ...]`: held-out accuracy over many runs, as comparable tables.

One table per dataset, methods x held-out domains, mean +- standard error over repetitions; several
datasets give a table of their averages, too. RUN is a run folder or a folder of run folders; of
a folder that `trainer.sweep.slurm_array` filled it also tells which runs are missing.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trainer.config.command_line import words
from trainer.evaluate.selection import LEAVE_ONE_DOMAIN_OUT, RULES
from trainer.process.errors import CheckpointError, ConfigError, OutputError, exit_code
from trainer.report.comparability import check_comparable, mixed_rows
from trainer.report.formats import (
    latex_comparisons,
    latex_table,
    markdown_comparisons,
    markdown_table,
    score_data,
    table_data,
    text_comparisons,
    text_table,
)
from trainer.report.runs import Run, find_folders, read_run
from trainer.report.scores import LAST, Score, scores
from trainer.report.significance import Comparison, compare
from trainer.report.tables import ResultTable, averages_table, dataset_table
from trainer.sweep.slurm_array import progress_lines

COMPANIONS = {
    LEAVE_ONE_DOMAIN_OUT: "; --data.held_out A+B trains without two domains, and --pairs of "
    "trainer.sweep and trainer.sweep.slurm_array runs all pairs"
}
"""What to do about runs that a rule misses."""
UNITS = "held-out accuracy %, mean ± standard error"


@dataclass(frozen=True)
class Report:
    """Everything that a report shows.

    Attributes:
        tables: one per rule and dataset, and one of averages per rule for several datasets.
        scored: by rule, what each run contributes.
        comparisons: by rule, tests between rows.
        notes: what a reader of the tables should know.
    """

    tables: Sequence[ResultTable]
    scored: dict[str, list[Score]]
    comparisons: dict[str, list[Comparison]]
    notes: Sequence[str]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    result.add_argument(
        "--format", choices=["text", "markdown", "latex", "json"], default="text",
        help="default: text",
    )  # fmt: skip
    result.add_argument(
        "--selection", type=words, default=[next(iter(RULES))], metavar="RULE[,RULE]",
        help="; ".join(f"{name}: {meaning}" for name, meaning in RULES.items())
        + f" (default: {next(iter(RULES))})",
    )  # fmt: skip
    result.add_argument(
        "--weights", type=words, default=[LAST], metavar="KIND[,KIND]",
        help="last: the trained weights; others as the runs evaluated them, such as ema, swad or "
        "zero_shot, in rows of their own (default: last)",
    )  # fmt: skip
    result.add_argument(
        "--by", type=words, default=[], metavar="SETTING[,SETTING]",
        help="settings that get rows of their own, such as moa.router,optim.lr",
    )  # fmt: skip
    result.add_argument(
        "--tune", action="store_true",
        help="runs that differ in settings only are candidates; the rule's validation decides",
    )  # fmt: skip
    result.add_argument(
        "--compare", metavar="ROW",
        help="test every row against this one in pairs of equal held-out domain and seeds; all: "
        "each two rows",
    )  # fmt: skip
    result.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="write each table as bars, PNG and SVG"
    )
    return result


def build(runs: Sequence[Run], args: argparse.Namespace) -> Report:
    """Puts runs into tables.

    Raises:
        ConfigError: they cannot share a table, or an option names nothing that exists.
    """
    for rule in args.selection:
        if rule not in RULES:
            raise ConfigError(f"--selection {rule}: no such rule; legal are {', '.join(RULES)}")
    notes, tables = check_comparable(runs), []
    scored: dict[str, list[Score]] = {}
    comparisons: dict[str, list[Comparison]] = {}
    for rule in args.selection:
        found = scores(runs, rule, args.by, args.weights, args.tune)
        missing = [kind for kind in args.weights if not _has(found, kind)]
        if missing:
            raise ConfigError(
                f"--weights {missing[0]}: no run has evaluated such weights (columns "
                f"moa/{missing[0]}/env0_in_acc ... in results.jsonl, or zero_shot.json)"
            )
        scored[rule] = found
        tables += _tables(found, rule)
        if args.compare:
            comparisons[rule] = compare(found, args.compare)
            if not comparisons[rule]:
                notes.append(
                    f"--compare {args.compare}: {rule}: no two rows have a finished run of the "
                    "same dataset, held-out domain and seeds"
                )
        unmet = [s for s in found if s.run.finished and s.choice is None]
        if unmet:
            notes.append(
                f"{rule}: {len(unmet)} runs lack the companions that this rule asks for, all of "
                f"them with eval.mode full, such as those of {unmet[0].run.folder}"
                f"{COMPANIONS.get(rule, '')}"
            )
    if not args.tune:
        notes += mixed_rows((s.label, s.run) for s in next(iter(scored.values())))
    return Report(tables, scored, comparisons, notes)


def _has(found: Iterable[Score], kind: str) -> bool:
    return kind == LAST or any(score.label.split()[-1] == kind for score in found)


def _tables(found: Sequence[Score], rule: str) -> list[ResultTable]:
    """A table per dataset in order of appearance, and their averages if there are several."""
    about = f"{UNITS} ({rule.replace('_', ' ')})"
    datasets = dict.fromkeys(score.run.dataset for score in found)
    suffix = "" if rule == next(iter(RULES)) else f"-{rule}"
    result = [
        dataset_table([s for s in found if s.run.dataset == d], f"{d}: {about}", d + suffix)
        for d in datasets
    ]
    if len(result) > 1:
        result.append(averages_table(result, list(datasets), f"averages: {about}", suffix))
    return result


def show(report: Report, form: str, console: Console) -> None:
    """Prints a report."""
    if form == "json":
        content = {
            "tables": [table_data(table) for table in report.tables],
            "comparisons": {r: [vars(c) for c in cs] for r, cs in report.comparisons.items()},
            "runs": {r: [score_data(s) for s in found] for r, found in report.scored.items()},
            "notes": list(report.notes),
        }
        console.print(json.dumps(content, indent=1), markup=False, soft_wrap=True, highlight=False)
        return
    if form == "text":
        for table in report.tables:
            console.print(text_table(table, styled=console.is_terminal))
        for comparisons in report.comparisons.values():
            console.print(text_comparisons(comparisons))
        return
    as_table, as_comparisons = {
        "markdown": (markdown_table, markdown_comparisons),
        "latex": (latex_table, latex_comparisons),
    }[form]
    parts = [as_table(table) for table in report.tables]
    parts += [as_comparisons(comparisons) for comparisons in report.comparisons.values()]
    console.print("\n\n".join(parts), markup=False, soft_wrap=True, highlight=False)


def read_all(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run that can be read, and a complaint for every one that is left out."""
    folders, complaints = find_folders(paths)
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (ConfigError, CheckpointError) as error:
            complaints.append(f"left out: {error}")
    complaints += [f"not counted: {r.folder}: {r.progress()}" for r in runs if not r.finished]
    return runs, complaints


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    aside = Console(stderr=True)
    runs, complaints = read_all(args.runs)
    for line in [*complaints, *progress_lines(args.runs)]:
        aside.print(line, markup=False, soft_wrap=True, highlight=False)
    try:
        if not any(run.finished for run in runs):
            raise ConfigError("there is no finished run to report")
        report = build(runs, args)
        show(report, args.format, console)
        written = []
        if args.plots is not None:
            from trainer.report.plots import save_plots

            written = save_plots(list(report.tables), args.plots)
    except (ConfigError, OutputError) as error:
        for line in str(error).splitlines():
            aside.print(f"error: {line}", markup=False, soft_wrap=True, highlight=False)
        return exit_code(error) or 1
    for note in report.notes:
        aside.print(f"note: {note}", markup=False, soft_wrap=True, highlight=False)
    if written:
        aside.print(f"pictures: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
