"""Builds the parts of a run from its configuration; every mistake in it shows up here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import moa
from moa.files.reading import AdapterInfo
from moa.layers.dropout import drop_features
from moa.model.heads import head_settings
from moa.model.injection import classifier
from shards import Decoder, DomainStream, ShardIndex, loader_transform, open_shards
from shards.datasets import held_out_names
from shards.stream.evaluation import Split, split_places
from trainer.config import deepspeed_json
from trainer.config.run_config import RunConfig
from trainer.objectives.objective import check_objective
from trainer.prepare.backbone import check_backbone, create_backbone, outline
from trainer.prepare.batches import batch_arithmetic, check_prefetching
from trainer.prepare.capturing import check_captured
from trainer.prepare.compiling import check_compiled, prepare_compiler
from trainer.prepare.footprint import forward_only
from trainer.prepare.image_size import size_arguments
from trainer.prepare.provenance import origin_of
from trainer.prepare.text_head import use_text_head
from trainer.process.errors import ConfigError, noted
from trainer.process.world import World


@dataclass(frozen=True)
class Parts:
    """What a run consists of before the process group exists."""

    config: RunConfig
    """With the held-out domain and whatever else was left open filled in."""
    index: ShardIndex
    withheld: tuple[int, ...]
    """Numbers of the domains that are not trained on; the first is the target."""
    model: nn.Module
    """With adapters and head, on the CPU, fp32; its outline (meta device) on all ranks but the main
    one."""
    report: moa.InjectReport
    stream: DomainStream
    ds_json: dict[str, Any]
    """The complete DeepSpeed configuration."""
    info: AdapterInfo

    def tokens(self, world: World) -> int:
        """Tokens of an adapted layer in one micro-batch of one process; 0 if nothing needs them."""
        config = self.config
        if config.moa.ep_size == 1 or config.moa.transport != "auto":
            return 0
        backbone, _ = outline(config.model, config.moa, len(self.index.classes))
        images = self.stream.global_batch // (world.size * config.train.accumulation)
        _, tokens = forward_only(backbone.model, 1)
        return images * tokens

    @property
    def held_out(self) -> int:
        """Number of the held-out domain, the target."""
        return self.withheld[0]

    @property
    def withheld_names(self) -> tuple[str, ...]:
        """Names of the domains that are not trained on, the target first."""
        return tuple(self.index.domains[number] for number in self.withheld)


def build(config: RunConfig, world: World, problems: Sequence[str] = ()) -> Parts:
    """Builds and checks all parts; what needs no weights first, and all of that together.

    `problems` that were found with the configuration before are told with it.

    Raises:
        ConfigError, MoAConfigError, DataConfigError: a setting that cannot work.
        DamagedDataError: the shard set is not what its index promises.
    """
    config, index, withheld = _checked(config, world, [*problems])
    settings = config.train
    texts: dict[str, Any] = {}
    if not world.is_main:  # one process reads and hashes the weights; the engine hands them out
        backbone, report = outline(config.model, config.moa, len(index.classes))
    else:
        backbone = create_backbone(config.model, len(index.classes), settings.seed)
        if config.model.head_init == "text":
            texts = use_text_head(config, index, withheld, backbone)
        report = moa.inject(backbone.model, config.moa)
    if config.model.dropout:
        drop_features(classifier(backbone.model), config.model.dropout)
    head = head_settings(backbone.model) | texts
    _compiled(config, backbone.model)
    loader = loader_transform(
        backbone.data_config, config.data.resolved_augment(),
        colours=config.data.augment_on == "loader",
    )  # fmt: skip
    stream = DomainStream(
        index, sources=[n for n in range(len(index.domains)) if n not in withheld],
        batch_per_domain=settings.batch_per_domain, seed=settings.seed,
        trial_seed=settings.trial_seed, holdout_fraction=config.data.holdout_fraction,
        mode=config.data.order, window=config.data.order_window,
        transform=loader, mix=config.data.mix, mix_alpha=config.data.mix_alpha,
        decoder=Decoder(config.data.decode, config.data.truncated, config.data.max_pixels),
    )  # fmt: skip
    stream.check_world_size(world.size, settings.accumulation)
    check_prefetching(config, world, stream.global_batch, backbone.data_config)
    _check_splits(config, index, withheld)
    bf16, images = settings.precision == "bf16", stream.global_batch
    resolved = deepspeed_json.resolve(config, world.size, images, bf16, report.trainable)
    info = AdapterInfo(
        backbone.name, backbone.sha256, config.moa, index.classes, backbone.data_config,
        origin=origin_of(config, index, withheld, world), head=head,
        model_args=size_arguments(config.model),
    )  # fmt: skip
    return Parts(config, index, withheld, backbone.model, report, stream, resolved, info)


def _checked(
    config: RunConfig, world: World, problems: list[str]
) -> tuple[RunConfig, ShardIndex, tuple[int, ...]]:
    """Finds every mistake that shows without weights, and tells all of them, one a line.

    Returns:
        The configuration with everything filled in, the shard set, and the numbers of the domains
        that are not trained on.
    """
    sharded = False
    with noted(problems):
        sharded = deepspeed_json.read(config)["zero_optimization"].get("stage") == 3
    with noted(problems):
        check_compiled(config, sharded)
    with noted(problems):
        check_captured(config, sharded)
    if config.model.compile == "blocks":
        with noted(problems):
            prepare_compiler()
    with noted(problems):
        check_backbone(config.model)
        # Whether adapters fit, and blocks are found to compile, before weights are fetched.
        _compiled(config, outline(config.model, config.moa, 2)[0].model)
    with noted(problems):
        check_expert_parallel(config.moa, world.size, sharded)
    with noted(problems):
        index = open_shards(config.data)
        config, withheld = _resolve(config, index)
        domains = len(index.domains)
        sources = domains - len(withheld)
        with noted(problems):
            check_objective(config, sources, sharded)
        batches = batch_arithmetic(config, world.size, domains, sources, {})
        bf16 = config.train.precision == "bf16"
        deepspeed_json.resolve(config, world.size, batches.global_batch, bf16)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys("\n".join(problems).splitlines())))
    return config, index, withheld


def _compiled(config: RunConfig, model: nn.Module) -> None:
    if config.model.compile == "blocks":
        moa.compile_blocks(model)


def check_expert_parallel(adapters: moa.MoAConfig, processes: int, sharded: bool) -> None:
    """Raises `ConfigError` unless the processes can share out the experts, and compare them."""
    size = adapters.ep_size
    if processes % size:
        legal = [n for n in range(1, processes + 1) if processes % n == 0]
        raise ConfigError(
            f"moa.ep_size: {size} does not divide the {processes} processes; legal are "
            f"{', '.join(map(str, legal))}"
        )
    if adapters.diversity and sharded:
        raise ConfigError(
            f"moa.diversity: {adapters.diversity} with ZeRO-3, which holds no expert whole beside "
            "the forward; use --ds_config ds_configs/zero2.json, or --moa.diversity 0"
        )
    if size > 1 and sharded:
        raise ConfigError(
            f"moa.ep_size: {size} with ZeRO-3, which shards experts itself and whose engine knows "
            "no expert parallelism; use --moa.ep_size 1, or --ds_config ds_configs/zero2.json"
        )


def _resolve(config: RunConfig, index: ShardIndex) -> tuple[RunConfig, tuple[int, ...]]:
    """Fills in held-out domain, precision and the method's defaults; also the numbers withheld."""
    name = config.data.held_out or index.domains[-1]
    withheld = tuple(map(index.domain_number, held_out_names(name, index.domains)))
    if len(withheld) == len(index.domains):
        raise ConfigError(
            f"data.held_out: {name!r} leaves no domain of {index.root} to train on; training needs "
            "at least one"
        )
    data, train = replace(config.data, held_out=name), config.train
    if train.precision == "auto":
        train = replace(train, precision="bf16" if torch.cuda.is_available() else "fp32")
    return replace(config, data=data, train=train, moa=config.moa.resolved()), withheld


def _in_groups(index: ShardIndex) -> str:
    if index.group_by is None:
        return ""
    return f", or make the set with smaller groups than those of --group_by {index.group_by!r}"


def _check_splits(config: RunConfig, index: ShardIndex, withheld: tuple[int, ...]) -> None:
    """Sources need an image to validate on, or selection is arbitrary; targets one to test on."""
    fraction, trial = config.data.holdout_fraction, config.train.trial_seed
    for number, domain in enumerate(index.domains):
        split: Split = "in" if number in withheld else "out"
        if len(split_places(index, number, split, trial_seed=trial, holdout_fraction=fraction)):
            continue
        if index.subset is None:
            raise ConfigError(
                f"data.holdout_fraction: {fraction} of the {index.num_samples(number)} images of "
                f"{domain!r} is not one image to validate on; raise it"
                f"{_in_groups(index)}"
            )
        given = "exclude_list" if config.data.exclude_list else "include_list"
        use = "tested" if number in withheld else "validated"
        raise ConfigError(
            f"data.{given}: leaves no image of the {split!r} split of {domain!r}, on which this "
            f"run would be {use}; keep some of them: the split follows from train.trial_seed and "
            "data.holdout_fraction"
        )
