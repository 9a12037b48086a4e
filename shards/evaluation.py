"""The evaluation stream: every sample of a split exactly once, whatever the world size."""

import logging
from typing import Literal, TypeAlias, get_args

import numpy as np

from shards.errors import DataConfigError
from shards.index import ShardIndex
from shards.loading import Batch, BatchLoader, LoadedImage, rank_range, seeded, stack
from shards.order import Int64Array, hash64
from shards.split import split_indices
from shards.transforms import ImageTransform, decode_image, undecodable_placeholder

log = logging.getLogger(__name__)

Split: TypeAlias = Literal["in", "out", "all"]


def split_ranks(
    index: ShardIndex, env: int, split: Split, *, trial_seed: int, holdout_fraction: float
) -> Int64Array:
    """Give the samples of a split of a domain.

    Args:
        index: The shard set.
        env: Number of the domain.
        split: `in` (training part), `out` (validation part) or `all`.
        trial_seed: Number of the trial.
        holdout_fraction: Share of the validation part.

    Returns:
        int64 array of ImageFolder ranks.

    Raises:
        DataConfigError: If the split is unknown.
    """
    num = index.num_samples(env)
    if split == "all":
        return np.arange(num, dtype=np.int64)
    if split not in get_args(Split):
        raise DataConfigError(f"split = {split!r}: must be one of {', '.join(get_args(Split))}")
    inside, outside = split_indices(num, trial_seed, env, holdout_fraction)
    return inside if split == "in" else outside


def evaluation_loader(
    index: ShardIndex,
    env: int,
    split: Split,
    *,
    trial_seed: int,
    holdout_fraction: float,
    transform: ImageTransform,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Load one split of one domain for evaluation.

    Every rank gets a contiguous range without padding or repeats, so sums of correct and total over
    the ranks are exact; with more ranks than samples some ranks get no batch. An image that cannot
    be decoded is replaced by a grey one, so that it still counts, and reported in `substituted`.

    Args:
        index: The shard set.
        env: Number of the domain.
        split: `in`, `out` or `all`.
        trial_seed: Number of the trial.
        holdout_fraction: Share of the `out` part.
        transform: From uint8 [3, h, w] to float32 [3, H, W].
        rank: Number of this process.
        world_size: Number of processes.
        batch_size: Images per batch; the last batch of a rank may be smaller.
        workers: Loader processes.
        pin_memory: Put batches into page-locked memory.

    Returns:
        A loader of `Batch`.

    Raises:
        DataConfigError: If an argument is out of range.
    """
    if batch_size < 1:
        raise DataConfigError(f"batch_size = {batch_size}: must be 1 or more")
    ranks = split_ranks(index, env, split, trial_seed=trial_seed, holdout_fraction=holdout_fraction)
    mine = rank_range(len(ranks), rank, world_size)
    source = _EvaluationBatches(index, env, ranks, mine, batch_size, transform)
    return BatchLoader(source, workers=workers, pin_memory=pin_memory)


class _EvaluationBatches:
    """The batches of one rank; `mine` is its range of places in `ranks`."""

    def __init__(
        self,
        index: ShardIndex,
        env: int,
        ranks: Int64Array,
        mine: range,
        batch_size: int,
        transform: ImageTransform,
    ) -> None:
        self.index = index
        self.env = env
        self.ranks = ranks
        self.mine = mine
        self.batch_size = batch_size
        self.transform = transform

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def build(self, number: int) -> Batch:
        places = self.mine[number * self.batch_size : (number + 1) * self.batch_size]
        return stack([self._load(int(self.ranks[place])) for place in places], places[0])

    def _load(self, rank: int) -> LoadedImage:
        """Read, decode and transform one sample."""
        sample = self.index.read(self.env, rank)
        try:
            pixels, substituted = decode_image(sample.image), False
        except ValueError as error:
            log.warning("sample %s: %s; evaluated as a grey image", sample.key, error)
            pixels, substituted = undecodable_placeholder(), True
        seed = hash64("evaluation", self.index.domains[self.env], rank)
        image = seeded(self.transform, pixels, seed)
        return LoadedImage(image, sample.label, self.env, substituted)
