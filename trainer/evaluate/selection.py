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
OUT_CLASS_MEAN = re.compile(r"moa/env(\d+)_out_class_mean")
DOMAINBED = re.compile(r"env\d+_(in|out)_acc")

CLASS_MEAN_VALIDATION = "class_mean_validation"
ORACLE = "oracle"
LEAVE_ONE_DOMAIN_OUT = "leave_one_domain_out"
RULES: dict[str, str] = {
    "training_domain_validation": "step with the best mean of the sources' out accuracies",
    ORACLE: "the last step; ranks settings by the target's own out accuracy",
    LEAVE_ONE_DOMAIN_OUT: "step with the best mean over runs that hold out one more domain each",
    CLASS_MEAN_VALIDATION: "step with the best mean of the sources' out class means",
}
"""Name and meaning of every rule; the first is the default, and the last is not DomainBed's."""
METRICS = {"accuracy": "env{}_in_acc", "class_mean": "moa/env{}_in_class_mean"}
"""What a table may show of the target, and its column."""


@dataclass(frozen=True)
class Choice:
    """What a rule picked in one run.

    Attributes:
        validation: what the rule ranks by, in steps and between settings.
        accuracy: the number to report, the target's `in` accuracy.
        class_mean: the same as the mean over classes; None where the row does not tell.
    """

    step: int
    validation: float
    accuracy: float
    class_mean: float | None = None


def num_domains(row: Row) -> int:
    """How many domains a row speaks of."""
    return next(number for number in count() if f"env{number}_in_acc" not in row)


def columns_of(kind: str, row: Row) -> dict[str, Any]:
    """Columns `moa/{kind}/...` of a row, such as an average's, as if they were the run's own."""
    start = f"moa/{kind}/"
    names = {key: key.removeprefix(start) for key in row if key.startswith(start)}
    return {
        name if DOMAINBED.fullmatch(name) else f"moa/{name}": row[key]
        for key, name in names.items()
    }


def validation_accuracy(
    row: Row, withheld: Collection[int], column: re.Pattern[str] = OUT_ACCURACY
) -> float:
    """Unweighted mean of the source domains' `out` accuracies; `withheld` are no sources."""
    found = sorted((int(match[1]), key) for key in row if (match := column.fullmatch(key)))
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


def by_class_means(rows: Sequence[Row], held_out: int) -> Choice | None:
    """As `by_training_domains`, but by class means; None unless every row has those of all."""
    columns = [f"moa/env{env}_out_class_mean" for env in range(num_domains(rows[0]))]
    if not all(column in row for row in rows for column in columns):
        return None
    found = [(validation_accuracy(row, (held_out,), OUT_CLASS_MEAN), row) for row in rows]
    best, row = max(found, key=lambda pair: pair[0])
    return _choice(row, best, held_out)


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
    accuracy, class_mean = (name.format(held_out) for name in METRICS.values())
    known = float(row[class_mean]) if class_mean in row else None
    return Choice(int(row["step"]), float(validation), float(row[accuracy]), known)
