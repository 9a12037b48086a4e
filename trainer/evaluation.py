"""Accuracy of every domain's `in` and `out` split: integer counts, summed once, divided once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from shards import Batch, Decoder, ShardIndex, eval_transform, evaluation_loader
from shards.bad_samples import check_unusable
from trainer.stopping import shielded
from trainer.world import World

PAUSE_EVERY = 4
"""Batches between two points at which all ranks may leave an evaluation."""

SPLITS = ("in", "out")
LEFT_OUT = "left_out"
"""What `data.exclude_list` or `data.include_list` leaves out, evaluated apart."""
Counts = dict[tuple[int, str], tuple[int, int, int]]
"""(domain number, split) -> (correct, total, of which could not be used and so count as errors)."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model on domains of a shard set, each sample once whatever the world size.

    Attributes:
        index: the shard set.
        data_config: the backbone's data configuration.
        trial_seed: seed of the split.
        holdout_fraction: share of the `out` split.
        batch_size: images per process and batch.
        workers: loader processes.
        world: this process among those that evaluate together.
        device: where the model is.
        dtype: the model's dtype.
        sum_over_ranks: sum of a tensor over the processes.
        decoder: decodes the images.
        max_bad_fraction: largest share of a split that may be unusable.
        pause: entered by all ranks now and then with whether this one has more batches; tells
            whether any has, or ends the evaluation with an error.
    """

    index: ShardIndex
    data_config: Mapping[str, object]
    trial_seed: int
    holdout_fraction: float
    batch_size: int
    workers: int
    world: World
    device: torch.device
    dtype: torch.dtype
    sum_over_ranks: Callable[[Tensor], Tensor]
    decoder: Decoder = field(default_factory=Decoder)
    max_bad_fraction: float = 0.001
    pause: Callable[[bool], bool] = bool

    def __call__(self, model: nn.Module) -> Counts:
        """Counts of all domains and both splits; a collective over the processes.

        The model is in evaluation mode meanwhile and returns to its mode afterwards.

        Raises:
            DamagedDataError: too many images of a split could not be used; on all ranks alike.
            EvaluationBrokenOff: `pause` ended it.
        """
        splits = SPLITS if self.index.subset is None else (*SPLITS, LEFT_OUT)
        cells = [(env, split) for env in range(len(self.index.domains)) for split in splits]
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                local = [self._count(model, self._loader(env, split)) for env, split in cells]
        finally:
            model.train(was_training)
        total = self.sum_over_ranks(torch.stack(local)).tolist()
        for (env, split), (_, number, unusable) in zip(cells, total, strict=True):
            where = f"{self.index.domains[env]}/{split}"
            check_unusable(where, unusable, number, self.max_bad_fraction)
        return {
            cell: (int(row[0]), int(row[1]), int(row[2]))
            for cell, row in zip(cells, total, strict=True)
        }

    def _loader(self, env: int, split: str) -> Iterable[Batch]:
        return evaluation_loader(
            self.index,
            env,
            split,  # type: ignore[arg-type]
            trial_seed=self.trial_seed,
            holdout_fraction=self.holdout_fraction,
            transform=eval_transform(self.data_config),
            rank=self.world.rank,
            world_size=self.world.size,
            batch_size=self.batch_size,
            workers=self.workers,
            decoder=self.decoder,
        )

    def _count(self, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """[3] int64: correct, all and unusable, of this rank's share."""
        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        remaining, more = shielded(batches), True
        while more:  # ranks may have a batch more or less, and pause equally often all the same
            taken = 0
            for batch in islice(remaining, PAUSE_EVERY):
                taken += 1
                scores = model(batch.images.to(self.device, self.dtype))
                counts[0] += (scores.argmax(1) == batch.labels.to(self.device)).sum()
                counts[1] += len(batch.labels)
                counts[2] += batch.substituted
            more = self.pause(taken == PAUSE_EVERY)
        return counts


def accuracies(counts: Counts) -> dict[str, float]:
    """`env{i}_{split}_acc` in [0, 1] as in DomainBed's rows; a split without samples gives 0.

    What a list leaves out gives `moa/env{i}_left_out_acc`. Where images could not be used,
    `moa/unusable/env{i}_{split}` tells how many.
    """
    row: dict[str, float] = {}
    for (env, split), (correct, total, unusable) in counts.items():
        prefix = "moa/" if split == LEFT_OUT else ""
        row[f"{prefix}env{env}_{split}_acc"] = correct / total if total else 0.0
        if unusable:
            row[f"moa/unusable/env{env}_{split}"] = unusable
    return row
