"""The order of the data as pure arithmetic: endless per-domain streams.

Nothing here reads data or keeps state but a cache, and no library's random generator is used, so
the order of a run cannot change with a version, a world size or a number of workers. `ORDER_ID`
names the algorithm; it changes whenever any function here would return another number.
"""

from collections import OrderedDict
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards import randomness
from shards.config import SamplingMode
from shards.read.remote import Windows

ORDER_ID = "splitmix64-1"

_CACHED_ELEMENTS = 500_000  # of one domain's epochs, of which two are kept whatever their size


class Epoch(NamedTuple):
    """One epoch of a domain, laid out."""

    order: randomness.UInt32Array
    """[n], the element at each position of the epoch."""
    starts: randomness.Int64Array
    """[windows], the position at which each window starts."""


@dataclass(eq=False)
class DomainOrder:
    """The endless stream over the training samples of one domain, by position.

    With `permutation` position k lies in epoch k div n, and every epoch is a new permutation of all
    n samples; a small domain simply starts its next epoch earlier than the others. With `window`
    every epoch shuffles the shards, takes `window` of them at a time, and exhausts these, permuted,
    before the next; so few shards are needed at any moment, and with a window of all shards it is
    the order of `permutation`. With `replacement` every position is an independent draw, as
    DomainBed's sampler does it.
    """

    seed: int
    """Of the run."""
    name: str
    """Of the domain."""
    n: int
    """Number of samples, at least 1."""
    mode: SamplingMode = "permutation"
    window: int = 0
    """Shards per window; only with `window`."""
    sample_shards: InitVar[npt.ArrayLike] = ()
    """Integers [n], the shard of every sample; needed with `window`."""

    def __post_init__(self, sample_shards: npt.ArrayLike) -> None:
        numbers = np.asarray(sample_shards, dtype=np.int64)
        self.shards, which = np.unique(numbers, return_inverse=True)
        self._which = which.astype(np.uint32)  # of `shards` each sample is in
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()

    def elements(self, k: npt.ArrayLike) -> randomness.Int64Array:
        """Give the element in [0, n) at each position >= 0; int64 of the shape of `k`."""
        positions = np.asarray(k, dtype=np.int64)
        if self.mode == "replacement":
            key = randomness.hash64(self.seed, self.name, "replacement")
            words = randomness.random_words(key, positions.astype(np.uint64))
            return (words % np.uint64(self.n)).astype(np.int64)
        result = np.empty_like(positions)
        epochs = positions // self.n
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self.epoch(int(epoch)).order[positions[here] % self.n]
        return result

    def epoch(self, number: int) -> Epoch:
        """Lay out an epoch; the last few stay in memory."""
        if number in self._epochs:
            self._epochs.move_to_end(number)
            return self._epochs[number]
        key = randomness.hash64(self.seed, self.name, number)
        order = randomness.sorting_order(
            randomness.random_words(key, np.arange(self.n, dtype=np.uint64))
        )
        starts = np.zeros(1, dtype=np.int64)
        if self.mode == "window":
            window_of = np.empty(len(self.shards), dtype=np.uint32)
            window_of[self._shard_order(number)] = np.arange(len(self.shards)) // self.window
            groups = window_of[self._which]
            order = order[np.argsort(groups[order], kind="stable")]
            starts = np.concatenate([starts, np.bincount(groups).cumsum()[:-1]])
        while len(self._epochs) >= max(2, _CACHED_ELEMENTS // self.n):
            self._epochs.popitem(last=False)
        self._epochs[number] = Epoch(order.astype(np.uint32), starts)
        return self._epochs[number]

    def windows(self, first: int, last: int) -> Windows:
        """Tell which shards the positions `first` to `last` read, and which are read next.

        Without windows these are all shards of the domain, and none.
        """
        if self.mode != "window":
            return Windows(self.shards.tolist(), [])
        live: set[int] = set()
        while True:
            epoch, position = divmod(first, self.n)
            starts = self.epoch(epoch).starts
            group = int(np.searchsorted(starts, position, side="right"))
            live.update(self._shards_of(epoch, group - 1))
            ends_epoch = group == len(starts)
            first = epoch * self.n + (self.n if ends_epoch else int(starts[group]))
            if first > last:
                next_window = (epoch + 1, 0) if ends_epoch else (epoch, group)
                return Windows(sorted(live), sorted(self._shards_of(*next_window)))

    def _shards_of(self, epoch: int, group: int) -> list[int]:
        chosen = self._shard_order(epoch)[group * self.window : (group + 1) * self.window]
        found: list[int] = self.shards[chosen].tolist()
        return found

    def _shard_order(self, epoch: int) -> randomness.Int64Array:
        """Give the places in `shards`, in the order in which an epoch takes them."""
        return randomness.permutation(
            randomness.hash64(self.seed, self.name, "shards", epoch), len(self.shards)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict()}


def substitute_index(seed: int, name: str, n: int, k: int, attempt: int) -> int:
    """Give the element in [0, n) that stands in for the unreadable one at position `k` of a domain.

    `attempt` is 1 for the first substitute, 2 if that cannot be read either, and so on. No other
    position is moved by it.
    """
    return randomness.hash64(seed, "substitute", name, k, attempt) % n
