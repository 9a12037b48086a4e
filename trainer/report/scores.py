"""From runs to scores: the rows of a table, and the number each run contributes by a rule."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from trainer.evaluate import selection
from trainer.process.errors import ConfigError
from trainer.report.comparability import MAY_DIFFER, differing
from trainer.report.runs import Run

LAST = "last"
"""The trained weights themselves, among the kinds of weights that a run evaluates."""
Group = dict[tuple[int, ...], Run]
"""Runs of one row, seeds and settings, by the domains they hold out."""


@dataclass(frozen=True)
class Score:
    """What one run contributes to the row `label` of a table.

    Attributes:
        choice: the evaluation that the rule picked; None while the run is not finished, or where
            the rule has nothing to go by.
        metric: which of `selection.METRICS` counts.
    """

    run: Run
    label: str
    choice: selection.Choice | None
    metric: str = next(iter(selection.METRICS))

    @property
    def result(self) -> float | None:
        """The number for the table; None while there is none."""
        return None if self.choice is None else getattr(self.choice, self.metric)


def of_weights(run: Run, kind: str) -> Run:
    """The run as seen by another kind of weights: columns `moa/KIND/env0_in_acc`, or `zero_shot`.

    An average counts as it stands at the end of the run: that is the adapter that was saved, and no
    step is selected for it. The result has no row if the run has none of these weights.
    """
    if kind == LAST:
        return run
    if kind == "zero_shot":  # the classifier made from text, before training
        return replace(run, rows=() if run.zero_shot is None else (run.zero_shot,))
    last = run.rows[-1]
    columns = selection.columns_of(kind, last)
    known = selection.num_domains(columns) == selection.num_domains(last)
    return replace(run, rows=({**last, **columns},) if known else ())


def label_of(run: Run, by: Sequence[str], kind: str) -> str:
    """The row of a run: its method, the values of the settings `by`, the kind of weights."""
    if missing := [name for name in by if name not in run.settings]:
        raise ConfigError(f"--by {missing[0]}: {run.folder} has no such setting")
    # `name` alone would tell nothing: objective.name=coral is objective=coral.
    values = [f"{n.removesuffix('.name').rpartition('.')[2]}={run.settings[n]}" for n in by]
    return " ".join([run.method, *values, *([kind] if kind != LAST else [])])


def scores(
    runs: Sequence[Run], rule: str, by: Sequence[str], kinds: Sequence[str], tune: bool, metric: str
) -> list[Score]:
    """One score for every run with a single held-out domain, and for every kind of weights.

    Settings named in `by` set rows apart. With `tune`, the validation accuracy of the rule, one of
    `selection.RULES`, decides among runs that differ in other settings only; without it, two runs
    for one cell are a `ConfigError`.
    """
    groups: dict[tuple[object, ...], Group] = defaultdict(dict)
    cells: dict[tuple[object, ...], list[tuple[str, Run, Group]]] = defaultdict(list)
    for kind, run in product(kinds, runs):
        label, seen = label_of(run, by, kind), of_weights(run, kind)
        row = (run.dataset, label, run.seeds)
        group = groups[(*row, _candidate(run) if tune else None)]
        if run.finished:
            group[run.held_out] = seen
        if len(run.held_out) == 1 and seen.rows:
            cells[(*row, run.held_out)].append((label, seen, group))
    found = []
    for claims in cells.values():
        if len(claims) > 1 and not tune:
            raise ConfigError(_two_claims(claims[0][1], claims[1][1]))
        scored = [Score(r, label, _choose(rule, r, group), metric) for label, r, group in claims]
        found.append(_best_candidate(scored))
    return found


def _choose(rule: str, run: Run, group: Group) -> selection.Choice | None:
    """What a rule of `selection.RULES` picks in a run that holds out one domain."""
    (held_out,) = run.held_out
    if not run.finished:
        return None
    if rule == selection.ORACLE:
        return selection.by_oracle(run.rows, held_out)
    if rule == next(iter(selection.RULES)):
        return selection.by_training_domains(run.rows, held_out)
    if not _evaluated_in_full(run):
        return None
    if rule == selection.CLASS_MEAN_VALIDATION:
        return selection.by_class_means(run.rows, held_out)
    pairs = {
        sum(held) - held_out: other.rows
        for held, other in group.items()
        if len(held) == 2 and held_out in held and _evaluated_in_full(other)
    }
    return selection.by_leaving_one_out(run.rows, held_out, pairs)


def _evaluated_in_full(run: Run) -> bool:
    """Whether all domains were evaluated at every evaluation, not at the selected and last only."""
    return run.settings.get("eval.mode") != "selection"


def _candidate(run: Run) -> tuple[object, ...]:
    """Equal for runs with equal settings."""
    settings = {k: str(v) for k, v in run.settings.items() if k not in MAY_DIFFER}
    return (run.hparams_seed, tuple(sorted(settings.items())))


def _best_candidate(scored: Sequence[Score]) -> Score:
    """By validation accuracy; the last of equals, as DomainBed sorts ascending and reverses."""
    known = [(s.choice.validation, s.run.hparams_seed, n) for n, s in enumerate(scored) if s.choice]
    return scored[max(known)[-1]] if known else scored[0]


def _two_claims(one: Run, other: Run) -> str:
    start = f"{one.folder} and {other.folder} are the same method, held-out domain and seeds; "
    if not (differences := differing([one, other])):
        return start + "their settings are the same: report one of them"
    named = ", ".join(f"{k} ({', '.join(v)})" for k, v in list(differences.items())[:4])
    return (
        f"{start}they differ in {named}: --by {next(iter(differences))} gives them rows of their "
        "own, --tune lets the selection rule choose"
    )
