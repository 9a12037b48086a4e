"""Where the processes of a run meet, and what is said when some do not come."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from trainer.process.errors import PEER_LOST, ConfigError
from trainer.process.world import World

NOTICE = 10.0
"""Seconds without the others after which a rank says that it waits, or less if the limit is short;
ranks beyond the second, of which there may be hundreds, wait six times as long."""


@contextmanager
def meeting(
    world: World, limit: float, leave: Callable[[int], object] = os._exit
) -> Iterator[None]:
    """Within the block the processes meet: says whom it waits for, and ends the process.

    Nothing else can: the main thread waits in torch, which runs no signal handler and has words of
    its own. `limit` are the seconds after which it ends; 0 never ends it.

    Raises `ConfigError`: the variables that a launcher sets cannot be right.
    """
    if world.size == 1:
        yield
        return
    told = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    who = f"rank {world.rank} of {world.size}" + (" (RANK, WORLD_SIZE)" if told else "")
    alone = "; for a run of one process unset RANK WORLD_SIZE" if told else ""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or world.rank >= world.size:
        what = f"{' and '.join(missing)} not set" if missing else "no such rank"
        raise ConfigError(f"{who}: {what}; start with deepspeed, torchrun or srun{alone}")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    place = f"{host}:{port}"

    def give_up() -> None:
        _say(f"error: {who}: the others did not come to {place} in {limit:.0f} s{alone}")
        leave(PEER_LOST)

    wait = min(NOTICE, limit / 3) if limit else NOTICE
    timers = [
        threading.Timer(wait * (1 if world.rank < 2 else 6), _say,
                        [f"{who}: waiting for the others at {place}{alone}"]),
        *([threading.Timer(limit, give_up)] if limit else []),
    ]  # fmt: skip
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[-1]
        what = f"MASTER_ADDR, MASTER_PORT: {who} cannot meet the others at {place} ({reason})"
        if "EADDRINUSE" in reason:
            what = (
                f"MASTER_PORT: {who} cannot open port {port}, which another program uses; give "
                "another (--master_port of deepspeed and torchrun, else MASTER_PORT)"
            )
        raise ConfigError(what + alone) from error
    finally:
        for timer in timers:
            timer.cancel()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
