"""What a plan knows of the data: from its flags, a shard set at hand, or the registry."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.run_config import RunConfig
from trainer.plan.measured import MeasuredStep
from trainer.process.errors import ConfigError

if TYPE_CHECKING:
    from shards import ShardIndex


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks beyond the run itself; None: from the dataset, or not asked."""

    world_size: int = 1
    gpu_memory: float | None = None
    """GiB"""
    num_classes: int | None = None
    domains: int | None = None
    json: bool = False
    measured: tuple[MeasuredStep, ...] = ()
    """Instead of assumed rates."""
    methods: tuple[str, ...] = ()
    """If there are any, a table of them is planned and not one run."""
    seeds: int = 1
    """Of that table."""


def index_at_hand(config: RunConfig) -> "ShardIndex | None":
    """The index of the run's shard set, if that is a local folder that exists."""
    from shards import ShardIndex

    root = config.data.root
    if root is None or not (Path(root) / "index.json").is_file():
        return None
    return ShardIndex.load(root)


def domain_names(config: RunConfig) -> tuple[str, ...] | None:
    """Domains in order: of the shard set if it is at hand, else of the registry; None: unknown."""
    from shards.datasets import DATASETS

    index = index_at_hand(config)
    return DATASETS[config.data.dataset].domains if index is None else index.domains


def known_data(config: RunConfig, request: Request) -> tuple[int, int, int, dict[str, int], int]:
    """Domains, classes and sizes: from the flags, the shard set if it is at hand, the registry.

    Returns:
        Number of domains, of those trained on, of classes, training images of each source domain
        where known, and images of all domains (0: not known).

    Raises:
        ConfigError: a number that nothing tells, or a held-out domain that does not exist.
    """
    from shards.datasets import DATASETS, held_out_names

    spec, index = DATASETS[config.data.dataset], index_at_hand(config)
    names, samples, classes = spec.domains, spec.samples, spec.num_classes
    if index is not None:
        names, classes = index.domains, len(index.classes)
        samples = tuple(index.num_samples(number) for number in range(len(index.domains)))
    number = request.domains or (len(names) if names else None)
    classes = request.num_classes or classes
    missing = [
        f"{flag}: dataset {spec.name!r} does not fix it; give a number"
        for flag, value in (("--domains", number), ("--num_classes", classes))
        if value is None
    ]
    if number is None or classes is None:
        raise ConfigError("\n".join(missing))
    held_out = held_out_names(config.data.held_out or (names or ("",))[-1], names or ())
    if names is None or number != len(names):
        return number, number - len(held_out), classes, {}, 0
    if unknown := [name for name in held_out if name not in names]:
        raise ConfigError(
            f"data.held_out = {unknown[0]!r}: not a domain of {spec.name}; "
            f"legal: {', '.join(names)}"
        )
    sizes = dict(zip(names, samples or (), strict=False))
    held_back, trial = config.data.holdout_fraction, config.train.trial_seed
    kept = {d: n - int(n * held_back) for d, n in sizes.items() if d not in held_out}
    if index is not None and index.group_by is not None:
        from shards.stream.split import split_domain

        kept = {d: len(split_domain(index, names.index(d), trial, held_back)[0]) for d in kept}
    return number, number - len(held_out), classes, kept, sum(sizes.values())


def images_evaluated(
    config: RunConfig, evaluations: int, kept: Mapping[str, int], whole: int
) -> int:
    """Images that a run's evaluations read, those of its averages included; 0: sizes not known."""
    back = config.data.holdout_fraction
    out = round(sum(kept.values()) * back / (1 - back))
    read = evaluations * whole
    if config.eval.mode == "selection":  # at the end two adapters are evaluated on the rest
        read = evaluations * out + 2 * (whole - out)
    return read * (1 + len(config.average.names)) if whole else 0
