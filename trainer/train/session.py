"""One run from command line to closing table, and how it ends: lines for the user, an exit code."""

import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from trainer.config.command_line import parse
from trainer.config.hparams import in_words
from trainer.config.run_config import RunConfig
from trainer.engine.leaving import leave_group
from trainer.process.ending import conclude
from trainer.process.slurm import watch_job
from trainer.process.stopping import Stopping, seconds_of
from trainer.process.world import World, world_from_environment

if TYPE_CHECKING:
    from trainer.prepare.parts import Parts

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    world = world_from_environment()
    stopping = Stopping(world.is_main)
    stopping.listen()
    watch_job(os.environ)

    def action() -> None:
        stopping.hear()
        run(parse(argv), world, stopping)

    try:
        return conclude(action, world, stopping, leave_group)
    finally:
        stopping.release()


def run(config: RunConfig, world: World, stopping: Stopping) -> None:
    """Trains as configured, or shows the result of a run that is already finished.

    Whatever can be wrong with the configuration is found before the process group starts.
    """
    # Heavy imports come after the command line has proved legal.
    from rich.console import Console

    import trainer.prepare.libraries  # noqa: F401  (before all that imports timm or DeepSpeed)
    from trainer.checkpoint.run_folder import RunFolder
    from trainer.monitor.console import set_up_logging
    from trainer.prepare.parts import build
    from trainer.prepare.zero_check import zero_problems
    from trainer.train.closing import show_result
    from trainer.train.resume import Start, find_start

    if config.train.time_limit is not None:
        stopping.limit = seconds_of(config.train.time_limit)
    console, parts = Console(), build(config, world, zero_problems(config))
    folder, start = RunFolder(parts.config.run_folder(parts.config.data.held_out or "")), Start()
    with folder.claimed() if world.is_main else nullcontext():
        if world.is_main:
            set_up_logging(folder.log, console)
            start = find_start(folder, parts)
            say_what(parts, world)
            if start.finished:
                again = shlex.quote(str(folder.path))
                log.info("finished before; to start afresh: rm -r %s", again)

        from trainer.engine import collectives
        from trainer.train.assembly import train

        collectives.start(world, parts.config.train.step_deadline)
        start = collectives.from_main(start)
        if not start.finished:
            train(parts, world, folder, start, console, stopping)
        if world.is_main:
            show_result(parts, folder, console)


def say_what(parts: "Parts", world: World) -> None:
    """Logs what this run is."""
    config = parts.config
    log.info(
        "%s on %s, %s held out of %s; processes: %d, precision: %s",
        config.moa.method, config.model.backbone, " and ".join(parts.withheld_names),
        parts.index.name, world.size, config.train.precision,
    )  # fmt: skip
    if config.hparams_seed:
        log.info("hparams_seed %d %s", config.hparams_seed, in_words(config))
    if config.model.compile == "blocks":
        from trainer.prepare.compiling import CACHE

        log.info(
            "compiling the blocks in the first step: minutes, once for all runs (kept in %s); the "
            "losses of an uncompiled or an uninterrupted run differ from these by rounding",
            os.environ[CACHE],
        )
    for section, unused, why in (
        ("moa", config.moa.unused(), f"{config.moa.method} does not use them"),
        ("data", config.data.unused(), "data.root is no remote one"),
    ):
        if unused:
            names = ", ".join(f"{section}.{name}" for name in unused)
            log.warning("without effect, since %s: %s", why, names)
