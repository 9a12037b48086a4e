"""What a run tells in its adapters about where they come from."""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moa.files.origin import Origin
from shards import ShardIndex
from shards.addresses import COMMAND, without_secrets
from shards.stream.evaluation import split_places
from trainer.config.command_line import LAUNCHER_FLAGS
from trainer.config.run_config import ROOT, RunConfig
from trainer.process.world import World


def origin_of(
    config: RunConfig, index: ShardIndex, withheld: Sequence[int], world: World
) -> Origin:
    """The origin of every adapter that a run writes; the first domain withheld is the target."""
    fraction, trial_seed = config.data.holdout_fraction, config.train.trial_seed
    return Origin(
        dataset=index.dataset, domains=index.domains, held_out=index.domains[withheld[0]],
        dataset_name="" if index.name == index.dataset else index.name,
        also_held_out=tuple(index.domains[number] for number in withheld[1:]),
        trial_seed=trial_seed, holdout_fraction=fraction, seed=config.train.seed,
        data_hash=data_hash(index), split_hash=split_hash(index, trial_seed, fraction),
        command=shown_command(sys.argv), processes=world.size, weights=config.model.weights,
        decode=config.data.decode, truncated=config.data.truncated,
        precision=config.train.precision, compiled=config.model.compile.removeprefix("off"),
        group_by=index.group_by or "",
    )  # fmt: skip


def shown_command(argv: Sequence[str]) -> str:
    """A command line as one would type it, without secrets and what launchers append to it."""
    script, rest = Path(argv[0] or "python"), list(argv[1:])
    flags = {f"--{name}" for name in LAUNCHER_FLAGS}
    kept: list[str] = []
    while rest:
        token = rest.pop(0)
        name, equals, _ = token.partition("=")
        if name not in flags:
            kept.append(token)
        elif not equals and rest:
            rest.pop(0)
    if script == ROOT / "trainer" / "run.py" and not (ROOT / "pyproject.toml").exists():
        start = ["moa-train"]  # installed
    else:
        script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
        start = ["python", str(script)] if script.suffix == ".py" else [str(script)]
    return shlex.join([*start, *map(without_secrets, kept)])


def shareable(origin: Origin) -> Origin:
    """As this release would have written it; older ones wrote down whole commands."""
    try:
        words = shlex.split(origin.command)
    except ValueError:  # written by something else
        words = [f"{COMMAND} {origin.command}"]
    shown = [*map(without_secrets, words)]
    return origin if shown == words else replace(origin, command=shlex.join(shown))


DIGITS = 16


def data_hash(index: ShardIndex) -> str:
    """Hash of domains, classes, and every image's label, size and checksum in order.

    How the images are packed into shards does not matter.
    """
    digest = hashlib.sha256(repr((index.domains, index.classes)).encode())
    for domain in range(len(index.domains)):
        table = index.table(domain)
        for column in ("label", "size", "crc32"):
            digest.update(np.ascontiguousarray(table[column]).tobytes())
    return digest.hexdigest()[:DIGITS]


def split_hash(index: ShardIndex, trial_seed: int, holdout_fraction: float) -> str:
    """Hash of which samples of each domain are `in` and `out`; what a list leaves out is neither.

    The same for every held-out domain of one trial seed.
    """
    digest = hashlib.sha256()
    for domain in range(len(index.domains)):
        for split in ("in", "out"):
            images = split_places(
                index, domain, split, trial_seed=trial_seed, holdout_fraction=holdout_fraction
            )
            digest.update(f"{domain} {split} ".encode())
            digest.update(np.sort(images).astype("<i8").tobytes())
    return digest.hexdigest()[:DIGITS]
