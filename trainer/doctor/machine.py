"""Checks of the machine: software, GPUs, operators, limits, processor cores."""

import math
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from trainer.doctor.lines import Level, Line, Subject
from trainer.process.errors import BAD_CONFIGURATION

DRIVER = Path("/proc/driver/nvidia/version")
INFINIBAND = Path("/sys/class/infiniband")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
OPEN_FILES = 512
"""Shards, the processes' group, logs; a batch in flight has one for each of its tensors."""
FILES_PER_LOADER = 16


def software(subject: Subject) -> Iterator[Line]:
    """Whether torch and DeepSpeed can be imported, and in which time."""
    started = time.monotonic()
    import_module("trainer.engine.collectives")
    seconds = time.monotonic() - started
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    slow = seconds > 60
    yield Line(
        check="software", found=f"{versions}, imported in {seconds:.1f} s", worse=seconds,
        level="warning" if slow else "ok",
        remedy="put the environment or container on the nodes' own disks",
    )  # fmt: skip


def gpus(subject: Subject) -> Iterator[Line]:
    """Whether this process has a GPU, which answers and is nobody else's."""
    import torch

    from trainer.process.device import use_device

    driver = DRIVER.read_text().splitlines()[0].split("  ")[1] if DRIVER.is_file() else ""
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda, driver, os.environ)
        return
    device = use_device(subject.world)
    try:
        matrix = torch.ones(64, 64, device=device)
        total = float((matrix @ matrix).sum())
        assert total == 64**3, f"64 ** 3 is {total:g} there"
        free, size = torch.cuda.mem_get_info(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        remedy = "`nvidia-smi` tells its state; torch must be built for it and for the driver"
        yield Line(check="GPU", found=f"{device}: {reason}", level="failure", remedy=remedy)
        return
    name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
    found = f"{name}, 1 of {count}, {free / 2**30:.0f} of {size / 2**30:.0f} GiB free"
    # Processes of this run that share it have not much more than a context each yet.
    taken = size - free > 0.1 * size
    yield Line(
        check="GPU", found=f"{found}, driver {driver or 'not known'}", worse=size - free,
        level="warning" if taken else "ok",
        remedy="`nvidia-smi` names the processes that hold the rest",
    )  # fmt: skip


def _no_gpu(built: str | None, driver: str, told: Mapping[str, str]) -> Line:
    """The line of a process that would compute on the CPU."""
    given = told.get("SLURM_GPUS_ON_NODE", "0")
    hidden = told.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver and not hidden:
        found = f"torch ({'built for CUDA ' + built if built else 'no CUDA build'}) sees none"
        remedy = "install builds of torch and torchvision for a CUDA that the driver knows"
        found += f", though there is a driver ({driver})"
        return Line(check="GPU", found=found, level="failure", remedy=remedy)
    if given != "0":
        found = f"none is seen of the {given} that SLURM gave: the CPU would compute, in fp32"
        remedy = "a container needs --nv; else tell the site that the node has no driver"
        return Line(check="GPU", found=found, level="warning", remedy=remedy)
    return Line(check="GPU", found="none: the CPU computes, in fp32")


def operators(subject: Subject) -> Iterator[Line]:
    """What DeepSpeed, and with `model.compile` torch, must be able to compile here."""
    import torch

    from trainer.engine.collectives import ON_CPU, OPERATORS, prepare_operators
    from trainer.prepare.compiling import prepare_compiler

    on_cpu = not torch.cuda.is_available()
    prepare_operators(on_cpu)
    folder = Path(os.environ[OPERATORS]) / ON_CPU
    compiled = any(folder.glob("*.so"))
    needed = ("ninja",) if compiled else ("ninja", os.environ.get("CXX") or "c++")
    missing = [program for program in needed if not shutil.which(program)]
    if not on_cpu:
        yield Line(check="operators", found="a GPU needs none of DeepSpeed's")
    elif missing:
        found = f"no {' and no '.join(missing)} on the PATH, to compile DeepSpeed's in {folder}"
        remedy = "g++ (Debian: apt-get install g++; a cluster: module load gcc; or CXX names a "
        remedy += "C++ compiler) and ninja (pip install ninja)"
        yield Line(check="operators", found=found, level="failure", remedy=remedy)
    else:
        when = "compiled before" if compiled else "a minute's work of the first start"
        yield Line(check="operators", found=f"{when}, in {folder}")
    if subject.config.model.compile == "blocks":
        prepare_compiler()
        yield Line(check="operators of model.compile", found="a compiler and a folder are there")


def limits(subject: Subject) -> Iterator[Line]:
    """Open files, and memory that network cards need locked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + FILES_PER_LOADER * subject.config.data.workers
    few = soft < needed
    remedy = f"ulimit -n {needed} before the start"
    if hard < needed:
        remedy = f"the hard limit is {hard}: docker run --ulimit nofile={needed}, or the site's "
        remedy += "limits.conf"
    yield Line(
        check="open files", found=f"{soft} allowed, about {needed} needed", worse=-soft,
        level="failure" if few else "ok", remedy=remedy,
    )  # fmt: skip
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cards = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    used = cards and os.environ.get("NCCL_IB_DISABLE") != "1"
    used = used and subject.world.size > subject.world.local_size
    bound = locked != resource.RLIM_INFINITY
    found = f"{locked / 1024:.0f} KiB may be locked" if bound else "no limit"
    yield Line(
        check="locked memory", found=found if cards else f"{found}; no InfiniBand here",
        level="warning" if used and bound else "ok",
        remedy="InfiniBand locks what it sends: ulimit -l unlimited; of SLURM's tasks that is "
        "LimitMEMLOCK=infinity of slurmd",
    )  # fmt: skip


def cores(subject: Subject) -> Iterator[Line]:
    """Processor cores of this process beside what its loaders and the plan need."""
    world, workers = subject.world, subject.config.data.workers
    seen = float(len(os.sched_getaffinity(0)))
    given = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
    if QUOTA.is_file() and (quota := QUOTA.read_text().split())[0] != "max":
        seen = min(seen, int(quota[0]) / int(quota[1]))
    own = seen if seen <= given else seen / world.local_size
    found = f"{own:.3g} for a training process and {workers} loaders"
    level: Level = "warning"
    remedy, planned = "", 0
    if (pace := subject.images_per_second) and subject.plan and subject.plan.load.loaders:
        planned = math.ceil(pace / subject.plan.rates.loader)
        found += f"; the plan's GPU needs {planned} loaders ({pace:.0f} images/s)"
    if given > seen:
        remedy = f"srun --cpus-per-task={given}: a step does not inherit it"
    elif own < 1 + workers:
        remedy = f"--cpus-per-task={1 + workers} of SLURM, or fewer --data.workers"
    elif planned > max(1, workers):
        remedy = f"--data.workers {planned} and a core for each, or --data.augment_on device"
    else:
        level = "ok"
    yield Line(check="cores", found=found, level=level, remedy=remedy, worse=-own)


def slurm(subject: Subject) -> Iterator[Line]:
    """What SLURM tells, and whether it can be meant."""
    told, world = os.environ, subject.world
    if "SLURM_JOB_ID" not in told:
        yield Line(check="SLURM", found="not in a job")
        return
    tasks = told.get("SLURM_NTASKS", "1")
    step = told.get("SLURM_STEP_ID")
    found = f"job {told['SLURM_JOB_ID']}, {'step ' + step if step else 'no step'}, {tasks} tasks "
    found += f"on {told.get('SLURM_JOB_NODELIST', 'nodes without names')}"
    if step and "RANK" in told and told["RANK"] != told.get("SLURM_PROCID", told["RANK"]):
        found = f"RANK={told['RANK']} of another launcher, SLURM_PROCID={told['SLURM_PROCID']}"
        remedy = "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE MASTER_ADDR MASTER_PORT"
        yield Line(
            check="SLURM", found=found, level="failure", remedy=remedy, code=BAD_CONFIGURATION
        )
    elif world.size == 1 and tasks.isdecimal() and int(tasks) > 1:
        remedy = "`srun` before the command starts all tasks"
        found += "; this is one process"
        yield Line(check="SLURM", found=found, level="warning", remedy=remedy)
    else:
        yield Line(check="SLURM", found=found)
