"""One run from command line to closing table, and how it ends: lines for the user, an exit code."""

import errno
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from trainer.config.command_line import parse
from trainer.config.run_config import RunConfig
from trainer.process.errors import FAILED, FINISHED, RESUBMIT, OutputError, exit_code
from trainer.process.stopping import Stopped, Stopping, seconds_of
from trainer.process.world import World, world_from_environment

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.checkpoint.run_folder import RunFolder
    from trainer.prepare.parts import Parts

log = logging.getLogger(__name__)

CANNOT_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Only writing ends in these; a permission that is missing may as well be one to read."""

OTHERS_WAIT = 10.0
"""Seconds that other ranks leave the main rank to report an error that all of them met; a launcher
that sees it end takes them down meanwhile."""


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    world = world_from_environment()
    stopping = Stopping(world.is_main)
    stopping.listen()
    try:
        return conclude(lambda: run(parse(argv), world, stopping), world, stopping)
    finally:
        stopping.release()


def conclude(action: Callable[[], object], world: World, stopping: Stopping | None = None) -> int:
    """Runs `action` and returns the exit code it ends with.

    Errors that are the user's to mend become plain lines on stderr, once for all ranks. Launchers
    end the ranks that still wait with a signal when they see the first one leave.
    """
    stopping = stopping or Stopping(world.is_main)
    try:
        action()
    except Stopped as stopped:
        if not (world.is_main or stopping.begun):
            # Perhaps only because the main rank has failed, whose exit code shall then count: srun
            # passes on the highest, deepspeed the first.
            stopping.leave_with(FAILED)
            time.sleep(OTHERS_WAIT)
            return FAILED
        stopping.settle()
        if world.is_main:
            logging.getLogger("trainer").warning("%s", stopped)
        return RESUBMIT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE_ERRORS:
            error = OutputError(f"output_dir: cannot write ({error}); free space or give another")
        code = exit_code(error)
        stopping.leave_with(FAILED if code is None else code)
        if code is None:
            raise
        report_error(error, world)
        return code
    return FINISHED


def report_error(error: Exception, world: World) -> None:
    """Prints the lines of `error` on stderr; ranks but the main one wait first, and sign."""
    prefix = "error: "
    if not world.is_main:
        time.sleep(OTHERS_WAIT)
        prefix = f"error (rank {world.rank}): "
    for line in str(error).splitlines():
        sys.stderr.write(f"{prefix}{line}\n")
    sys.stderr.flush()


def run(config: RunConfig, world: World, stopping: Stopping) -> None:
    """Trains as configured, or shows the result of a run that is already finished.

    Whatever can be wrong with the configuration is found before the process group starts.
    """
    # Heavy imports come after the command line has proved legal.
    from trainer.checkpoint.run_folder import RunFolder
    from trainer.monitor.console import set_up_logging, terminal
    from trainer.prepare.parts import build
    from trainer.train.resume import Start, find_start

    if config.train.time_limit is not None:
        stopping.limit = seconds_of(config.train.time_limit)
    console, parts = terminal(), build(config, world)
    folder, start = RunFolder(parts.config.run_folder(parts.config.data.held_out or "")), Start()
    with folder.claimed() if world.is_main else nullcontext():
        if world.is_main:
            set_up_logging(folder.log, console)
            start = find_start(folder, parts)
            say_what(parts, world)
            if start.finished:
                again = shlex.quote(str(folder.path))
                log.info("finished before; to start afresh: rm -r %s", again)

        from trainer.engine import engine  # imports deepspeed, which takes seconds
        from trainer.engine.zero_check import check_zero
        from trainer.train.assembly import train

        check_zero(parts.ds_json, config.ds_config)
        engine.start(world)
        start = engine.from_main(start)
        if not start.finished:
            train(parts, world, folder, start, console, stopping)
        if world.is_main:
            show_result(parts, folder, console)
        engine.stop()


def say_what(parts: "Parts", world: World) -> None:
    """Logs what this run is."""
    config = parts.config
    log.info(
        "%s on %s, %s held out of %s; processes: %d, precision: %s",
        config.moa.method, config.model.backbone, " and ".join(parts.withheld_names),
        config.data.dataset, world.size, config.train.precision,
    )  # fmt: skip
    if unused := config.moa.unused():
        names = ", ".join(f"moa.{name}" for name in unused)
        log.warning("without effect, since %s does not use them: %s", config.moa.method, names)
    if unused := config.data.unused():
        names = ", ".join(f"data.{name}" for name in unused)
        log.warning("without effect, since data.root is no remote one: %s", names)


def show_result(parts: "Parts", folder: "RunFolder", console: "Console") -> None:
    """Prints the closing table of a finished run, and where to look further."""
    from moa.files.saving import WEIGHTS_FILE
    from trainer.checkpoint.run_folder import SPEED, read_rows
    from trainer.train.closing import closing_table

    rows, report = read_rows(folder.results), parts.report
    file, speed = folder.adapter / WEIGHTS_FILE, rows[-1].get(SPEED)
    size = f"{file.stat().st_size / 2**20:.2f} MiB" if file.exists() else "was removed"
    facts = {
        "method": parts.config.moa.method,
        "trainable / total parameters": f"{report.trainable:,} / {report.total:,}",
        "of which head": f"{report.head:,}",
        "adapter file": size,
        "training speed": f"{speed:.0f} images/s" if speed else "not measured",
    }
    for average in folder.averages:  # no part of the selection, so below the table
        name = average.name.removeprefix("adapter-")
        accuracy = rows[-1].get(f"moa/{name}/env{parts.held_out}_in_acc")
        if accuracy is not None:
            facts[f"held-out accuracy, {average.name}"] = f"{100 * accuracy:.1f}"
    console.print(closing_table(rows, parts.index.domains, parts.withheld, facts))
    for line in (
        f"run folder: {folder.path}",
        *([f"routing map: {folder.routing}"] if folder.routing.exists() else []),
        f"curves: tensorboard --logdir {shlex.quote(str(folder.tensorboard))}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
