"""Where the processes of a run meet, and what is said, and how, when some do not come."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.process.errors import PEER_LOST, ConfigError
from trainer.process.world import World

NOTICE = 10.0
"""Seconds without the others after which a rank says that it waits, or less if the limit is short;
ranks beyond the second, of which there may be hundreds, wait six times as long."""
REPEATS = 5
"""Sums whose time is taken."""


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


class Board:
    """Notes that the processes leave each other by way of the main one, before they are a group.

    So they can also tell what keeps them from becoming one.

    Raises `ConfigError`: the main process cannot be reached within `limit` seconds.
    """

    def __init__(self, world: World, limit: float) -> None:
        self.world = world
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
        serves = world.is_main and not served
        with meeting(world, 0):
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            if not serves:
                _reach(host, port, limit)
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, world.size, serves, timedelta(seconds=limit), wait_for_workers=False
            )
        self._store = dist.PrefixStore("board", store)  # type: ignore[attr-defined]

    def tell(self, name: str, note: object) -> None:
        """Leaves a note, which JSON can hold."""
        self._store.set(f"{name}/{self.world.rank}", json.dumps(note))

    def hear(self, name: str, ranks: Iterable[int], limit: float) -> dict[int, Any]:
        """The notes of some ranks, of those that leave theirs within so many seconds."""
        end, found = time.monotonic() + limit, {}
        for rank in ranks:
            left = timedelta(seconds=max(0.01, end - time.monotonic()))
            with suppress(RuntimeError):  # torch's, when the time is over
                self._store.wait([f"{name}/{rank}"], left)
                found[rank] = json.loads(self._store.get(f"{name}/{rank}"))
        return found

    def reduce(self, device: torch.device, size: int, limit: float) -> float:
        """Bytes/s that a process sends when they all add up `size` bytes; they become a group."""
        gloo = device.type == "cpu"
        # A timeout of NCCL's own ends with an abort.
        timeout = timedelta(seconds=limit) if gloo else timedelta(days=365)
        store = dist.PrefixStore("group", self._store)  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo" if gloo else "nccl", store=store,
            rank=self.world.rank, world_size=self.world.size, timeout=timeout,
        )  # fmt: skip
        numbers = torch.zeros(size // 4, device=device)
        for warm in (True, False):
            started = time.monotonic()
            for _ in range(1 if warm else REPEATS):
                dist.all_reduce(numbers)
            numbers[0].item()  # waits for all of it
        others = 2 * (self.world.size - 1) / self.world.size
        return REPEATS * others * size / (time.monotonic() - started)


def _reach(host: str, port: int, limit: float) -> None:
    """Waits until somebody listens; torch would print a stack, and try for longer than it is told.

    Raises `ValueError`: nobody does.
    """
    end = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((host, port), max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(error.strerror or str(error)) from error
            time.sleep(0.2)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
