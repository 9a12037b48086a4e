"""Accuracy of every domain's `in` and `out` split: integer counts, summed once, divided once."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shards import Decoder, ShardIndex, loader_transform
from shards.randomness import Int64Array
from shards.stream.bad_samples import check_unusable
from shards.stream.batches import BatchLoader
from shards.stream.evaluation import EvaluationBatches, split_places
from shards.stream.worker_faults import check_shared_memory
from trainer.prepare.ahead import Ahead, Ready
from trainer.process.stopping import shielded
from trainer.process.world import World

PAUSE_EVERY = 4
"""Batches between two points at which all ranks may leave an evaluation."""

SPLITS = ("in", "out")
LEFT_OUT = "left_out"
"""What `data.exclude_list` or `data.include_list` leaves out, evaluated apart."""
DomainSplit = tuple[int, str]
"""(domain number, split)."""


class Counted(NamedTuple):
    """Of one split: what was correct, seen, unusable and so guessed; `class_mean` is in [0, 1]."""

    correct: int
    seen: int
    unusable: int
    class_mean: float


SplitCounts = dict[DomainSplit, Counted]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model on domains of a shard set, each sample once whatever the world size.

    Attributes:
        data_config: of the backbone.
        holdout_fraction: share of the `out` split.
        batch_size: images per process and batch.
        device: where the model is, as `dtype` is what it computes in.
        max_bad_fraction: largest share of a split that may be unusable.
        pause: entered by all ranks now and then; may end the evaluation with an error.
        losses: whether the loss is of interest beside the accuracy.
        note: is shown every batch's domain number, class numbers [b] and scores [b, C] on the
            device; by default nobody looks.
        loaders: with processes that stay for the next evaluation, by the settings they serve;
            shared by all that `replace` makes of this.
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
    pause: Callable[[], None] = lambda: None
    losses: bool = False
    note: Callable[[int, Tensor, Tensor], object] | None = None
    loaders: dict[Hashable, "Loading"] = field(default_factory=dict, repr=False)

    def domain_splits(self) -> list[DomainSplit]:
        """All splits of all domains."""
        splits = SPLITS if self.index.subset is None else (*SPLITS, LEFT_OUT)
        return [(env, split) for env in range(len(self.index.domains)) for split in splits]

    def __call__(
        self, model: nn.Module, places: Sequence[DomainSplit] | None = None
    ) -> SplitCounts:
        """The counts alone of `with_losses`."""
        return self.with_losses(model, places)[0]

    def with_losses(
        self, model: nn.Module, places: Sequence[DomainSplit] | None = None
    ) -> tuple[SplitCounts, dict[DomainSplit, float]]:
        """Counts of some splits, by default of all, and mean cross-entropies if `losses` is set.

        A collective over the processes. The model is in evaluation mode meanwhile and returns to
        its mode afterwards.

        Raises:
            DamagedDataError: too many images of a split could not be used; on all ranks alike.
            EvaluationBrokenOff: `pause` ended it.
        """
        places = self.domain_splits() if places is None else places
        with evaluating(model):
            local = self._count(model, places)
        counts: SplitCounts = {}
        losses: dict[DomainSplit, float] = {}
        classes = len(self.index.classes)
        total = self.sum_over_ranks(local).tolist()
        for place, (unusable, loss, *by_class) in zip(places, total, strict=True):
            right, seen = by_class[:classes], by_class[classes:]
            number = sum(seen)
            self.check_usable(*place, int(unusable), int(number))
            shares = [hits / all_ for hits, all_ in zip(right, seen, strict=True) if all_]
            class_mean = fmean(shares) if shares else 0.0
            counts[place] = Counted(int(sum(right)), int(number), int(unusable), class_mean)
            losses[place] = loss / number if number else 0.0
        return counts, losses if self.losses else {}

    def batches(
        self, models: Sequence[nn.Module], places: Sequence[DomainSplit]
    ) -> Iterator[tuple[int, Ready]]:
        """This rank's batches of some splits, to be shown to `models`; a collective.

        Each comes with the number of its split among `places`, and is brought to the device while
        the one before is computed. All ranks run it to its end, and each model's forward, which may
        be a collective of its own (ZeRO-3, all_to_all), equally often: a rank with a batch less
        shows a blank image instead.

        Raises `EvaluationBrokenOff`: `pause` ended it.
        """
        loading = self._loading()
        shares = [loading.batches.names(*place) for place in places]  # type: ignore[arg-type]
        loading.wanted[:] = chain.from_iterable(names for names, _ in shares)
        remaining = shielded(loading.loader)
        ahead = Ahead(self.device, self.dtype, self.data_config)
        for number, (names, most) in enumerate(shares):
            for done in range(1, most + 1):
                if done <= len(names):
                    yield number, ahead.take(remaining)
                    ahead.fetch(remaining)  # whoever took it has launched its computation
                else:
                    size: Any = self.data_config["input_size"]
                    blank = torch.zeros(1, *size, dtype=self.dtype, device=self.device)
                    for model in models:
                        model(blank)
                if done % PAUSE_EVERY == 0:
                    self.pause()
            self.pause()

    def _loading(self) -> "Loading":
        settings = (
            id(self.index), self.trial_seed, self.holdout_fraction, self.batch_size, self.workers,
            self.world, self.decoder, repr(self.data_config),
        )  # fmt: skip
        if settings not in self.loaders:
            side: Any = self.data_config["input_size"]
            images = self.batch_size * math.prod(side)
            check_shared_memory(images, self.workers, self.world.local_size)
            batches = EvaluationBatches(
                self.index, self.trial_seed, self.holdout_fraction,
                loader_transform(self.data_config, "none"), self.world.rank, self.world.size,
                self.batch_size, self.decoder,
            )  # fmt: skip
            wanted: list[object] = []
            pinned = self.device.type == "cuda"
            loader = batches.loader(wanted, self.workers, pinned, keep=True)
            self.loaders[settings] = Loading(batches, wanted, loader)
        return self.loaders[settings]

    def ranks(self, env: int, split: str) -> Int64Array:
        """The samples of a split, as ImageFolder ranks."""
        return split_places(
            self.index, env, split,  # type: ignore[arg-type]
            trial_seed=self.trial_seed, holdout_fraction=self.holdout_fraction,
        )  # fmt: skip

    def check_usable(self, env: int, split: str, unusable: int, total: int) -> None:
        """Raises `DamagedDataError` if too many of a split's `total` images were `unusable`."""
        where = f"{self.index.domains[env]}/{split}"
        check_unusable(where, unusable, total, self.max_bad_fraction)

    def _count(self, model: nn.Module, places: Sequence[DomainSplit]) -> Tensor:
        """[splits, 2 + 2 C] float64: unusable, summed loss, and of each class the right and all.

        Of this rank's shares, with C classes.
        """
        # whole up to 2^53
        classes = len(self.index.classes)
        columns = 2 + 2 * classes
        total = torch.zeros(len(places), columns, dtype=torch.float64, device=self.device)
        for number, (batch, images, labels, _) in self.batches([model], places):
            counts = total[number]
            scores = model(images)
            if self.note is not None:
                self.note(int(batch.domains[0]), labels, scores)
            right = (scores.argmax(1) == labels).to(counts.dtype)
            counts[0] += batch.substituted
            counts[2:].index_add_(0, labels, right)
            counts[2 + classes :].index_add_(0, labels, torch.ones_like(right))
            if self.losses:
                counts[1] += F.cross_entropy(scores.float(), labels, reduction="sum")
        return total


