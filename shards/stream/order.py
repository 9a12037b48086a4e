"""The order of the data as pure arithmetic: hashes, permutations and endless per-domain streams.

Nothing here reads data or keeps state but a cache, and no library's random generator is used, so
the order of a run cannot change with a version, a world size or a number of workers. `ORDER_ID`
names the algorithm; it changes whenever any function here would return another number.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.config import SamplingMode
from shards.randomness import (
    Int64Array,
    UInt32Array,
    _counters,
    _sorting_order,
    hash64,
    permutation,
    random_words,
)
from shards.read.remote import Windows

ORDER_ID = "splitmix64-1"


_CACHED_ELEMENTS = 500_000  # of one domain's epochs, of which two are kept whatever their size


class Epoch(NamedTuple):
    """One epoch of a domain, laid out.

    Attributes:
        order: uint32 array [n], the element at each position of the epoch.
        starts: int64 array [windows], the position at which each window starts.
    """

    order: UInt32Array
    starts: Int64Array


class DomainOrder:
    """The endless stream over the training samples of one domain, by position.

    With `permutation` position k lies in epoch k div n, and every epoch is a new permutation of all
    n samples; a small domain simply starts its next epoch earlier than the others. With `window`
    every epoch shuffles the shards, takes `window` of them at a time, and exhausts these, permuted,
    before the next; so few shards are needed at any moment, and with a window of all shards it is
    the order of `permutation`. With `replacement` every position is an independent draw, as
    DomainBed's sampler does it.

    Args:
        seed: Seed of the run.
        domain: Name of the domain.
        n: Number of samples, at least 1.
        mode: `permutation`, `window` or `replacement`.
        window: Shards per window; only with `window`.
        shards: Integer array [n], the shard of every sample; needed with `window`.
    """

    def __init__(
        self,
        seed: int,
        domain: str,
        n: int,
        mode: SamplingMode = "permutation",
        window: int = 0,
        shards: npt.ArrayLike = (),
    ) -> None:
        self.seed = seed
        self.domain = domain
        self.n = n
        self.mode = mode
        self.window = window
        self.shards, places = np.unique(np.asarray(shards, dtype=np.int64), return_inverse=True)
        self._places = places.astype(np.uint32)  # of every sample's shard in `shards`
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()

    def elements(self, k: npt.ArrayLike) -> Int64Array:
        """Give the element at each position.

        Args:
            k: Positions >= 0, integers of any shape.

        Returns:
            int64 array of the shape of `k`, values in [0, n).
        """
        positions = np.asarray(k, dtype=np.int64)
        if self.mode == "replacement":
            key = hash64(self.seed, self.domain, "replacement")
            words = random_words(key, positions.astype(np.uint64))
            return (words % np.uint64(self.n)).astype(np.int64)
        result = np.empty_like(positions)
        epochs = positions // self.n
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self.epoch(int(epoch)).order[positions[here] % self.n]
        return result

    def epoch(self, number: int) -> Epoch:
        """Lay out an epoch; the last few stay in memory.

        Args:
            number: Number of the epoch.

        Returns:
            Its order and its windows.
        """
        if number in self._epochs:
            self._epochs.move_to_end(number)
            return self._epochs[number]
        words = random_words(hash64(self.seed, self.domain, number), _counters(self.n))
        order = _sorting_order(words)
        starts = np.zeros(1, dtype=np.int64)
        if self.mode == "window":
            group_of_place = np.empty(len(self.shards), dtype=np.uint32)
            group_of_place[self._shard_order(number)] = _counters(len(self.shards)) // np.uint64(
                self.window
            )
            groups = group_of_place[self._places]
            order = order[np.argsort(groups[order], kind="stable")]
            starts = np.concatenate([starts, np.bincount(groups).cumsum()[:-1]])
        while len(self._epochs) >= max(2, _CACHED_ELEMENTS // self.n):
            self._epochs.popitem(last=False)
        self._epochs[number] = Epoch(order.astype(np.uint32), starts)
        return self._epochs[number]

    def windows(self, first: int, last: int) -> Windows:
        """Tell which shards a stretch of the stream reads, and which are read next.

        Args:
            first: Its first position.
            last: Its last position, at least `first`.

        Returns:
            The shards of the windows from `first` to `last` and of the one after; without windows
            all shards of the domain, and none.
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
        """List the shards of a window."""
        chosen = self._shard_order(epoch)[group * self.window : (group + 1) * self.window]
        found: list[int] = self.shards[chosen].tolist()
        return found

    def _shard_order(self, epoch: int) -> Int64Array:
        """Give the places in `shards`, in the order in which an epoch takes them."""
        return permutation(hash64(self.seed, self.domain, "shards", epoch), len(self.shards))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict()}


def substitute_index(seed: int, domain: str, n: int, k: int, attempt: int) -> int:
    """Give the element that stands in for an unreadable one, without moving any other position.

    Args:
        seed: Seed of the run.
        domain: Name of the domain.
        n: Number of samples.
        k: Position in the domain's stream.
        attempt: 1 for the first substitute, 2 if that cannot be read either, and so on.

    Returns:
        A number in [0, n).
    """
    return hash64(seed, "substitute", domain, k, attempt) % n
