"""The evaluation stream: every sample of a split exactly once, whatever the world size."""

from typing import Literal, TypeAlias, get_args

import numpy as np

from shards.errors import DataConfigError
from shards.pixels.decoding import Decoder, undecodable_placeholder
from shards.pixels.transforms import ImageTransform
from shards.randomness import Int64Array, hash64
from shards.read.index import ShardIndex
from shards.stream.batches import Batch, BatchLoader, LoadedImage, rank_range, seeded, stack
from shards.stream.one_image import open_image
from shards.stream.split import split_indices

Split: TypeAlias = Literal["in", "out", "all", "left_out"]


def split_ranks(
    index: ShardIndex, env: int, split: Split, *, trial_seed: int, holdout_fraction: float
) -> Int64Array:
    """Give the samples of a split of a domain.

    Args:
        index: The shard set.
        env: Number of the domain.
        split: `in` (training part), `out` (validation part), `all`, or `left_out` (what the subset
            does not keep, of both parts; it is not in the others).
        trial_seed: Number of the trial.
        holdout_fraction: Share of the validation part.

    Returns:
        int64 array of ImageFolder ranks.

    Raises:
        DataConfigError: If the split is unknown.
    """
    num = index.num_samples(env)
    everything = np.arange(num, dtype=np.int64)
    if split == "all":
        return index.kept(env, everything)
    if split == "left_out":
        return np.setdiff1d(everything, index.kept(env, everything))
    if split not in get_args(Split):
        raise DataConfigError(f"split = {split!r}: must be one of {', '.join(get_args(Split))}")
    inside, outside = split_indices(num, trial_seed, env, holdout_fraction)
    return index.kept(env, inside if split == "in" else outside)


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
    decoder: Decoder | None = None,
) -> BatchLoader:
    """Load one split of one domain for evaluation.

    Every rank gets a contiguous range without padding or repeats, so sums of correct and total over
    the ranks are exact; with more ranks than samples some ranks get no batch. An image that cannot
    be used is replaced by a grey one, so that it still counts, and reported in `bad`. The order is
    that of the split, or of the shards if these are remote.

    Args:
        index: The shard set.
        env: Number of the domain.
        split: `in`, `out`, `all` or `left_out`.
        trial_seed: Number of the trial.
        holdout_fraction: Share of the `out` part.
        transform: From pixels to float32 [3, H, W].
        rank: Number of this process.
        world_size: Number of processes.
        batch_size: Images per batch; the last batch of a rank may be smaller.
        workers: Loader processes.
        pin_memory: Put batches into page-locked memory.
        decoder: What decodes the images; None for the default one.

    Returns:
        A loader of `Batch`.

    Raises:
        DataConfigError: If an argument is out of range.
    """
    if batch_size < 1:
        raise DataConfigError(f"batch_size = {batch_size}: must be 1 or more")
    ranks = split_ranks(index, env, split, trial_seed=trial_seed, holdout_fraction=holdout_fraction)
    if index.remote:
        ranks = _by_place(index, env, ranks)
    mine = rank_range(len(ranks), rank, world_size)
    source = _EvaluationBatches(
        index, env, ranks, mine, batch_size, transform, decoder or Decoder()
    )
    return BatchLoader(source, reported=index.reported, workers=workers, pin_memory=pin_memory)


def _by_place(index: ShardIndex, env: int, ranks: Int64Array) -> Int64Array:
    """Sort samples as they are stored, so that a remote shard is needed only once."""
    rows = index.table(env)[ranks]
    return ranks[np.lexsort((rows["offset"], rows["shard"]))]


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
        decoder: Decoder,
    ) -> None:
        self.index = index
        self.env = env
        self.ranks = ranks
        self.mine = mine
        self.batch_size = batch_size
        self.transform = transform
        self.decoder = decoder

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def build(self, number: int) -> Batch:
        places = self.mine[number * self.batch_size : (number + 1) * self.batch_size]
        loaded = (self._load(int(self.ranks[place])) for place in places)
        return stack(loaded, len(places), places[0])

    def _load(self, rank: int) -> LoadedImage:
        """Read, decode and transform one sample."""
        found = open_image(self.index, self.env, rank, self.decoder)
        pixels = undecodable_placeholder() if found.pixels is None else found.pixels
        seed = hash64("evaluation", self.index.domains[self.env], rank)
        image = seeded(self.transform, pixels, seed)
        bad = [] if found.bad is None else [found.bad]
        return LoadedImage(image, found.label, self.env, found.pixels is None, bad)
