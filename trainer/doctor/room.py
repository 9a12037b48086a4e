"""Checks of room: on disks, for their files, and in shared memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.embedded.digits import default_cache
from shards.stream import worker_faults
from trainer.doctor.lines import Level, Line, Subject
from trainer.process.errors import CANNOT_WRITE

PROBE = 2**20
"""Bytes that are written to see whether a disk takes them, whatever it says of its room."""
LEAST = 100 * 2**20
"""Bytes of any of these folders; of a run folder beside adapters and checkpoints."""
FILES = 1000
"""That a run, or a cache, may well have."""
SHARED = 64 * 2**20
"""Of /dev/shm, below which processes of a host have no room to talk."""


def folders(subject: Subject) -> Iterator[Line]:
    """Room where a run writes."""
    config, plan = subject.config, subject.plan
    needed = LEAST
    if plan is not None:  # one more is there while it is written
        needed += (config.checkpoint.keep + 1) * plan.checkpoint_bytes + 4 * plan.adapter_bytes
    yield room("room: output", Path(config.output_dir or "outputs"), needed, "--output_dir")
    # Not every run writes to the others.
    yield room("room: cache", default_cache(), LEAST, "MOA_CACHE", "warning")
    yield room("room: temporary files", Path(tempfile.gettempdir()), LEAST, "TMPDIR", "warning")
    if config.data.cache_dir is not None:
        wanted = int(config.data.cache_gib * 2**30)
        if subject.index is not None and subject.index.remote:
            there = {path.name: path.stat().st_size for path in subject.index.root.iterdir()}
            sizes = {shard.file: shard.bytes for shard in subject.index.shards}
            wanted = min(wanted, sum(sizes.values())) - sum(there.get(name, 0) for name in sizes)
        setting = "--data.cache_dir, or a smaller --data.cache_gib"
        yield room("room: shards", Path(config.data.cache_dir), max(0, wanted), setting, "warning")


def room(check: str, path: Path, needed: int, setting: str, level: Level = "failure") -> Line:
    """Whether a folder, or the one that it will be made in, takes files of so many bytes.

    `level` is that of a folder that does not.
    """
    place = path.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    remedy = f"free space, or name another: {setting}"
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(bytes(PROBE))
            os.fsync(file.fileno())
            if (size := os.fstat(file.fileno()).st_size) < PROBE:
                raise OSError(28, f"only {size} of {PROBE} bytes were taken")
        status = os.statvfs(place)
    except OSError as error:
        found = f"{place} cannot be written ({error.strerror})"
        return Line(check=check, found=found, level=level, remedy=remedy, code=CANNOT_WRITE)
    free = status.f_bavail * status.f_frsize
    files = status.f_favail if status.f_files else None  # some have no table of them
    found = f"{gib(free)} free of {place}, {gib(needed)} wanted"
    found += f"; room for {files:,} files" if files is not None else ""
    few = files is not None and files < FILES
    return Line(
        check=check, found=found, level=level if few or free < needed else "ok", remedy=remedy,
        code=CANNOT_WRITE, worse=-free,
    )  # fmt: skip


def shared_memory(subject: Subject) -> Iterator[Line]:
    """Room in /dev/shm for what the loaders of this host make ahead."""
    from trainer.prepare.backbone import outline
    from trainer.prepare.batches import check_prefetching

    config, plan = subject.config, subject.plan
    free = shutil.disk_usage(worker_faults.SHARED_MEMORY).free
    found = f"{gib(free)} free of {worker_faults.SHARED_MEMORY}"
    if plan is not None and config.data.workers:
        backbone, _ = outline(config.model, config.moa, 2)
        check_prefetching(config, subject.world, plan.batches.global_batch, backbone.data_config)
        found += f", enough for data.workers = {config.data.workers}"
    yield Line(
        check="shared memory", found=found, level="warning" if free < SHARED else "ok",
        remedy="loaders and NCCL need it: start the container with a larger one (`docker run "
        "--shm-size=8g` or `--ipc=host`)", worse=-free,
    )  # fmt: skip


def gib(size: float) -> str:
    """Bytes as they are shown."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"
