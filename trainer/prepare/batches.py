"""Batch arithmetic of a run: images, steps, accumulation, legal world sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.stream.mixing import DomainMix
from shards.stream.worker_faults import check_shared_memory
from trainer.config.run_config import RunConfig
from trainer.process.world import World


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Images and steps; `epochs` by source domain is empty where sizes are not known."""

    domains: int
    source_domains: int
    batch_per_domain: int
    global_batch: int
    per_process: int
    accumulation: int
    micro_batch: int
    legal_world_sizes: list[int]
    steps: int
    images_seen: int
    epochs: dict[str, float]
    evaluations: int
    checkpoints: int


class _Cut(DomainMix):
    """The cutting of a global batch alone, without a shard set."""

    def __init__(self, domains: int, batch_per_domain: int) -> None:
        self.sources, self.batch_per_domain = tuple(range(domains)), batch_per_domain


def batch_arithmetic(
    config: RunConfig, world_size: int, domains: int, sources: int, sizes: Mapping[str, int]
) -> Batches:
    """Batches, steps and what follows from them, if `sources` of all domains are trained on.

    `sizes` has the training images of each of these; it is empty if they are not known.

    Raises `DataConfigError`: the global batch cannot be cut for the processes and micro-batches.
    """
    train, cut = config.train, _Cut(sources, config.train.batch_per_domain)
    cut.check_world_size(world_size, train.accumulation)
    per_process, last = cut.global_batch // world_size, train.steps - 1
    seen = train.steps * train.batch_per_domain
    return Batches(
        domains=domains,
        source_domains=sources,
        batch_per_domain=train.batch_per_domain,
        global_batch=cut.global_batch,
        per_process=per_process,
        accumulation=train.accumulation,
        micro_batch=per_process // train.accumulation,
        legal_world_sizes=cut.legal_world_sizes(),
        steps=train.steps,
        images_seen=train.steps * cut.global_batch,
        epochs={domain: seen / size for domain, size in sizes.items()},
        evaluations=last // train.eval_every + 1 + (last % train.eval_every > 0),
        checkpoints=math.ceil(train.steps / config.checkpoint.every),
    )


def check_prefetching(
    config: RunConfig, world: World, global_batch: int, data_config: Mapping[str, Any]
) -> None:
    """Raises `DataConfigError` unless what loaders make ahead fits into the host's shared memory.

    The loader of training and that of evaluations are alive at the same time.
    """
    train = config.train
    own = global_batch // (world.size * train.accumulation)
    beside = 3 * global_batch // train.batch_per_domain if config.data.mix != "none" else 0
    images = own + min(own, beside) + train.eval_batch
    size = images * math.prod(data_config["input_size"])  # a byte each
    check_shared_memory(size, config.data.workers, world.local_size)
