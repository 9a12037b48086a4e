"""An evaluation from its settings to its figures: what is evaluated on what, and doing it."""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from trainer.evaluate.combine import (
    Average,
    average,
    models_on,
    ready,
    soup,
    start_warning,
    tensor_bytes,
)
from trainer.evaluate.data import AdapterData, open_data
from trainer.evaluate.evaluator import LEFT_OUT, SPLITS, DomainSplit, Evaluator
from trainer.evaluate.members import (
    ENSEMBLE,
    SOUP,
    Member,
    base_of,
    check_target,
    not_trained_on,
    of_size,
    read_members,
)
from trainer.evaluate.predictions import Figures, collect, figures_of
from trainer.prepare.backbone import Backbone
from trainer.prepare.provenance import shown_command
from trainer.process.device import use_device
from trainer.process.errors import ConfigError
from trainer.process.world import World


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and what came out.

    Attributes:
        members: the adapters given.
        combine: what is made of them.
        average: what the ensemble averages.
        soup: the mean of the members, if that is wanted.
        batch: images per process and batch.
        dtype: of the models' parameters and their inputs.
        warnings: what the user should know, one line each.
        results: figures by label and split; the result asked for comes last.
        cost: images, each evaluated once, forward passes of each, seconds for all of them, and
            bytes of tensors: of the backbone, and of the adapters beside it.
    """

    members: list[Member]
    combine: Sequence[str]
    average: Average
    soup: Member | None
    backbone: Backbone
    data: AdapterData
    splits: tuple[str, ...]
    batch: int
    dtype: torch.dtype
    warnings: tuple[str, ...]
    results: dict[str, dict[DomainSplit, Figures]] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    def titled(self, text: str) -> str:
        """A title, after the name of the shard set if it has one of its own."""
        index = self.data.index
        return text if index.name == index.dataset else f"{index.name}: {text}"

    def shown_splits(self, env: int) -> tuple[str, ...]:
        """The splits of a domain that pictures show: `out` alone where adapters saw the rest.

        Without `out` among those evaluated, it is what there is; `shown_images` says so.
        """
        splits = tuple(split for split in self.splits if split != LEFT_OUT)
        return ("out",) if "out" in splits and not self._held_out(env) else splits

    def shown_images(self) -> str:
        """What images `shown_splits` of all domains are, for a title."""
        splits = tuple(split for split in self.splits if split != LEFT_OUT)
        if splits == SPLITS:
            return "unseen images: all of held-out domains, `out` of the others"
        if splits == ("out",) or all(map(self._held_out, self.data.envs)):
            return f"unseen images: the `{splits[0]}` split"
        return f"the `{splits[0]}` split, with images of the training"

    def _held_out(self, env: int) -> bool:
        """Whether no adapter was trained on a domain."""
        return len(not_trained_on(self.members, self.data.index.domains[env])) == len(self.members)


def prepare(args: argparse.Namespace) -> Evaluation:
    """Reads and checks everything that an evaluation needs; nothing has come out yet.

    Raises:
        ConfigError, DataConfigError, MissingAdapterError: something given cannot work.
        AdapterError, CheckpointError, DamagedDataError: something read is damaged.
    """
    members = read_members(args.adapter)
    combine = args.combine or [ENSEMBLE if len(members) > 1 else "each"]
    if ENSEMBLE in combine and len(members) < 2:
        raise ConfigError("--combine ensemble: needs two adapters or more; give --adapter A B")
    if args.save is not None:
        if SOUP not in combine:
            raise ConfigError("--save: writes the soup; give --combine soup as well")
        check_target("--save", args.save)
        if args.image_size:
            raise ConfigError("--save: writes adapters of their own size; leave --model.image_size")
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch}: must be 1 or more")
    mean = soup(members, shown_command(sys.argv)) if SOUP in combine else None
    data = open_data(args, members, workers=args.workers, max_bad_fraction=args.max_bad_fraction)
    splits = SPLITS if args.split == "both" else (args.split,)
    splits = splits if data.index.subset is None else (*splits, LEFT_OUT)
    warnings = (*data.warnings, *(start_warning(members) if mean else ()))
    base = base_of(members[0], args.weights, args.image_size)
    members = [of_size(member, args.image_size) for member in members]
    return Evaluation(
        members, combine, args.average, mean, base, data, splits, args.batch,
        dtype_of(members, args.precision), warnings,
    )  # fmt: skip


def dtype_of(members: Sequence[Member], precision: str | None) -> torch.dtype:
    """What is asked for; else that of the runs, which older adapters do not tell."""
    runs = {m.info.origin.precision if m.info.origin else "" for m in members}
    wanted = precision or (runs.pop() if len(runs) == 1 else "")
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def evaluate(
    job: Evaluation, world: World, sum_over_ranks: Callable[[Tensor], Tensor]
) -> Evaluation:
    """Adds figures of every result on every domain and split; a collective over the processes.

    `DamagedDataError` if too many images could not be used.
    """
    data = job.data
    adapters = list(job.members) if {"each", ENSEMBLE} & set(job.combine) else []
    adapters += [] if job.soup is None else [job.soup]
    device = use_device(world)
    backbone_bytes = tensor_bytes(job.backbone.model)
    models = ready(models_on(job.backbone.model, adapters), job.dtype, device)
    evaluator = Evaluator(
        index=data.index, data_config=job.members[0].info.data_config, trial_seed=data.trial_seed,
        holdout_fraction=data.config.holdout_fraction, batch_size=job.batch,
        workers=data.config.workers, world=world, device=device, dtype=job.dtype,
        sum_over_ranks=sum_over_ranks, decoder=data.decoder,
        max_bad_fraction=data.config.max_bad_fraction,
    )  # fmt: skip
    names = [adapter.label for adapter in adapters]
    results: dict[str, dict[DomainSplit, Figures]] = defaultdict(dict)
    started = time.perf_counter()
    for place in product(data.envs, job.splits):
        found = dict(zip(names, collect(evaluator, list(models), *place), strict=True))
        if ENSEMBLE in job.combine:
            alone = [found[member.label] for member in job.members]
            found[ENSEMBLE] = average(alone, job.average)
        for name, predictions in found.items():
            results[name][place] = figures_of(predictions)
    cost = {
        "images": sum(figures.samples for figures in results[names[0]].values()),
        "forward_passes": len(models), "seconds": time.perf_counter() - started,
        "backbone_bytes": backbone_bytes, "adapter_bytes": tensor_bytes(models) - backbone_bytes,
    }  # fmt: skip
    return replace(job, results=results, cost=cost)
