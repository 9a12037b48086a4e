"""The train/validation split of a domain, number for number as DomainBed makes it."""

import hashlib

import numpy as np

from shards.errors import DataConfigError
from shards.randomness import Int64Array


def seed_hash(*parts: object) -> int:
    """Derive a seed in [0, 2**31) from anything with a `repr`, as DomainBed's `seed_hash`."""
    digest = hashlib.md5(str(parts).encode(), usedforsecurity=False)
    return int(digest.hexdigest(), 16) % 2**31


def split_seed(trial_seed: int, env: int) -> int:
    """Give the seed of the split of one domain (DomainBed's `seed_hash(trial_seed, env)`)."""
    return seed_hash(int(trial_seed), int(env))


def split_indices(
    n: int, trial_seed: int, env: int, holdout_fraction: float = 0.2
) -> tuple[Int64Array, Int64Array]:
    """Split the samples of one domain into a training part and a held-out part.

    A sample's number is its place in the domain's sorted file list (torchvision's `ImageFolder`
    order), so that the parts equal those of DomainBed for the same files.

    Args:
        n: number of samples of the domain.
        trial_seed: number of the trial; one trial shares one split.
        env: number of the domain in the dataset's order, held-out domains counted.
        holdout_fraction: share of the samples that goes to the held-out part, rounded down.

    Returns:
        `(in_indices, out_indices)`: int64 arrays in DomainBed's shuffled order, disjoint, together
        all of 0..n-1.

    Raises:
        DataConfigError: `n` is negative or the fraction lies outside [0, 1).
    """
    if n < 0:
        raise DataConfigError(f"n = {n}: the number of samples must be 0 or more")
    if not 0 <= holdout_fraction < 1:
        raise DataConfigError(
            f"holdout_fraction = {holdout_fraction}: must lie in [0, 1); DomainBed uses 0.2"
        )
    keys = np.arange(n, dtype=np.int64)
    np.random.RandomState(split_seed(trial_seed, env)).shuffle(keys)
    cut = int(n * holdout_fraction)
    return keys[cut:], keys[:cut]
