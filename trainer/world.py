"""Who am I among the processes: rank, world size and device, from whatever launched us.

Reads the environment only; starting the process group is `trainer.engine`'s business.
"""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """One process among those that train together.

    Attributes:
        rank: global number, 0 to size - 1.
        size: number of processes.
        local_rank: number on this host.
        local_size: processes on this host, as far as the launcher tells.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


# Launcher -> variables of rank, size, local rank, local size. The first whose rank and size are
# set counts; `deepspeed` and `torchrun` both set the first form, with different local sizes.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",)),
)


def world_from_environment() -> World:
    """The world that the launcher describes; one process if none does."""
    env = os.environ
    for rank, size, local_rank, local_sizes in _LAUNCHERS:
        # Inside a SLURM allocation but outside srun there is no step, hence no task number to use.
        if rank in env and size in env and (rank == "RANK" or "SLURM_STEP_ID" in env):
            local_size = next((env[name] for name in local_sizes if name in env), "1")
            return World(
                int(env[rank]), int(env[size]), int(env.get(local_rank, 0)), int(local_size)
            )
    return World(0, 1, 0, 1)


def export_world(world: World) -> None:
    """Sets the variables that torch.distributed reads, for launchers that do not."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))


def free_port() -> int:
    """A TCP port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
