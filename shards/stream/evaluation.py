"""The evaluation stream: every sample of a split exactly once, whatever the world size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from shards.errors import DataConfigError
from shards.pixels.decoding import Decoder, undecodable_placeholder
from shards.pixels.transforms import LoaderTransform
from shards.randomness import Int64Array, hash64
from shards.read.index import ShardIndex
from shards.stream.batches import Batch, BatchLoader, LoadedImage, made, rank_range, stack
from shards.stream.one_image import open_image
from shards.stream.split import split_domain

Split: TypeAlias = Literal["in", "out", "all", "left_out"]


def split_places(
    index: ShardIndex, domain: int, split: Split, *, trial_seed: int, holdout_fraction: float
) -> Int64Array:
    """Give the places of a split's samples in the file list of a domain, which is given by number.

    The splits are `in` (training part), `out` (validation part, a share of `holdout_fraction`),
    `all`, and `left_out`: what the subset does not keep, of both parts; it is not in the others.

    Raises `DataConfigError`: the split is unknown.
    """
    everything = np.arange(index.num_samples(domain), dtype=np.int64)
    if split == "all":
        return index.kept(domain, everything)
    if split == "left_out":
        return np.setdiff1d(everything, index.kept(domain, everything))
    if split not in get_args(Split):
        raise DataConfigError(f"split = {split!r}: must be one of {', '.join(get_args(Split))}")
    inside, outside = split_domain(index, domain, trial_seed, holdout_fraction)
    return index.kept(domain, inside if split == "in" else outside)


def evaluation_loader(
    index: ShardIndex,
    domain: int,
    split: Split,
    *,
    trial_seed: int,
    holdout_fraction: float,
    transform: LoaderTransform,
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
    than `batch_size`. `transform` is of the kinds that `DomainStream` takes.

    Raises `DataConfigError`: an argument is out of range.
    """
    batches = EvaluationBatches(
        index, trial_seed, holdout_fraction, transform, rank, world_size, batch_size,
        decoder or Decoder(),
    )  # fmt: skip
    names, _ = batches.names(domain, split)
    return batches.loader(names, workers, pin_memory)


@dataclass(eq=False)
class EvaluationBatches:
    """The batches of one rank, of every split of every domain; see `evaluation_loader`."""

    index: ShardIndex
    trial_seed: int
    holdout_fraction: float
    transform: LoaderTransform
    rank: int
    world_size: int
    batch_size: int
    decoder: Decoder
    _last: tuple[tuple[int, Split], Int64Array] | None = None
    """The places of the split that was asked for last."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataConfigError(f"batch_size = {self.batch_size}: must be 1 or more")

    def names(self, domain: int, split: Split) -> tuple[list[tuple[int, Split, int]], int]:
        """What `build` calls this rank's batches of a split, and how many a rank has at most."""
        count = -(-len(self._mine(domain, split)) // self.batch_size)
        largest = -(-len(self._places(domain, split)) // self.world_size)
        names = [(domain, split, number) for number in range(count)]
        return names, -(-largest // self.batch_size)

    def loader(
        self, names: Sequence[object], workers: int, pin_memory: bool, keep: bool = False
    ) -> BatchLoader:
        """Load the batches of these names, in order; `keep` is that of `BatchLoader`."""
        return BatchLoader(
            self.build, names, reported=self.index.reported, workers=workers,
            pin_memory=pin_memory, keep=keep,
        )  # fmt: skip

    def build(self, name: tuple[int, Split, int]) -> Batch:
        """Read, decode and transform one batch."""
        domain, split, number = name
        slots = self._mine(domain, split)[number * self.batch_size :][: self.batch_size]
        places = self._places(domain, split)
        loaded = (self._load(domain, int(places[slot])) for slot in slots)
        batch = stack(loaded, len(slots), slots[0])
        if self.index.remote:  # a process that stays must not hold what the cache has deleted
            self.index.close()
        return batch

    def _mine(self, domain: int, split: Split) -> range:
        return rank_range(len(self._places(domain, split)), self.rank, self.world_size)

    def _places(self, domain: int, split: Split) -> Int64Array:
        if self._last is None or self._last[0] != (domain, split):
            places = split_places(
                self.index, domain, split, trial_seed=self.trial_seed,
                holdout_fraction=self.holdout_fraction,
            )  # fmt: skip
            if self.index.remote:  # as they are stored, so that a shard is needed only once
                rows = self.index.table(domain)[places]
                places = places[np.lexsort((rows["offset"], rows["shard"]))]
            self._last = (domain, split), places
        return self._last[1]

    def _load(self, domain: int, place: int) -> LoadedImage:
        found = open_image(self.index, domain, place, self.decoder)
        pixels = undecodable_placeholder() if found.pixels is None else found.pixels
        seed = hash64("evaluation", self.index.domains[domain], place)
        image, draw = made(self.transform, pixels, seed)
        bad = [] if found.bad is None else [found.bad]
        return LoadedImage(image, found.label, domain, found.pixels is None, bad, draw)
