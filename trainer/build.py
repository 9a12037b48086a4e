"""Builds the parts of a run from its configuration; every mistake in it shows up here."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import moa
from moa.state import AdapterInfo
from shards import DomainStream, ShardIndex, open_shards, train_transform
from trainer import ds_json
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.model import check_backbone, create_backbone
from trainer.world import World


@dataclass(frozen=True)
class Parts:
    """What a run consists of before the process group exists.

    Attributes:
        config: the run with the held-out domain filled in.
        index: the shard set.
        held_out: number of the held-out domain.
        model: backbone with adapters and head, on the CPU, fp32.
        report: what `inject` did.
        stream: the training data.
        ds_json: complete DeepSpeed configuration.
        info: what saved adapters belong to.
    """

    config: RunConfig
    index: ShardIndex
    held_out: int
    model: nn.Module
    report: moa.InjectReport
    stream: DomainStream
    ds_json: dict[str, Any]
    info: AdapterInfo

    @property
    def held_out_name(self) -> str:
        """Name of the held-out domain."""
        return self.index.domains[self.held_out]


def build(config: RunConfig, world: World) -> Parts:
    """Builds and checks all parts; cheap checks first.

    Raises:
        ConfigError, MoAConfigError, DataConfigError: a setting that cannot work.
        DamagedDataError: the shard set is not what its index promises.
    """
    check_backbone(config.model)
    index = open_shards(config.data)
    config, held_out = _resolve(config, index)
    settings = config.train
    backbone = create_backbone(config.model, len(index.classes), settings.seed)
    report = moa.inject(backbone.model, config.moa)
    stream = DomainStream(
        index,
        sources=[env for env in range(len(index.domains)) if env != held_out],
        batch_per_domain=settings.batch_per_domain,
        seed=settings.seed,
        trial_seed=settings.trial_seed,
        transform=train_transform(backbone.data_config, config.data.resolved_augment()),
        mode=config.data.mode,
        holdout_fraction=config.data.holdout_fraction,
    )
    stream.check_world_size(world.size, settings.accumulation)
    _check_validation(stream)
    bf16 = settings.precision == "bf16"
    resolved = ds_json.resolve(config, world.size, stream.global_batch, bf16)
    ds_json.check_buckets(resolved, report.trainable)
    info = AdapterInfo(
        backbone.name, backbone.sha256, config.moa, index.classes, backbone.data_config
    )
    return Parts(config, index, held_out, backbone.model, report, stream, resolved, info)


def _resolve(config: RunConfig, index: ShardIndex) -> tuple[RunConfig, int]:
    """Fills in held-out domain, precision and the method's defaults; also that domain's number."""
    name = config.data.held_out or index.domains[-1]
    number = index.domain_number(name)
    if len(index.domains) < 2:
        raise ConfigError(
            f"data.held_out: {name!r} is the only domain of {index.root}; training needs at least "
            "one more"
        )
    data, train = replace(config.data, held_out=name), config.train
    if train.precision == "auto":
        train = replace(train, precision="bf16" if torch.cuda.is_available() else "fp32")
    return replace(config, data=data, train=train, moa=config.moa.resolved()), number


def _check_validation(stream: DomainStream) -> None:
    """Every source domain must keep an image for validation, or selection would be arbitrary."""
    for env in stream.sources:
        if stream.num_train(env) == stream.index.num_samples(env):
            raise ConfigError(
                f"data.holdout_fraction: {stream.holdout_fraction} of the "
                f"{stream.num_train(env)} images of {stream.index.domains[env]!r} is not one image "
                "to validate on; raise it"
            )
