"""Who am I among the processes: rank and world size, from whatever launched us.

Reads the environment only; starting the process group is `trainer.engine`'s business.
"""

import os
from dataclasses import dataclass

from trainer.process.slurm import rendezvous


@dataclass(frozen=True)
class World:
    """One process among those that train together."""

    rank: int
    """0 to size - 1."""
    size: int
    local_rank: int
    """Number on this host."""
    local_size: int
    """Processes on this host, as far as the launcher tells."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


ALONE = World(rank=0, size=1, local_rank=0, local_size=1)
"""A single process that no launcher knows of."""

# Launcher -> variables of rank, size, local rank, local size. The first whose rank and size are
# set counts; `deepspeed` and `torchrun` both set the first form, with different local sizes. The
# interactive shell of salloc may be a step of one task, where SLURM_NTASKS is still the job's.
_SLURM = ("SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",))
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", *_SLURM),
    ("SLURM_PROCID", "SLURM_NTASKS", *_SLURM),
)


def world_from_environment() -> World:
    """The world that the launcher describes; one process if none does.

    Where SLURM alone tells where its tasks meet, the variables of other launchers are set, too.
    """
    told = os.environ
    for rank, size, local_rank, local_sizes in _LAUNCHERS:
        # Inside a SLURM allocation but outside srun there is no step, hence no task number to use.
        if rank in told and size in told and (rank == "RANK" or "SLURM_STEP_ID" in told):
            if rank != "RANK":
                for name, value in rendezvous(told).items():
                    told.setdefault(name, value)
            number = int(told[size])
            local_size = next((int(told[name]) for name in local_sizes if name in told), 1)
            return World(
                int(told[rank]), number, int(told.get(local_rank, 0)), min(local_size, number)
            )
    return ALONE


def export_world(world: World) -> None:
    """Sets the variables that torch.distributed reads, for launchers that do not."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.size)
