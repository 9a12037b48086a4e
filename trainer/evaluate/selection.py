"""Model selection rules as pure functions over rows of evaluations (DomainBed's protocol).

A row has `step` and, for each domain i in the dataset's order, `env{i}_in_acc` (80 %) and
`env{i}_out_acc` (20 %), all in [0, 1]; those of `evaluations.jsonl` have the sources' `out` only.
Every rule picks one row of one run; the number to report is always that row's
`env{held_out}_in_acc`. Among equals the first evaluation wins.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

Row = Mapping[str, Any]
OUT_ACCURACY = re.compile(r"env(\d+)_out_acc")

ORACLE = "oracle"
LEAVE_ONE_DOMAIN_OUT = "leave_one_domain_out"
RULES: dict[str, str] = {
    "training_domain_validation": "step with the best mean of the sources' out accuracies",
    ORACLE: "the last step; ranks settings by the target's own out accuracy",
    LEAVE_ONE_DOMAIN_OUT: "step with the best mean over runs that hold out one more domain each",
}
"""Name and meaning of every rule; the first is the default."""


@dataclass(frozen=True)
class Choice:
    """What a rule picked in one run.

    Attributes:
        validation: what the rule ranks by, in steps and between settings.
        accuracy: the number to report, the target's `in` accuracy.
    """

    step: int
    validation: float
    accuracy: float


def num_domains(row: Row) -> int:
    """How many domains a row speaks of."""
    return next(number for number in count() if f"env{number}_in_acc" not in row)


def columns_of(kind: str, row: Row) -> dict[str, Any]:
    """Columns `moa/{kind}/...` of a row, such as an average's, as if they were the run's own."""
    start = f"moa/{kind}/"
    return {k.removeprefix(start): value for k, value in row.items() if k.startswith(start)}


def validation_accuracy(row: Row, withheld: Collection[int]) -> float:
    """Unweighted mean of the source domains' `out` accuracies; `withheld` are no sources."""
    found = sorted((int(match[1]), key) for key in row if (match := OUT_ACCURACY.fullmatch(key)))
    sources = [row[key] for number, key in found if number not in withheld]
    return float(sum(sources) / len(sources))


def training_domain_validation(rows: Sequence[Row], withheld: Collection[int]) -> Row:
    """The row of a run with the best `validation_accuracy`; `ValueError` if there is none."""
    if not rows:
        raise ValueError("no evaluation to select from")
    return max(rows, key=lambda row: validation_accuracy(row, withheld))


def by_training_domains(rows: Sequence[Row], held_out: int) -> Choice:
    """Training-domain validation of one run."""
    row = training_domain_validation(rows, (held_out,))
    return _choice(row, validation_accuracy(row, (held_out,)), held_out)


def by_oracle(rows: Sequence[Row], held_out: int) -> Choice:
    """DomainBed's test-domain validation: the last step, no early stopping.

    It looks at the target's `out` split only to rank runs of different settings. Without a row it
    is a `ValueError`.
    """
    if not rows:
        raise ValueError("no evaluation to select from")
    last = max(rows, key=lambda row: int(row["step"]))
    return _choice(last, last[f"env{held_out}_out_acc"], held_out)


def by_leaving_one_out(
    rows: Sequence[Row], held_out: int, pairs: Mapping[int, Sequence[Row]]
) -> Choice | None:
    """DomainBed's leave-one-domain-out cross-validation.

    At each step of the run that holds out the target alone, the other domains vote, each with its
    `in` accuracy in a run that was trained on neither it nor the target; `pairs` has that run's
    rows by the other domain. None unless at some step every one of them can vote.
    """
    if not rows:
        return None
    others = [v for v in range(num_domains(rows[0])) if v != held_out]
    votes = [{r["step"]: r[f"env{v}_in_acc"] for r in pairs.get(v, ())} for v in others]
    choices = [
        _choice(row, sum(vote[row["step"]] for vote in votes) / len(votes), held_out)
        for row in rows
        if all(row["step"] in vote for vote in votes)
    ]
    return max(choices, key=lambda choice: choice.validation, default=None)


def _choice(row: Row, validation: float, held_out: int) -> Choice:
    return Choice(int(row["step"]), float(validation), float(row[f"env{held_out}_in_acc"]))
