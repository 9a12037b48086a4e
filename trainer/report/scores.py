"""From runs to scores: the rows of a table, and the number each run contributes by a rule."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.evaluate.selection import (
    LEAVE_ONE_DOMAIN_OUT,
    ORACLE,
    SIBLINGS,
    Choice,
    Row,
    by_leaving_one_out,
    by_oracle,
    by_siblings,
    by_training_domains,
    columns_of,
    num_domains,
)
from trainer.process.errors import ConfigError
from trainer.report.comparability import MAY_DIFFER, differing
from trainer.report.runs import Run

LAST = "last"
"""The trained weights themselves, among the kinds of weights that a run evaluates."""
BEFORE = "zero_shot"
"""The classifier made from text, before training."""


@dataclass(frozen=True)
class Score:
    """What one run contributes to a table.

    Attributes:
        run: the run.
        label: its row.
        choice: the evaluation that the rule picked; None while the run is not finished, or where
            the rule has nothing to go by.
    """

    run: Run
    label: str
    choice: Choice | None


def of_weights(run: Run, kind: str) -> Run:
    """The run as seen by another kind of weights: columns `moa/KIND/env0_in_acc`, or `zero_shot`.

    An average counts as it stands at the end of the run: that is the adapter that was saved, and no
    step is selected for it. The result has no row if the run has none of these weights.
    """
    if kind == LAST:
        return run
    if kind == BEFORE:
        return replace(run, rows=() if run.zero_shot is None else (run.zero_shot,))
    last = run.rows[-1]
    columns = columns_of(kind, last)
    known = num_domains(columns) == num_domains(last)
    return replace(run, rows=({**last, **columns},) if known else ())


def label_of(run: Run, by: Sequence[str], kind: str = LAST) -> str:
    """The row of a run: its method, the values of the settings `by`, the kind of weights."""
    parts = [run.method]
    for name in by:
        if name not in run.settings:
            raise ConfigError(f"--by {name}: {run.folder} has no such setting")
        parts.append(f"{name.rpartition('.')[2]}={run.settings[name]}")
    return " ".join([*parts, *([kind] if kind != LAST else [])])


def scores(
    runs: Sequence[Run],
    rule: str,
    by: Sequence[str] = (),
    kinds: Sequence[str] = (LAST,),
    tune: bool = False,
) -> list[Score]:
    """One score for every run with a single held-out domain, and for every kind of weights.

    Args:
        runs: finished and unfinished ones.
        rule: a name of `selection.RULES`.
        by: settings that set rows apart.
        kinds: kinds of weights to show.
        tune: whether runs that differ in settings only are candidates for one cell, among which
            the rule's validation accuracy decides.

    Raises:
        ConfigError: two runs claim one cell.
    """
    seen = [(label_of(run, by, kind), of_weights(run, kind)) for kind in kinds for run in runs]
    groups: dict[tuple[object, ...], dict[tuple[int, ...], Run]] = defaultdict(dict)
    cells: dict[tuple[object, ...], list[tuple[str, Run]]] = defaultdict(list)
    for label, run in seen:
        row = (run.dataset, label, run.seeds)
        if run.finished:
            groups[(*row, _candidate(run) if tune else None)][run.held_out] = run
        if len(run.held_out) == 1 and run.rows:
            cells[(*row, run.held_out[0])].append((label, run))
    found = []
    for claims in cells.values():
        if len(claims) > 1 and not tune:
            raise ConfigError(_two_claims(claims[0][1], claims[1][1]))
        scored = []
        for label, run in claims:
            group = groups[(run.dataset, label, run.seeds, _candidate(run) if tune else None)]
            choice = choose(rule, run, group) if run.finished else None
            scored.append(Score(run, label, choice))
        found.append(_best_candidate(scored))
    return found


def choose(rule: str, run: Run, group: Mapping[tuple[int, ...], Run]) -> Choice | None:
    """Applies a rule to a finished run.

    Args:
        rule: a name of `selection.RULES`.
        run: holds out one domain.
        group: runs of the same row, seeds and settings, by the domains they hold out.
    """
    (held_out,) = run.held_out
    if rule == ORACLE:
        return by_oracle(run.rows, held_out)
    if rule in (LEAVE_ONE_DOMAIN_OUT, SIBLINGS) and not evaluated_in_full(run):
        return None
    if rule == LEAVE_ONE_DOMAIN_OUT:
        pairs = {e: r.rows for (e,), r in _others(group, held_out, pairs=True)}
        return by_leaving_one_out(run.rows, held_out, pairs)
    if rule == SIBLINGS:
        single: dict[int, Sequence[Row]] = {
            e: r.rows for (e,), r in _others(group, held_out, pairs=False)
        }
        return by_siblings(run.rows, held_out, single)
    return by_training_domains(run.rows, held_out)


def evaluated_in_full(run: Run) -> bool:
    """Whether all domains were evaluated at every evaluation, not at the selected and last only."""
    return run.settings.get("eval.mode") != "selection"


def _others(
    group: Mapping[tuple[int, ...], Run], held_out: int, pairs: bool
) -> Iterable[tuple[tuple[int, ...], Run]]:
    """Runs that hold out one domain besides (`pairs`) or instead of `held_out`; that domain."""
    for held, run in group.items():
        others = tuple(env for env in held if env != held_out)
        wanted = len(others) == 1 and len(held) == (2 if pairs else 1)
        if wanted and evaluated_in_full(run):
            yield others, run


def _candidate(run: Run) -> tuple[object, ...]:
    """Equal for runs with equal settings."""
    settings = {k: str(v) for k, v in run.settings.items() if k not in MAY_DIFFER}
    return (run.hparams_seed, tuple(sorted(settings.items())))


def _best_candidate(scored: Sequence[Score]) -> Score:
    """By validation accuracy; the last of equals, as DomainBed sorts ascending and reverses."""
    known = [s for s in sorted(scored, key=lambda s: s.run.hparams_seed) if s.choice is not None]
    if not known:
        return scored[0]
    return max(reversed(known), key=lambda s: s.choice.validation if s.choice else 0.0)


def _two_claims(one: Run, other: Run) -> str:
    differences = differing([one, other])
    if differences:
        named = ", ".join(f"{k} ({', '.join(v)})" for k, v in list(differences.items())[:4])
        first = next(iter(differences))
        remedy = (
            f"they differ in {named}: --by {first} gives them rows of their own, --tune lets "
            "the selection rule choose"
        )
    else:
        remedy = "their settings are the same: report one of them"
    return (
        f"{one.folder} and {other.folder} are the same method, held-out domain and seeds; {remedy}"
    )
