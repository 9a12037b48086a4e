"""Checks of what a run reads: its shards and how fast, its plan, the weights."""

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

from shards.opening import open_shards
from shards.randomness import hash64, permutation
from shards.read.index import ShardIndex
from trainer.doctor.lines import Line, Subject
from trainer.doctor.room import gib, room
from trainer.plan.data import Request
from trainer.plan.planning import make_plan
from trainer.prepare.backbone import HUB_FILES, check_backbone, hub_weights
from trainer.process.errors import BAD_CONFIGURATION, short_reason

READING = 3.0
"""Seconds of reading after which its speed is known."""
SAMPLES = 2000
ANSWER = 5.0
"""Seconds that the hub may take."""


def shards(subject: Subject) -> Iterator[Line]:
    """Whether the shard set can be opened and is whole."""
    index = subject.index = open_shards(subject.config.data)
    number = sum(map(index.num_samples, range(len(index.domains))))
    found = f"{index.name}, {len(index.domains)} domains, {number:,} images in {index.root}"
    yield Line(check="shards", found=found)


def plan(subject: Subject) -> Iterator[Line]:
    """Whether these processes can share the run out, and a GPU can hold it."""
    index = subject.index
    if index is None:
        remedy = "see the line on the shards"
        found = "not known without the data"
        yield Line(check="plan", found=found, level="warning", remedy=remedy)
        return
    memory = None
    if torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[1] / 2**30
    request = Request(
        world_size=subject.world.size, num_classes=len(index.classes), domains=len(index.domains),
        gpu_memory=memory,
    )  # fmt: skip
    made = subject.plan = make_plan(subject.config, request)
    found = f"{made.batches.per_process} images a step and process"
    found += f", {gib(made.gpu_bytes)} of a GPU" if memory else ""
    yield Line(check="plan", found=found)
    for number, warning in enumerate(made.warnings, start=1):
        what, _, remedy = warning.partition(": ")
        yield Line(check=f"plan, warning {number}", found=what, level="warning", remedy=remedy)


def reading(subject: Subject) -> Iterator[Line]:
    """How fast one process reads images in random order, with all others at the same time."""
    index = subject.index
    if index is None:
        return
    domain = subject.world.rank % len(index.domains)
    places = permutation(hash64("doctor", subject.world.rank), index.num_samples(domain))
    if index.remote:
        held = index.table(domain)["shard"][places]
        places = places[held == held[0]]
        yield _fetching(index, int(held[0]))
    size = number = 0
    started = time.monotonic()
    for place in places[:SAMPLES]:
        size += len(index.read(domain, int(place)).image)
        number += 1
        if time.monotonic() - started > READING:
            break
    seconds = max(time.monotonic() - started, 1e-6)
    rate, loaders = number / seconds, max(1, subject.config.data.workers)
    found = f"{rate:,.0f} images/s and {size / seconds / 2**20:.3g} MiB/s a loader"
    pace = subject.images_per_second
    slow = rate * loaders < pace
    if pace:
        found += f"; the plan's GPU takes {pace:,.0f} images/s"
    yield Line(
        check="reading", found=found, level="warning" if slow else "ok", worse=-rate,
        remedy="a copy on the node's own disk (STAGE=yes of the SLURM templates, else "
        "--data.cache_dir), or more --data.workers",
    )  # fmt: skip


def _fetching(index: ShardIndex, shard: int) -> Line:
    """How fast a shard comes from far away; it stays in the cache."""
    info, remote = index.shards[shard], index.reader.remote
    assert remote is not None
    if remote.cache.holds(info.file):
        return Line(check="fetching", found=f"{info.file} is in {index.root} already")
    started = time.monotonic()
    index.reader.read(shard, 0, 1)
    rate = info.bytes / max(time.monotonic() - started, 1e-6)
    found = f"{gib(info.bytes)} at {rate / 2**20:.3g} MiB/s"
    return Line(check="fetching", found=found, worse=-rate)


def weights(subject: Subject) -> Iterator[Line]:
    """Whether the backbone's weights are at hand, or the hub that has them answers."""
    config = subject.config.model
    name = check_backbone(config)
    if config.weights != "pretrained":
        yield Line(check="weights", found=f"{config.weights}, not from a hub")
        return
    source, cached = hub_weights(name)
    if cached or not source:
        where = f"in {HF_HUB_CACHE}" if source else "shipped with the trainer"
        yield Line(check="weights", found=f"{name}: {where}")
        return
    found = f"{name} is not in {HF_HUB_CACHE}"
    elsewhere = (
        "download them where there is a network and share HF_HOME, or give --model.weights FILE"
    )
    if is_offline_mode():
        yield Line(
            check="weights", found=f"{found}, and HF_HUB_OFFLINE forbids to fetch it",
            level="failure", remedy=elsewhere, code=BAD_CONFIGURATION,
        )  # fmt: skip
        return
    try:
        told = huggingface_hub.HfApi().model_info(source, timeout=ANSWER, files_metadata=True)
    except Exception as error:  # the client has many, its transport others
        why = f"{found}, and the hub does not give it ({short_reason(error)[:120]})"
        yield Line(
            check="weights", found=why, level="failure", remedy=elsewhere, code=BAD_CONFIGURATION
        )
        return
    sizes = [file.size or 0 for file in told.siblings or () if file.rfilename in HUB_FILES]
    yield Line(check="weights", found=f"{found}; {source} on the hub answers")
    yield room("room: weights", Path(HF_HUB_CACHE), min(sizes, default=0), "HF_HOME")
