"""`python -m trainer.report RUN [RUN ...]`: held-out accuracy over many runs, as comparable tables.

One table per dataset, methods x held-out domains, mean +- standard error over repetitions; several
datasets give a table of their averages, too. RUN is a run folder or a folder of run folders; of
a folder that `trainer.sweep.slurm_array` filled it also tells which runs are missing.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.config.command_line import command_parser, words
from trainer.evaluate.selection import RULES
from trainer.process.ending import conclude
from trainer.process.errors import CheckpointError, ConfigError
from trainer.process.tables import output_console
from trainer.process.world import ALONE
from trainer.report.comparability import check_comparable, mixed_rows, renamed
from trainer.report.formats import comparison_table, result_table, score_data, table_data
from trainer.report.runs import Run, find_folders, read_run
from trainer.report.scores import LAST, Score, scores
from trainer.report.significance import Comparison, compare
from trainer.report.tables import ResultTable, averages_table, dataset_table
from trainer.sweep.slurm_array import progress_lines


@dataclass
class Report:
    """Everything that a report shows; scores and comparisons by selection rule.

    Attributes:
        notes: what a reader of the tables should know.
    """

    notes: list[str]
    tables: list[ResultTable] = field(default_factory=list)
    scored: dict[str, list[Score]] = field(default_factory=dict)
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.report", __doc__)
    add = result.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    add(
        "--format", choices=["text", "markdown", "latex", "json"], default="text",
        help="default: text",
    )  # fmt: skip
    add(
        "--selection", type=words, default=[next(iter(RULES))], metavar="RULE[,RULE]",
        help="; ".join(f"{name}: {meaning}" for name, meaning in RULES.items())
        + f" (default: {next(iter(RULES))})",
    )  # fmt: skip
    add(
        "--weights", type=words, default=[LAST], metavar="KIND[,KIND]",
        help="last: the trained weights; others as the runs evaluated them, such as ema, swad or "
        "zero_shot, in rows of their own (default: last)",
    )  # fmt: skip
    add(
        "--by", type=words, default=[], metavar="SETTING[,SETTING]",
        help="settings that get rows of their own, such as moa.router,optim.lr",
    )  # fmt: skip
    add(
        "--tune", action="store_true",
        help="runs that differ in settings only are candidates; the rule's validation decides",
    )  # fmt: skip
    add(
        "--compare", metavar="ROW",
        help="test every row against this one in pairs of equal held-out domain and seeds; all: "
        "each two rows",
    )  # fmt: skip
    add(
        "--name", action="append", default=[], metavar="HASH=NAME",
        help="what to call the images with that hash, where two sets share the name of a dataset",
    )  # fmt: skip
    add("--plots", type=Path, metavar="FOLDER", help="write each table as bars, PNG and SVG")
    return result


def build(runs: Sequence[Run], args: argparse.Namespace) -> Report:
    """Puts runs into tables.

    `ConfigError` if they cannot share one, or an option names nothing that exists.
    """
    if unknown := [rule for rule in args.selection if rule not in RULES]:
        raise ConfigError(f"--selection {unknown[0]}: no such rule; legal are {', '.join(RULES)}")
    report = Report(notes=check_comparable(runs))
    for rule in args.selection:
        found = scores(runs, rule, args.by, args.weights, args.tune)
        for kind in args.weights:
            if kind != LAST and not any(score.label.split()[-1] == kind for score in found):
                raise ConfigError(
                    f"--weights {kind}: no run has evaluated such weights (columns "
                    f"moa/{kind}/env0_in_acc ... in results.jsonl, or zero_shot.json)"
                )
        report.scored[rule] = found
        report.tables += _tables(found, rule)
        if args.compare:
            report.comparisons[rule] = compare(found, args.compare)
            if not report.comparisons[rule]:
                report.notes.append(
                    f"--compare {args.compare}: {rule}: no two rows have a finished run of the "
                    "same dataset, held-out domain and seeds"
                )
        if unmet := [s for s in found if s.run.finished and s.choice is None]:
            report.notes.append(
                f"{rule}: {len(unmet)} runs lack the companions that this rule asks for, all of "
                f"them with eval.mode full, such as those of {unmet[0].run.folder}; "
                "--data.held_out A+B trains without two domains, and --pairs of trainer.sweep and "
                "trainer.sweep.slurm_array runs all pairs"
            )
    if not args.tune:
        report.notes += mixed_rows((s.label, s.run) for s in next(iter(report.scored.values())))
    return report


def _tables(found: Sequence[Score], rule: str) -> list[ResultTable]:
    """A table per dataset in order of appearance, and their averages if there are several."""
    about = f"held-out accuracy %, mean ± standard error ({rule.replace('_', ' ')})"
    suffix = "" if rule == next(iter(RULES)) else f"-{rule}"
    by_dataset: dict[str, list[Score]] = defaultdict(list)
    for score in found:
        by_dataset[score.run.dataset].append(score)
    result = [dataset_table(of, f"{d}: {about}", d + suffix) for d, of in by_dataset.items()]
    if len(result) > 1:
        title, name = f"averages: {about}", f"averages{suffix}"
        result.append(averages_table(result, list(by_dataset), title, name))
    return result


def show(report: Report, form: str) -> None:
    """Prints a report as `--format` says."""
    if form == "json":
        content = {
            "tables": [table_data(table) for table in report.tables],
            "comparisons": {r: [asdict(c) for c in cs] for r, cs in report.comparisons.items()},
            "runs": {r: [score_data(s) for s in found] for r, found in report.scored.items()},
            "notes": report.notes,
        }
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    tables = [(result_table(table), table.name) for table in report.tables]
    tables += [(comparison_table(found), "") for found in report.comparisons.values()]
    if form == "text":
        console = output_console()
        for table, _ in tables:
            table.show(console)
        return
    parts = [t.latex(name) if form == "latex" else t.markdown() for t, name in tables]
    sys.stdout.write("\n\n".join(parts) + "\n")


def read_all(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every run that can be read, and a complaint for every one that is left out."""
    folders, complaints = find_folders(paths)
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (ConfigError, CheckpointError) as error:
            complaints.append(f"left out: {error}")
    complaints += [f"not counted: {r.folder}: {r.how_far()}" for r in runs if not r.finished]
    return runs, complaints


def command(args: argparse.Namespace) -> None:
    """Prints the report, and on stderr what else there is to say.

    Raises:
        ConfigError: there is nothing to report, or not as asked for.
        OutputError: the pictures cannot be written.
    """
    runs, complaints = read_all(args.runs)
    _say(*complaints, *progress_lines(args.runs))
    if not any(run.finished for run in runs):
        raise ConfigError("there is no finished run to report")
    report = build(renamed(runs, args.name), args)
    show(report, args.format)
    _say(*(f"note: {note}" for note in report.notes))
    if args.plots is not None:
        from trainer.report.plots import save_plots

        if written := save_plots(report.tables, args.plots):
            _say(f"pictures: {', '.join(map(str, written))}")


def _say(*lines: str) -> None:
    sys.stderr.writelines(f"{line}\n" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: command(args), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
