"""Short hashes that tell whether two runs saw the same images, split the same way."""

import hashlib

import numpy as np

from shards import ShardIndex
from shards.stream.evaluation import split_ranks

DIGITS = 16


def data_hash(index: ShardIndex) -> str:
    """Hash of domains, classes, and every image's label, size and checksum in order.

    How the images are packed into shards does not matter.
    """
    digest = hashlib.sha256(repr((index.domains, index.classes)).encode())
    for env in range(len(index.domains)):
        table = index.table(env)
        for column in ("label", "size", "crc32"):
            digest.update(np.ascontiguousarray(table[column]).tobytes())
    return digest.hexdigest()[:DIGITS]


def split_hash(index: ShardIndex, trial_seed: int, holdout_fraction: float) -> str:
    """Hash of which samples of each domain are `in` and `out`; what a list leaves out is neither.

    The same for every held-out domain of one trial seed.
    """
    digest = hashlib.sha256()
    for env in range(len(index.domains)):
        for split in ("in", "out"):
            ranks = split_ranks(
                index, env, split, trial_seed=trial_seed, holdout_fraction=holdout_fraction
            )
            digest.update(f"{env} {split} ".encode())
            digest.update(np.sort(ranks).astype("<i8").tobytes())
    return digest.hexdigest()[:DIGITS]
