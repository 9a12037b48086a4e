"""How a command ends: lines for the user, an exit code, once for all ranks."""

import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from trainer.process.errors import FAILED, FINISHED, RESUBMIT, OutputError, exit_code
from trainer.process.stopping import Stopped, Stopping
from trainer.process.world import World

CANNOT_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Only writing ends in these; a permission that is missing may as well be one to read."""

OTHERS_WAIT = 10.0
"""Seconds that other ranks leave the main rank to report an error that all of them met; a launcher
that sees it end takes them down meanwhile."""


def conclude(
    action: Callable[[], object],
    world: World,
    stopping: Stopping | None = None,
    afterwards: Callable[[], object] = lambda: None,
) -> int:
    """Runs `action` and returns the exit code it ends with.

    Errors that are the user's to mend become plain lines on stderr, once for all ranks; of others
    the traceback. Launchers end the ranks that still wait with a signal when they see the first one
    leave. Where all ranks end alike, `afterwards` is done when nothing that `action` held is left.
    """
    stopping = stopping or Stopping(world.is_main)
    code = FINISHED
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
        if not stopping.begun:
            return RESUBMIT
        code = RESUBMIT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE_ERRORS:
            error = OutputError(f"output_dir: cannot write ({error}); free space or give another")
        told = exit_code(error)
        stopping.leave_with(FAILED if told is None else told)
        if told is None:
            traceback.print_exc()
            return FAILED
        report_error(error, world)
        return told
    afterwards()
    return code


def leave(code: int) -> NoReturn:
    """Ends the process with this code, whatever is left in it.

    The interpreter's own end frees what is left in any order, and a GPU's pinned memory can make an
    abort of it: 134 in place of a code that a launcher acts on.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def report_error(error: Exception, world: World) -> None:
    """Prints the lines of `error` on stderr; ranks but the main one wait first, and sign."""
    prefix = "error: "
    if not world.is_main:
        time.sleep(OTHERS_WAIT)
        prefix = f"error (rank {world.rank}): "
    for line in str(error).splitlines():
        sys.stderr.write(f"{prefix}{line}\n")
    sys.stderr.flush()
