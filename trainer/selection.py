"""Model selection rules as pure functions over the rows of `results.jsonl` (DomainBed's protocol).

A row has `step` and, for each domain i in the dataset's order, `env{i}_in_acc` (80 %) and
`env{i}_out_acc` (20 %), all in [0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def num_domains(row: Row) -> int:
    """How many domains a row speaks of."""
    count = 0
    while f"env{count}_in_acc" in row:
        count += 1
    return count


def validation_accuracy(row: Row, held_out: int) -> float:
    """Unweighted mean of the source domains' `out` accuracies."""
    sources = [i for i in range(num_domains(row)) if i != held_out]
    return float(sum(row[f"env{i}_out_acc"] for i in sources) / len(sources))


def training_domain_validation(rows: Sequence[Row], held_out: int) -> Row:
    """The row with the best `validation_accuracy`; the first of equals.

    The number to report is that row's `env{held_out}_in_acc`.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("no evaluation to select from")
    return max(rows, key=lambda row: validation_accuracy(row, held_out))
