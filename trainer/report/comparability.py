"""Which runs may share a table: the same images, the same splits, and rows of equal settings."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from shards.read.naming import name_problem, printable
from trainer.config.resume_rules import FREE
from trainer.process.errors import ConfigError
from trainer.report.runs import Run

# Settings that may differ between the runs of one row: what changes where or how fast a run
# computes but not its result, what a table varies, and how much of a run was evaluated.
MAY_DIFFER = (FREE - {"train.steps"}) | {
    "data.held_out", "train.seed", "train.trial_seed", "eval.mode",
}  # fmt: skip


def renamed(runs: Sequence[Run], names: Iterable[str]) -> list[Run]:
    """The runs with their datasets called as the `HASH=NAME` of `--name` say.

    `ConfigError` for one of another form, or whose hash no run has.
    """
    called = {}
    for text in names:
        images, _, name = text.partition("=")
        if problem := name_problem(name, ""):
            raise ConfigError(f"--name {text}: must be HASH=NAME, and the name {problem}")
        if images not in {run.data for run in runs}:
            raise ConfigError(f"--name {text}: no run has images with the hash {images!r}")
        called[images] = name
    return [replace(run, dataset=called.get(run.data, run.dataset)) for run in runs]


def check_comparable(runs: Sequence[Run]) -> list[str]:
    """Notes; a `ConfigError` names runs of one dataset that saw different images or splits."""
    seen: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        seen[f"{run.dataset}: runs with different images"][run.data].append(run)
        trial = f"{run.dataset}, trial seed {run.seeds[1]}"
        seen[f"{trial}: runs with different splits"][run.split].append(run)
        grouped = run.rows[0].get("moa/group_by")
        how = f"groups of {printable(str(grouped))!r:.200}" if grouped else "DomainBed's split"
        seen[f"{run.dataset}: runs with and without groups"][how if run.split else ""].append(run)
    for groups in seen.values():
        groups.pop("", None)  # not recorded
    problems = [
        f"{what} cannot share a table: "
        + "; ".join(f"{digest} in {_named(group)}" for digest, group in groups.items())
        for what, groups in seen.items()
        if len(groups) > 1
    ]
    if problems:
        raise ConfigError("\n".join([*problems, "report them apart" + _way_out(seen)]))
    if unknown := [run for run in runs if not (run.data and run.split)]:
        return [f"data and split are not recorded, so not compared, in {_named(unknown)}"]
    return []


def _way_out(seen: Mapping[str, Mapping[str, object]]) -> str:
    """How to name all but the first of several sets of images of one dataset."""
    sets = [list(groups)[1:] for what, groups in seen.items() if what.endswith("images")]
    flags = [f"--name {images}=NAME" for others in sets for images in others]
    if not flags:
        return ""
    return (
        f", or, if these are different sets, name them: {' '.join(flags)}; for runs to come, "
        "`python -m shards.writer --out SET --name NAME` does"
    )


def _named(runs: Sequence[Run], most: int = 3) -> str:
    more = f" and {len(runs) - most} more" if len(runs) > most else ""
    return ", ".join(str(run.folder) for run in runs[:most]) + more


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings in which runs differ although a row's runs should not, with their values."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in MAY_DIFFER)
    values = {
        name: list(dict.fromkeys(str(run.settings.get(name)) for run in runs)) for name in names
    }
    return {name: found for name, found in values.items() if len(found) > 1}


def mixed_rows(labelled: Iterable[tuple[str, Run]]) -> list[str]:
    """A note for each row, given as (label, run), whose runs differ in their settings."""
    rows: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for label, run in labelled:
        rows[run.dataset, label].append(run)
    return [
        f"{dataset}, {label}: runs differ in {name} ({', '.join(values)})"
        for (dataset, label), runs in rows.items()
        for name, values in differing([run for run in runs if run.settings]).items()
    ]
