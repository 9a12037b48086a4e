"""Pictures that look alike, whatever their sizes and formats, found by a perceptual hash."""

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shards.randomness import Int64Array, UInt64Array

GREY_SIZE = (9, 8)
"""Width and height to which pictures are reduced."""
_NEIGHBOURS = 4
_TURN = 8  # bits by which a hash is turned from one sorting to the next


def difference_hash(grey: npt.NDArray[np.uint8]) -> UInt64Array:
    """The hashes uint64 [n] of small grey pictures [n, 8, 9]: where it gets brighter to the right.

    This is the known dHash.
    """
    brighter = grey[:, :, 1:] > grey[:, :, :-1]
    packed = np.packbits(brighter.reshape(len(grey), 64), axis=1)
    return packed.view(np.uint64)[:, 0]


def look_alikes(grey: npt.NDArray[np.uint8]) -> list[Int64Array]:
    """Groups of two or more of some small grey pictures [n, 8, 9] that look alike, by number.

    Sorted by their hashes, eight times by another byte first, a picture is compared with its
    neighbours, so this takes n log n time; those that hardly differ look alike.
    """
    if len(grey) < 2:
        return []
    hashes, light = difference_hash(grey), grey.sum(axis=(1, 2), dtype=np.int64)
    ones, others = [], []
    for turn in range(0, 64, _TURN):
        turned = (hashes << np.uint64(turn)) | (hashes >> np.uint64(64 - turn) if turn else 0)
        order = np.lexsort((light, turned))
        for step in range(1, min(_NEIGHBOURS + 1, len(order))):
            one, other = order[:-step], order[step:]
            same = _hardly_differ(grey[one], grey[other])
            ones.append(one[same])
            others.append(other[same])
    pairs = np.concatenate(ones), np.concatenate(others)
    graph = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(len(grey), len(grey)))
    _, labels = connected_components(graph, directed=False)
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))


def _hardly_differ(
    one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Whether pictures differ by little of their contrast; bool [n]."""
    difference = np.sqrt(((one.astype(np.float32) - other) ** 2).mean(axis=(1, 2)))
    found: npt.NDArray[np.bool_] = difference <= 0.5 + 0.1 * one.std(axis=(1, 2))
    return found