class Loading(NamedTuple):
    """A loader, the names of the batches that it will load next, and what they are names of."""

    batches: EvaluationBatches
    wanted: list[object]
    loader: BatchLoader


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode and no gradients in a block; afterwards each has its mode again."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        # What ZeRO-3 fetches in inference mode it may keep, and training could not go on with it.
        sharded = any(hasattr(p, "ds_id") for model in models for p in model.parameters())
        with torch.no_grad() if sharded else torch.inference_mode():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def accuracies(counts: SplitCounts) -> dict[str, float]:
    """`env{i}_{split}_acc` in [0, 1] as in DomainBed's rows; a split without samples gives 0.

    What a list leaves out gives `moa/env{i}_left_out_acc`. `moa/env{i}_{split}_class_mean` is the
    mean of the accuracies of the classes that occur. Where images could not be used,
    `moa/unusable/env{i}_{split}` tells how many.
    """
    row: dict[str, float] = {}
    for (env, split), (correct, total, unusable, class_mean) in counts.items():
        prefix = "moa/" if split == LEFT_OUT else ""
        row[f"{prefix}env{env}_{split}_acc"] = correct / total if total else 0.0
        row[f"moa/env{env}_{split}_class_mean"] = class_mean
        if unusable:
            row[f"moa/unusable/env{env}_{split}"] = unusable
    return row
