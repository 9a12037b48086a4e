"""The train/validation split of a domain, number for number as DomainBed makes it.

A set may say that its images come in groups, as the pictures of a patient or of a burst do. Then
whole groups are drawn instead, and a group is on the same side in every domain.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from shards.errors import DataConfigError
from shards.randomness import Int64Array, UInt64Array
from shards.read.index import ShardIndex


def seed_hash(*parts: object) -> int:
    """Derive a seed in [0, 2**31) from anything with a `repr`, as DomainBed's `seed_hash`."""
    digest = hashlib.md5(str(parts).encode(), usedforsecurity=False)
    return int(digest.hexdigest(), 16) % 2**31


def split_seed(trial_seed: int, env: int) -> int:
    """Give the seed of the split of one domain (DomainBed's `seed_hash(trial_seed, env)`)."""
    return seed_hash(int(trial_seed), int(env))


def split_domain(
    index: ShardIndex, domain: int, trial_seed: int, holdout_fraction: float
) -> tuple[Int64Array, Int64Array]:
    """Split a domain of a set, given by number, as the set asks for; gives places.

    Returns and raises as `split_indices`.
    """
    if index.group_by is None:
        return split_indices(index.num_samples(domain), trial_seed, domain, holdout_fraction)
    return _split_of_groups(index, trial_seed, holdout_fraction)[domain]


@functools.lru_cache(maxsize=2)  # asked for domain by domain
def _split_of_groups(
    index: ShardIndex, trial_seed: int, holdout_fraction: float
) -> list[tuple[Int64Array, Int64Array]]:
    groups = [index.table(domain)["group"] for domain in range(len(index.domains))]
    parts = split_groups(groups, trial_seed, holdout_fraction)
    for places in itertools.chain(*parts):
        places.setflags(write=False)
    return parts


def split_groups(
    groups: Sequence[UInt64Array], trial_seed: int, holdout_fraction: float = 0.2
) -> list[tuple[Int64Array, Int64Array]]:
    """Split domains so that no group lies on both sides, not even in different domains.

    The groups that a domain does not share with earlier ones are shuffled as DomainBed shuffles
    samples. Each goes to the held-out part if that does not become too large, and one more if that
    brings it nearer to its share: it misses it by at most half of the smallest group left, as far
    as earlier domains leave a choice. Groups of one sample each give `split_indices`.

    Args:
        groups: for every domain in order, the group of each sample by place.
        trial_seed: number of the trial.
        holdout_fraction: share of the samples of each domain.

    Returns:
        As `split_indices`, for every domain.
    """
    _check_fraction(holdout_fraction)
    known = held_out = np.zeros(0, dtype=np.uint64)
    parts = []
    for env, group in enumerate(groups):
        names, first, which, sizes = np.unique(
            group, return_index=True, return_inverse=True, return_counts=True
        )
        order = np.argsort(first)
        np.random.RandomState(split_seed(trial_seed, env)).shuffle(order)
        out = np.isin(names, held_out)
        new = order[~np.isin(names, known)[order]]
        room = int(len(group) * holdout_fraction) - int(sizes[out].sum())
        for number in new:
            if sizes[number] <= room:
                out[number] = True
                room -= int(sizes[number])
        rest = new[~out[new]]
        if room > 0 and len(rest):
            smallest = rest[sizes[rest].argmin()]
            nearer = sizes[smallest] < 2 * room
            out[smallest] = nearer and sizes[~out].sum() > sizes[smallest]  # something is to train
        known, held_out = np.union1d(known, names), np.union1d(held_out, names[out])
        turn = np.empty(len(names), dtype=np.int64)
        turn[order] = np.arange(len(names))
        places = np.argsort(turn[which], kind="stable")
        parts.append((places[~out[which[places]]], places[out[which[places]]]))
    return parts


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
    _check_fraction(holdout_fraction)
    keys = np.arange(n, dtype=np.int64)
    np.random.RandomState(split_seed(trial_seed, env)).shuffle(keys)
    cut = int(n * holdout_fraction)
    return keys[cut:], keys[:cut]


def _check_fraction(holdout_fraction: float) -> None:
    if not 0 <= holdout_fraction < 1:
        raise DataConfigError(
            f"holdout_fraction = {holdout_fraction}: must lie in [0, 1); DomainBed uses 0.2"
        )
