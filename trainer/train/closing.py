"""What a run closes with: all accuracies at the selected step, and facts of the run."""

import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console

from moa.files.saving import WEIGHTS_FILE
from trainer.checkpoint.run_folder import SPEED, RunFolder, read_rows
from trainer.evaluate.selection import Row, training_domain_validation, validation_accuracy
from trainer.prepare.parts import Parts
from trainer.process.tables import Table


def show_result(parts: Parts, folder: RunFolder, console: Console) -> None:
    """Prints the closing table of a finished run, and where to look further."""
    rows, report = read_rows(folder.results), parts.report
    file, speed = folder.adapter / WEIGHTS_FILE, rows[-1].get(SPEED)
    size = f"{file.stat().st_size / 2**20:.2f} MiB" if file.exists() else "was removed"
    facts = {
        "method": parts.config.moa.method,
        "trainable / total parameters": f"{report.trainable:,} / {report.total:,}",
        "of which head": f"{report.head:,}",
        "adapter file": size,
        "training speed": f"{speed:.0f} images/s" if speed else "not measured",
    }
    for average in folder.averages:  # no part of the selection, so below the table
        name = average.name.removeprefix("adapter-")
        accuracy = rows[-1].get(f"moa/{name}/env{parts.held_out}_in_acc")
        if accuracy is not None:
            facts[f"held-out accuracy, {average.name}"] = f"{100 * accuracy:.1f}"
    closing_table(rows, parts.index.domains, parts.withheld, facts).show(console)
    for line in (
        f"run folder: {folder.path}",
        *([f"routing map: {folder.routing}"] if folder.routing.exists() else []),
        f"curves: tensorboard --logdir {shlex.quote(str(folder.tensorboard))}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def closing_table(
    rows: Sequence[Row], domains: Sequence[str], withheld: Sequence[int], facts: Mapping[str, str]
) -> Table:
    """Per-domain accuracies at the selected step, and the facts of the run below them."""
    selected, held_out = training_domain_validation(rows, withheld), withheld[0]
    shown = {key: f"{100 * selected[key]:.1f}" for key in selected if key.endswith("_acc")}
    lines = [
        (f"{name} (held out)" if i in withheld else name,
         *(shown[f"env{i}_{split}_acc"] for split in ("in", "out")))
        for i, name in enumerate(domains)
    ]  # fmt: skip
    validation = f"{100 * validation_accuracy(selected, withheld):.1f}"
    lines += [
        ("validation (mean source out)", "", validation),
        (f"held-out accuracy, {domains[held_out]}", shown[f"env{held_out}_in_acc"], ""),
        *((name, value, "") for name, value in facts.items()),
    ]
    number = len(domains)
    return Table(
        ("domain", "in accuracy %", "out accuracy %"),
        lines,
        f"Selected step {selected['step']} (training-domain validation)",
        align="lr",
        bold={(number + 1, 1)},
        sections=(number - 1, number + 1),
    )
