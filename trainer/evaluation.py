"""Accuracy of every domain's `in` and `out` split: integer counts, summed once, divided once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shards import Batch, ShardIndex, eval_transform, evaluation_loader
from trainer.world import World

SPLITS = ("in", "out")
Counts = dict[tuple[int, str], tuple[int, int]]
"""(domain number, split) -> (correct, total)."""


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

    def __call__(self, model: nn.Module) -> Counts:
        """Counts of all domains and both splits; a collective over the processes.

        The model is in evaluation mode meanwhile and returns to its mode afterwards.
        """
        cells = [(env, split) for env in range(len(self.index.domains)) for split in SPLITS]
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            local = [self._count(model, self._loader(env, split)) for env, split in cells]
        model.train(was_training)
        total = self.sum_over_ranks(torch.stack(local)).tolist()
        return {cell: (int(row[0]), int(row[1])) for cell, row in zip(cells, total, strict=True)}

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
        )

    def _count(self, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """[2] int64: correct and all, of this rank's share."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        for batch in batches:
            scores = model(batch.images.to(self.device, self.dtype))
            counts[0] += (scores.argmax(1) == batch.labels.to(self.device)).sum()
            counts[1] += len(batch.labels)
        return counts


def accuracies(counts: Counts) -> dict[str, float]:
    """`env{i}_{split}_acc` in [0, 1] as in DomainBed's rows; a split without samples gives 0."""
    return {
        f"env{env}_{split}_acc": correct / total if total else 0.0
        for (env, split), (correct, total) in counts.items()
    }
