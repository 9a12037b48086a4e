"""What is wrong with a sweep, before its first run: settings, domains, finished runs of others."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from shards.datasets import held_out_names
from trainer.config.resume_rules import FREE
from trainer.config.run_config import RunConfig, dotted, flat
from trainer.process.errors import ConfigError, did_you_mean
from trainer.sweep.grid import GridRun, is_finished

OWN = {
    "moa.method": "--methods",
    "data.held_out": "--held_out",
    "train.seed": "--seeds",
    "train.trial_seed": "--trial_seed",
    "hparams_seed": "--hparams_seeds",
    "output_dir": "before the settings of all runs",
}
"""Settings in which the runs of a grid differ, and the flag of a grid that decides them."""


def every_domain(config: RunConfig) -> tuple[str, ...]:
    """All domains of the dataset; `ConfigError` if nothing tells them."""
    from trainer.plan.data import domain_names

    if (domains := domain_names(config)) is None:
        raise ConfigError("--held_out: the dataset does not fix its domains; list them")
    return tuple(domains)


@dataclass(frozen=True)
class Shared:
    """Flags of `trainer/run.py` that many runs have in common.

    Attributes:
        flags: of all runs.
        of_methods: pairs of a method and a flag of its runs, which wins over those of all.
    """

    flags: Sequence[str] = ()
    of_methods: Sequence[tuple[str, str]] = ()

    def of(self, method: str) -> list[str]:
        """All that the runs of a method share."""
        return [*self.flags, *(flag for name, flag in self.of_methods if name == method)]


def check(
    root: Path,
    runs: Sequence[GridRun],
    shared: Shared,
    parse: Callable[[list[str]], RunConfig],
    defaults: Collection[str] = (),
) -> dict[tuple[str, int], RunConfig]:
    """Raises `ConfigError` for what no run in `root` could do, or a finished one did otherwise.

    Flags of all runs that are named in `defaults` are the only value of their list in the grid.
    `parse` makes a configuration of a run's flags.

    Returns:
        A configuration for each method and set of hyper-parameters.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    given = {_name(flag) for flag in shared.flags} - set(defaults)
    given |= {_name(flag) for _, flag in shared.of_methods}
    problems = [
        f"--{name}: cannot be the same for every run; give it as {flag}"
        for name, flag in OWN.items()
        if name in given
    ]
    problems += [
        f"--set {method}:{flag.removeprefix('--')}: the sweep has no such method; legal are "
        f"{', '.join(methods)}{did_you_mean(method, methods)}"
        for method, flag in shared.of_methods
        if method not in methods
    ]
    configs: dict[tuple[str, int], RunConfig] = {}
    for run in {_kind(run): run for run in reversed(runs)}.values():  # one of each
        try:
            configs[_kind(run)] = parse([*shared.of(run.method), *run.flags(root)])
        except ConfigError as error:
            problems += str(error).splitlines()
    if configs:
        problems += _unknown_domains(next(iter(configs.values())), runs)
    finished = [run for run in runs if _kind(run) in configs and is_finished(root / run.name)]
    differing = (differences(root, run, configs[_kind(run)]) for run in finished)
    problems += next(filter(None, differing), [])  # one example is enough
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return configs


def _kind(run: GridRun) -> tuple[str, int]:
    """Runs of one kind have the same settings but for seeds, domain and folder."""
    return run.method, run.hparams_seed


def _name(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0]


def _unknown_domains(config: RunConfig, runs: Sequence[GridRun]) -> list[str]:
    from trainer.plan.data import domain_names

    domains = domain_names(config) or ()
    names = {name for run in runs for name in held_out_names(run.held_out, domains)}
    return [
        f"--held_out: no domain {name!r}; legal are {', '.join(domains)}"
        for name in sorted(names)
        if domains and name not in domains
    ]


def differences(root: Path, run: GridRun, config: RunConfig) -> list[str]:
    """In what a finished run differs from its method's settings as asked for, one line each."""
    folder = root / run.name
    kept = folder / "config.yaml"
    if not kept.is_file():
        return [f"{folder}: holds a finished run without its config.yaml; move that folder away"]
    found = flat(RunConfig()) | dict(dotted(yaml.safe_load(kept.read_text(encoding="utf-8"))))
    asked = flat(replace(config, moa=config.moa.resolved())) | run.settings(root)
    return [
        f"{name}: the finished run in {folder} has {found[name]!r}, now {value!r}; give "
        "another --output_dir, or remove that folder"
        for name, value in asked.items()
        if found[name] != value
        and (name not in FREE or name == "train.steps")
        and value not in (None, "auto")
    ]
