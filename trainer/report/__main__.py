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
from itertools import product
from pathlib import Path

from trainer.checkpoint.atomic_file import replace_text
from trainer.config.command_line import command_parser, words
from trainer.evaluate.selection import CLASS_MEAN_VALIDATION, METRICS, RULES
from trainer.process.ending import conclude
from trainer.process.errors import CheckpointError, ConfigError, cannot_write
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
    """Everything that a report shows; scores and comparisons by selection rule, and metric.

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
        "--format", choices=["text", "markdown", "latex", "json", "html"], default="text",
        help="default: text; html: a page with pictures, curves and the runs' commands and hashes",
    )  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="where --format html writes (default: stdout)")
    add(
        "--selection", type=words, default=[next(iter(RULES))], metavar="RULE[,RULE]",
        help="; ".join(f"{name}: {meaning}" for name, meaning in RULES.items())
        + f" (default: {next(iter(RULES))})",
    )  # fmt: skip
    add(
        "--metric", type=words, default=[next(iter(METRICS))], metavar="METRIC[,METRIC]",
        help="what a table shows of the held-out domain: accuracy, or class_mean, the mean of the "
        "classes' accuracies (default: accuracy)",
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
    for flag, given, legal in (
        ("--selection", args.selection, RULES), ("--metric", args.metric, METRICS),
    ):  # fmt: skip
        if unknown := [name for name in given if name not in legal]:
            raise ConfigError(f"{flag} {unknown[0]}: unknown; legal are {', '.join(legal)}")
    report = Report(notes=check_comparable(runs))
    for rule, metric in product(args.selection, args.metric):
        name = rule if metric == next(iter(METRICS)) else f"{rule}-{metric}"
        found = scores(runs, rule, args.by, args.weights, args.tune, metric)
        for kind in args.weights:
            if kind != LAST and not any(score.label.split()[-1] == kind for score in found):
                raise ConfigError(
                    f"--weights {kind}: no run has evaluated such weights (columns "
                    f"moa/{kind}/env0_in_acc ... in results.jsonl, or zero_shot.json)"
                )
        report.scored[name] = found
        report.tables += _tables(found, rule, metric)
        if args.compare:
            report.comparisons[name] = compare(found, args.compare)
            if not report.comparisons[name]:
                report.notes.append(
                    f"--compare {args.compare}: {name}: no two rows have a finished run of the "
                    "same dataset, held-out domain and seeds"
                )
        report.notes += _unmet(found, rule, metric)
    if not args.tune:
        report.notes += mixed_rows((s.label, s.run) for s in next(iter(report.scored.values())))
    return report


def _unmet(found: Sequence[Score], rule: str, metric: str) -> list[str]:
    """Notes on finished runs that count for nothing, and why."""
    notes, finished = [], [score for score in found if score.run.finished]
    unmet = [score.run.folder for score in finished if score.choice is None]
    if unmet and rule == CLASS_MEAN_VALIDATION:
        notes.append(
            f"{rule}: {len(unmet)} runs, such as {unmet[0]}, lack the class means of every "
            "domain at every evaluation: they are of an older release, of DomainBed, or with "
            "eval.mode selection; a run with eval.mode full has them"
        )
    elif unmet:
        notes.append(
            f"{rule}: {len(unmet)} runs lack the companions that this rule asks for, all of "
            f"them with eval.mode full, such as those of {unmet[0]}; "
            "--data.held_out A+B trains without two domains, and --pairs of trainer.sweep and "
            "trainer.sweep.slurm_array runs all pairs"
        )
    if silent := [s.run.folder for s in finished if s.choice and s.result is None]:
        notes.append(
            f"--metric {metric}: {len(silent)} runs of an older release or of DomainBed, such as "
            f"{silent[0]}, do not tell it; python -m trainer.evaluate --adapter "
            f"{silent[0] / 'adapter'} shows it of a run of ours"
        )
    return notes


def _tables(found: Sequence[Score], rule: str, metric: str) -> list[ResultTable]:
    """A table per dataset in order of appearance, and their averages if there are several."""
    shown = metric.replace("_", " ")
    about = f"held-out {shown} %, mean ± standard error ({rule.replace('_', ' ')})"
    suffix = "" if rule == next(iter(RULES)) else f"-{rule}"
    suffix += "" if metric == next(iter(METRICS)) else f"-{metric}"
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
        OutputError: the pictures or the page cannot be written.
    """
    if args.out is not None and args.format != "html":
        raise ConfigError("--out: only --format html writes a file; give it as well, or use > FILE")
    if args.out is not None and args.out.is_dir():
        raise ConfigError(f"--out {args.out}: is a folder; give a file, such as report.html")
    runs, complaints = read_all(args.runs)
    _say(*complaints, *progress_lines(args.runs))
    if not any(run.finished for run in runs):
        raise ConfigError("there is no finished run to report")
    runs = renamed(runs, args.name)
    report = build(runs, args)
    if args.format == "html":
        _write_page(runs, report, complaints, args.out)
    else:
        show(report, args.format)
    _say(*(f"note: {note}" for note in report.notes))
    if args.plots is not None:
        from trainer.report.plots import save_plots

        if written := save_plots(report.tables, args.plots):
            _say(f"pictures: {', '.join(map(str, written))}")


def _write_page(
    runs: Sequence[Run], report: Report, complaints: Sequence[str], out: Path | None
) -> None:
    from trainer.report.page import page  # here: other formats do without matplotlib

    scored = next(iter(report.scored.values()))
    notes = [*report.notes, *complaints]
    content = page(runs, report.tables, report.comparisons, scored, notes)
    if out is None:
        sys.stdout.write(content.decode("ascii"))
        return
    try:
        replace_text(out, content.decode("ascii"))
    except OSError as error:
        raise cannot_write("--out", out, error) from error
    _say(f"page: {out} ({len(content) / 2**20:.1f} MiB)")


def _say(*lines: str) -> None:
    sys.stderr.writelines(f"{line}\n" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: command(args), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
