"""Builds the parts of a run from its configuration; every mistake in it shows up here."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import moa
from moa.state import AdapterInfo
from shards import (
    DataConfig,
    Decoder,
    DomainStream,
    ShardIndex,
    loader_transform,
    open_shards,
    train_transform,
)
from trainer import ds_json
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.model import check_backbone, create_backbone, outline_backbone
from trainer.world import World


@dataclass(frozen=True)
class Parts:
    """What a run consists of before the process group exists.

    Attributes:
        config: the run with the held-out domain filled in.
        index: the shard set.
        held_out: number of the held-out domain.
        model: backbone with adapters and head, on the CPU, fp32; under ZeRO-3 only its outline
            (meta device) on all ranks but the main one.
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

    def tokens(self, world: World) -> int:
        """Tokens of an adapted layer in one micro-batch of one process."""
        pieces = world.size * self.config.train.accumulation
        patches = self.model.patch_embed.num_patches  # type: ignore[union-attr]
        return self.stream.global_batch // pieces * int(patches + 1)  # type: ignore[operator]

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
    content = ds_json.read(config)
    sharded = content["zero_optimization"].get("stage") == 3
    _check_expert_parallel(config.moa, world, sharded)
    # Under ZeRO-3 one process reads the weights and hands out their parts.
    whole = world.is_main or not sharded
    create = create_backbone if whole else outline_backbone
    backbone = create(config.model, len(index.classes), settings.seed)
    with nullcontext() if whole else torch.device("meta"):
        report = moa.inject(backbone.model, config.moa)
    on_device = config.data.augment_on == "device"
    make_transform = loader_transform if on_device else train_transform
    stream = DomainStream(
        index,
        sources=[env for env in range(len(index.domains)) if env != held_out],
        batch_per_domain=settings.batch_per_domain,
        seed=settings.seed,
        trial_seed=settings.trial_seed,
        transform=make_transform(backbone.data_config, config.data.resolved_augment()),
        mode=config.data.mode,
        window=config.data.window,
        holdout_fraction=config.data.holdout_fraction,
        decoder=decoder(config.data),
    )
    stream.check_world_size(world.size, settings.accumulation)
    _check_validation(stream)
    bf16 = settings.precision == "bf16"
    resolved = ds_json.resolve(config, world.size, stream.global_batch, bf16, report.trainable)
    ds_json.check_buckets(resolved, report.trainable)
    info = AdapterInfo(
        backbone.name, backbone.sha256, config.moa, index.classes, backbone.data_config
    )
    return Parts(config, index, held_out, backbone.model, report, stream, resolved, info)


def _check_expert_parallel(adapters: moa.MoAConfig, world: World, sharded: bool) -> None:
    """Raises `ConfigError` unless the processes can share out the experts."""
    size = adapters.ep_size
    if world.size % size:
        legal = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise ConfigError(
            f"moa.ep_size: {size} does not divide the {world.size} processes; legal are "
            f"{', '.join(map(str, legal))}"
        )
    if size > 1 and sharded:
        raise ConfigError(
            f"moa.ep_size: {size} with ZeRO-3, which shards experts itself and whose engine knows "
            "no expert parallelism; use --moa.ep_size 1, or --ds_config ds_configs/zero2.json"
        )


def decoder(data: DataConfig) -> Decoder:
    """What decodes the images of a run."""
    return Decoder(data.decode, data.truncated)


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
