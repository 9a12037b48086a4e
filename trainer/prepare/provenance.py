"""What a run tells in its adapters about where they come from."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moa.files.origin import Origin
from shards import ShardIndex
from trainer.config.command_line import LAUNCHER_FLAGS
from trainer.config.run_config import ROOT, RunConfig
from trainer.identity import data_hash, split_hash
from trainer.process.world import World


def origin_of(
    config: RunConfig, index: ShardIndex, withheld: Sequence[int], world: World
) -> Origin:
    """The origin of every adapter that a run writes.

    Args:
        config: the run.
        index: its data.
        withheld: numbers of the domains that are not trained on, the target first.
        world: the processes that train.
    """
    fraction, trial_seed = config.data.holdout_fraction, config.train.trial_seed
    return Origin(
        dataset=index.dataset,
        domains=index.domains,
        held_out=index.domains[withheld[0]],
        also_held_out=tuple(index.domains[env] for env in withheld[1:]),
        trial_seed=trial_seed,
        holdout_fraction=fraction,
        seed=config.train.seed,
        data_hash=data_hash(index),
        split_hash=split_hash(index, trial_seed, fraction),
        command=shown_command(sys.argv),
        processes=world.size,
        weights=config.model.weights,
        decode=config.data.decode,
        truncated=config.data.truncated,
    )


def shown_command(argv: Sequence[str]) -> str:
    """A command line as one would type it, without what launchers append to it."""
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
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    start = ["python", str(script)] if script.suffix == ".py" else [str(script)]
    return shlex.join([*start, *kept])
