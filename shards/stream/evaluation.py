"""The evaluation stream: every sample of a split exactly once, whatever the world size."""

from dataclasses import dataclass
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


def split_places(
    index: ShardIndex, domain: int, split: Split, *, trial_seed: int, holdout_fraction: float
) -> Int64Array:
    """Give the places of a split's samples in the file list of a domain, which is given by number.

    The splits are `in` (training part), `out` (validation part, a share of `holdout_fraction`),
    `all`, and `left_out`: what the subset does not keep, of both parts; it is not in the others.

    Raises `DataConfigError`: the split is unknown.
    """
    num = index.num_samples(domain)
    everything = np.arange(num, dtype=np.int64)
    if split == "all":
        return index.kept(domain, everything)
    if split == "left_out":
        return np.setdiff1d(everything, index.kept(domain, everything))
    if split not in get_args(Split):
        raise DataConfigError(f"split = {split!r}: must be one of {', '.join(get_args(Split))}")
    inside, outside = split_indices(num, trial_seed, domain, holdout_fraction)
    return index.kept(domain, inside if split == "in" else outside)


def evaluation_loader(
    index: ShardIndex,
    domain: int,
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
    """Load one split of one domain, as of `split_places`, for evaluation.

    Every rank gets a contiguous range without padding or repeats, so sums of correct and total over
    the ranks are exact; with more ranks than samples some ranks get no batch. An image that cannot
    be used is replaced by a grey one, so that it still counts, and reported in `bad`. The order is
    that of the split, or of the shards if these are remote. The last batch of a rank may be smaller
    than `batch_size`. `transform` makes float32 [3, H, W] of pixels.

    Raises `DataConfigError`: an argument is out of range.
    """
    if batch_size < 1:
        raise DataConfigError(f"batch_size = {batch_size}: must be 1 or more")
    places = split_places(
        index, domain, split, trial_seed=trial_seed, holdout_fraction=holdout_fraction
    )
    if index.remote:  # as they are stored, so that a shard is needed only once
        rows = index.table(domain)[places]
        places = places[np.lexsort((rows["offset"], rows["shard"]))]
    mine = rank_range(len(places), rank, world_size)
    batches = _EvaluationBatches(
        index, domain, places, mine, batch_size, transform, decoder or Decoder()
    )
    return BatchLoader(
        batches.build, -(-len(mine) // batch_size), reported=index.reported, workers=workers,
        pin_memory=pin_memory,
    )  # fmt: skip


@dataclass(eq=False)
class _EvaluationBatches:
    """The batches of one rank; `mine` is its range of `places`."""

    index: ShardIndex
    domain: int
    places: Int64Array
    mine: range
    batch_size: int
    transform: ImageTransform
    decoder: Decoder

    def build(self, number: int) -> Batch:
        slots = self.mine[number * self.batch_size : (number + 1) * self.batch_size]
        loaded = (self._load(int(self.places[slot])) for slot in slots)
        return stack(loaded, len(slots), slots[0])

    def _load(self, place: int) -> LoadedImage:
        found = open_image(self.index, self.domain, place, self.decoder)
        pixels = undecodable_placeholder() if found.pixels is None else found.pixels
        seed = hash64("evaluation", self.index.domains[self.domain], place)
        image = seeded(self.transform, pixels, seed)
        bad = [] if found.bad is None else [found.bad]
        return LoadedImage(image, found.label, self.domain, found.pixels is None, bad)
