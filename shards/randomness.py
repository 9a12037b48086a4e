"""Random numbers as pure arithmetic: hashes, permutations, words by position."""

import functools
import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]
UInt32Array: TypeAlias = npt.NDArray[np.uint32]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]


def hash64(*parts: str | int) -> int:
    """Hash what identifies a random decision, such as `(seed, "aug", name, k)`, to [0, 2**64).

    The parts are joined by a zero byte, which no file name can hold; the number is their 64-bit
    BLAKE2b digest, little-endian.
    """
    text = "\0".join(str(part) for part in parts)
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def splitmix64(x: UInt64Array) -> UInt64Array:
    """Mix uint64 numbers, one to one (the output function of Steele's SplitMix64)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_words(key: int, counters: UInt64Array) -> UInt64Array:
    """Give the random uint64 word at each counter of the stream that `hash64` named `key`."""
    salt = splitmix64(np.array([key], dtype=np.uint64))
    return splitmix64(counters ^ salt).reshape(counters.shape)


@functools.lru_cache(maxsize=64)
def permutation(key: int, n: int) -> Int64Array:
    """Shuffle 0..n-1 by sorting random words; read-only, since it is cached."""
    order = sorting_order(random_words(key, np.arange(n, dtype=np.uint64)))
    order.setflags(write=False)
    return order


def sorting_order(words: UInt64Array) -> Int64Array:
    """Give the stable sorting order of `words`.

    The unstable sort is five times faster, and the same unless two words are equal.
    """
    order = np.argsort(words)
    ordered = words[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(words, kind="stable")
    return order.astype(np.int64, copy=False)
