"""The processes' group: joined, left, and the sums and broadcasts over it."""

import errno
import gc
import hashlib
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import groups
from torch import Tensor
from torch.distributed import distributed_c10d

from trainer.engine.rendezvous import meeting
from trainer.process.device import use_device
from trainer.process.errors import OutputError
from trainer.process.watchdog import FIRST_STEP
from trainer.process.world import World, export_world

log = logging.getLogger(__name__)
T = TypeVar("T")

OPERATORS = "TORCH_EXTENSIONS_DIR"
"""Environment variable: the folder of compiled operators."""
ON_CPU = "deepspeed_shm_comm"
"""What DeepSpeed compiles to communicate on CPUs."""
MEETING = 1800.0
"""Seconds in which the processes of a command without a watchdog must have met."""
UNENDING = timedelta(days=365)
"""Where a watchdog looks after the collectives: a timeout of NCCL's own ends with an abort."""


def start(world: World, deadline: float | None = None) -> None:
    """Joins the process group: NCCL on GPUs, gloo on CPUs.

    `deadline` are the seconds of `train.step_deadline`, if a watchdog keeps it; the processes must
    meet in the time that it gives a first step. Then no group ends a collective by a timeout of its
    own, none of those either that DeepSpeed makes.

    Raises `ConfigError`: they cannot meet.
    """
    device = use_device(world)
    share_cores(world)
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    prepare_operators(device.type == "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.14 renamed collectives that DeepSpeed, and we for older releases, call at every step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    _import_muon()
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit, timeout = MEETING, timedelta(seconds=MEETING)
    if deadline is not None:
        limit, timeout = FIRST_STEP * deadline, UNENDING
        # What every later group takes that is made without a timeout, as DeepSpeed makes them.
        distributed_c10d.default_pg_timeout = timeout
        distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    with meeting(world, limit):
        export_world(world)
        if world.size == 1:  # alone it needs no port, which another program may take first
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
        dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects the ranks only now


def share_cores(world: World) -> None:
    """Shares out the cores among the processes of the host, unless OMP_NUM_THREADS is set.

    Processes that each take every core only get into each other's way, be it with an optimizer that
    a GPU leaves to the CPU. Cores that SLURM gave to this task alone are its own.
    """
    if world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        own = cores <= int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
        torch.set_num_threads(cores if own else max(1, cores // world.local_size))


def prepare_operators(cpu: bool) -> None:
    """Lets this environment find ninja, and DeepSpeed's compiled operators again.

    Environments of one user share torch's folder of operators. DeepSpeed compiles them anew, a
    silent minute, whenever the paths of its headers differ from the last time; two environments
    would undo each other's work at every start. What the user set stays. With `cpu` the processes
    communicate on CPUs, and a first compilation is announced.

    Raises `OutputError`: it is due, and the folder cannot be written.
    """
    # Where an environment that was not activated has ninja, PATH does not lead there.
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    folder = operators_folder()
    os.environ[OPERATORS] = str(folder)
    if cpu and not any((folder / ON_CPU).glob("*.so")):
        try:
            if not folder.is_absolute():
                raise FileNotFoundError(errno.ENOENT, "HOME names no folder")
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OutputError(
                f"{OPERATORS}: {folder} cannot be written ({error.strerror}), where DeepSpeed's "
                f"operator is compiled once; set {OPERATORS} to a folder that can"
            ) from error
        log.info("compiling DeepSpeed's operator: about a minute, once per environment")


def operators_folder() -> Path:
    """Where DeepSpeed's operators lie that were compiled for this environment."""
    environment = f"{sys.prefix} {sys.version} {torch.__version__}"
    name = hashlib.sha256(environment.encode()).hexdigest()[:12]
    own = os.path.expanduser(f"~/.cache/torch_extensions/moa-trainer-{name}")
    return Path(os.environ.get(OPERATORS, own))


def _import_muon() -> None:
    """Imports DeepSpeed's Muon optimizer without compiling its kernels.

    Every ZeRO engine imports it, if only to see that the optimizer is another, and its kernels load
    torch's compiler: more than a second of every process's start.
    """
    real = getattr(compiler, "compile", None)
    if real is None:  # a release that has nothing to compile there
        return
    compiler.compile = lambda: lambda kernel: kernel
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:
        pass  # releases before Muon
    finally:
        compiler.compile = real


def stop() -> None:
    """Leaves the process group, after what is left of models has gone."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    groups._WORLD_GROUP = None  # DeepSpeed's copy, which a later start would take for its own


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, without gradient."""
    return add_up(value.detach().clone())


def add_up(value: Tensor) -> Tensor:
    """Makes `value` the sum of it over all ranks, in place."""
    dist.all_reduce(value)
    return value


def sum_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sum of each of some numbers over all ranks."""
    total: list[float] = sum_over_ranks(torch.tensor(numbers, device=device)).tolist()
    return total


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over all ranks; in backward every rank receives the sum of all ranks' gradients.

    A loss f(sum) computed alike on R ranks thus gives each rank R times the gradient of its part,
    which the engine's division by R turns into the gradient of f for the global batch.
    """
    if dist.get_world_size() == 1:
        return value
    result: Tensor = _SumOverRanks.apply(value)
    return result


class _SumOverRanks(torch.autograd.Function):
    """all_reduce(SUM) whose backward is the same sum over the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


def gathered(value: Tensor) -> Tensor:
    """The ranks' values, all of one shape, one behind the other along the first axis."""
    if dist.get_world_size() == 1:
        return value
    whole = value.new_empty(dist.get_world_size() * len(value), *value.shape[1:])
    dist.all_gather_into_tensor(whole, value.contiguous())
    return whole


def average_gradient(parameter: Tensor, gradient: Tensor) -> int:
    """Averages the ranks' gradients of a parameter in place, as DeepSpeed does.

    Those of experts are summed over the ranks that own the same ones, and divided by all.

    Returns:
        The number of ranks that hold the parameter.
    """
    group = None
    if not getattr(parameter, "allreduce", True):
        group = groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    dist.all_reduce(gradient, group=group)
    gradient.div_(dist.get_world_size())
    return dist.get_world_size(group)


def from_main(value: T) -> T:
    """The main rank's `value` (any picklable object), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
