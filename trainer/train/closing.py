"""The table a run closes with: all accuracies at the selected step, and facts of the run."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from trainer.evaluate.selection import Row, training_domain_validation, validation_accuracy


def closing_table(
    rows: Sequence[Row], domains: Sequence[str], withheld: Sequence[int], facts: Mapping[str, str]
) -> Table:
    """Per-domain accuracies at the selected step, and the facts of the run below them.

    Args:
        rows: of the run.
        domains: all names in order.
        withheld: numbers of the domains not trained on, the target first.
        facts: what else to tell.
    """
    selected, held_out = training_domain_validation(rows, withheld), withheld[0]
    table = Table(title=f"Selected step {selected['step']} (training-domain validation)")
    table.add_column("domain")
    table.add_column("in accuracy %", justify="right")
    table.add_column("out accuracy %", justify="right")
    for i, name in enumerate(domains):
        cells = (f"{100 * selected[f'env{i}_{split}_acc']:.1f}" for split in ("in", "out"))
        table.add_row(escape(f"{name} (held out)" if i in withheld else name), *cells)
    table.add_section()
    table.add_row("validation (mean source out)", "", f"{_percent(selected, withheld)}")
    target = 100 * selected[f"env{held_out}_in_acc"]
    table.add_row(escape(f"held-out accuracy, {domains[held_out]}"), f"[bold]{target:.1f}", "")
    table.add_section()
    for name, value in facts.items():
        table.add_row(name, value, "")
    return table


def _percent(row: Row, withheld: Sequence[int]) -> str:
    return f"{100 * validation_accuracy(row, withheld):.1f}"
