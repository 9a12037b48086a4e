"""The order of the data as pure arithmetic: hashes, permutations and endless per-domain streams.

Nothing here reads data or keeps state, and no library's random generator is used, so the order of a
run cannot change with a version, a world size or a number of workers. `ORDER_ID` names the
algorithm; it changes whenever any function here would return another number.
"""

import functools
import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shards.config import SamplingMode

ORDER_ID = "splitmix64-1"

Int64Array: TypeAlias = npt.NDArray[np.int64]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]


def hash64(*parts: str | int) -> int:
    """Hash strings and integers to one number in [0, 2**64).

    Args:
        *parts: What identifies the random decision, for example `(seed, "aug", domain, k)`. They
            are joined by a zero byte, which no file name can hold.

    Returns:
        The 64-bit BLAKE2b digest, read as a little-endian integer.
    """
    text = "\0".join(str(part) for part in parts)
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def splitmix64(x: UInt64Array) -> UInt64Array:
    """Mix 64-bit integers, element by element (the output function of Steele's SplitMix64).

    Args:
        x: uint64 array of any shape.

    Returns:
        uint64 array of the same shape; a bijection of [0, 2**64).
    """
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_words(key: int, counters: UInt64Array) -> UInt64Array:
    """Give the random 64-bit word at each counter of the stream named by `key`.

    Args:
        key: Name of the stream, as from `hash64`.
        counters: uint64 array of any shape.

    Returns:
        uint64 array of the same shape.
    """
    salt = splitmix64(np.array([key], dtype=np.uint64))
    return splitmix64(counters ^ salt).reshape(counters.shape)


@functools.lru_cache(maxsize=64)
def permutation(key: int, n: int) -> Int64Array:
    """Shuffle 0..n-1 by sorting random words.

    Args:
        key: Name of the permutation, as from `hash64`.
        n: How many numbers.

    Returns:
        int64 array [n], read-only since it is cached (140,000 entries take about 30 ms).
    """
    words = random_words(key, np.arange(n, dtype=np.uint64))
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def stream_index(
    seed: int, domain: str, n: int, k: npt.ArrayLike, mode: SamplingMode = "permutation"
) -> Int64Array:
    """Give the element of a domain of `n` samples at each position of its endless stream.

    With `permutation` position k lies in epoch k div n, and every epoch is a new permutation of all
    n samples; a small domain simply starts its next epoch earlier than the others. With
    `replacement` every position is an independent draw, as DomainBed's sampler does it.

    Args:
        seed: Seed of the run.
        domain: Name of the domain.
        n: Number of samples, at least 1.
        k: Positions >= 0, integers of any shape.
        mode: `permutation` or `replacement`.

    Returns:
        int64 array of the shape of `k`, values in [0, n).
    """
    positions = np.asarray(k, dtype=np.int64)
    if mode == "replacement":
        words = random_words(hash64(seed, domain, mode), positions.astype(np.uint64))
        return (words % np.uint64(n)).astype(np.int64)
    result = np.empty_like(positions)
    epochs = positions // n
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = permutation(hash64(seed, domain, int(epoch)), n)[positions[here] % n]
    return result


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
