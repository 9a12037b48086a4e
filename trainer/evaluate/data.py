"""The data that adapters are looked at on: their own unless the command line says otherwise."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moa.files.origin import Origin
from shards import DataConfig, Decoder, ShardIndex, open_shards
from trainer.evaluate.members import Member, class_difference
from trainer.prepare.provenance import data_hash, split_hash
from trainer.process.errors import ConfigError

RECORDED = ("dataset", "holdout_fraction", "decode", "truncated")
"""Data settings that an adapter has on record, and the command line may change."""
GIVEN = (*RECORDED, "root", "cache_dir", "exclude_list", "include_list", "max_pixels")
"""Data settings that the command line knows."""


@dataclass(frozen=True)
class AdapterData:
    """A shard set as the adapters know it.

    Attributes:
        envs: numbers of the domains asked for.
        trial_seed: seed of the split, whose fraction is the configuration's.
        warnings: what the user should know, one line each.
    """

    config: DataConfig
    index: ShardIndex
    envs: tuple[int, ...]
    trial_seed: int
    warnings: tuple[str, ...]

    @property
    def decoder(self) -> Decoder:
        """What decodes the images."""
        return Decoder(self.config.decode, self.config.truncated, self.config.max_pixels)


def open_data(args: argparse.Namespace, members: Sequence[Member], **more: Any) -> AdapterData:
    """Opens the data that `add_shared_flags` and the adapters name; `more` settings on top.

    What the first adapter on record says is the default.

    Raises:
        ConfigError, DataConfigError: something given cannot work, or fits not these adapters.
        DamagedDataError: the shard set is not what its index promises.
    """
    known = next((m.info.origin for m in members if m.info.origin is not None), None)
    own = {} if known is None else {name: getattr(known, name) for name in RECORDED}
    given = {name: v for name in GIVEN if (v := getattr(args, name)) is not None}
    config = DataConfig(**(own | given | more))
    if problems := config.problems():
        raise ConfigError("\n".join(problems))
    index = open_shards(config)
    classes, source = members[0].info.classes, members[0].source
    if tuple(index.classes) != tuple(classes):
        raise ConfigError(
            f"--adapter: {source} {class_difference(classes, index.classes)} in {index.root}; "
            "evaluate it on data with the same classes in the same order"
        )
    names = dict.fromkeys(args.domains or index.domains)
    envs = tuple(index.domain_number(name, "--domains") for name in names)
    recorded = 0 if known is None else known.trial_seed
    seed = recorded if args.trial_seed is None else args.trial_seed
    return AdapterData(config, index, envs, seed, tuple(_warnings(members, config, index, seed)))


def _warnings(
    members: Sequence[Member], config: DataConfig, index: ShardIndex, trial_seed: int
) -> Iterator[str]:
    """In what the data are not those that each adapter was trained on."""
    fraction = config.holdout_fraction
    images, split = data_hash(index), split_hash(index, trial_seed, fraction)
    for member in members:
        name, origin = member.label, member.info.origin
        if origin is None:
            yield (
                f"{name} does not say on which split it was trained; trial seed {trial_seed} is "
                "taken"
            )
            continue
        if origin.data_hash != images:
            yield (
                f"{name} was trained on other images ({origin.shown_dataset}, data hash "
                f"{origin.data_hash}) than these ({index.name}, {images})"
                f"{_other_domains(origin, index.domains)}"
            )
        elif origin.split_hash != split:
            yield f"{name} was trained {_other_split(origin, trial_seed, fraction, index.group_by)}"
        if (origin.decode, origin.truncated) != (config.decode, config.truncated):
            yield (
                f"{name} was trained with data.decode {origin.decode}, data.truncated "
                f"{origin.truncated}, not {config.decode}, {config.truncated}"
            )


def _other_domains(origin: Origin, domains: Sequence[str]) -> str:
    """Names of the domains that an adapter does not know, and of those that are missing here."""
    new = [name for name in domains if name not in origin.domains]
    gone = [name for name in origin.domains if name not in domains]
    missing = f"; {', '.join(gone)} {'is' if len(gone) == 1 else 'are'} missing" if gone else ""
    if not new:
        return missing
    told = f"; it was not trained on {', '.join(new)}{missing}"
    return f"{told}: if that is only another name, it was" if gone else told


def _other_split(origin: Origin, trial_seed: int, fraction: float, group_by: str | None) -> str:
    """How a training's split differs from the one evaluated, and what that means."""
    if origin.group_by != (group_by or ""):
        then, now = (f"groups of {by!r}" if by else "none" for by in (origin.group_by, group_by))
        return (
            f"on a split of other groups ({then}; here {now}): its training images are in both "
            "`in` and `out`"
        )
    if (origin.trial_seed, origin.holdout_fraction) == (trial_seed, fraction):
        return (
            "with other lists (data.exclude_list, data.include_list): `in` and `out` are other "
            "images than in its training; those of `out` are still unseen, those of `left_out` may "
            "not be"
        )
    return (
        f"on another split (trial seed {origin.trial_seed}, {origin.holdout_fraction:g} held back) "
        f"than the one evaluated (trial seed {trial_seed}, {fraction:g}): its training images are "
        "in both `in` and `out`"
    )
