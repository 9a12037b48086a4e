"""What stands in every slot of every global batch: pure arithmetic on the index, no image is read.

Letters: D source domains, m images of each per global batch, G = D*m, R ranks, A micro-batches.
Slot s = i*D + d of step b holds element b*m + i of domain d's endless stream, and rank r owns the
slots [r*G/R, (r+1)*G/R), cut in A equal pieces. Nothing is stored: to resume, ask for a later step.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from shards.config import SamplingMode
from shards.errors import DataConfigError
from shards.index import ShardIndex
from shards.order import ORDER_ID, Int64Array, stream_index
from shards.split import split_indices

FINGERPRINT_VERSION = 1


class Slots(NamedTuple):
    """A run of slots: int64 arrays [count] of domain numbers, stream positions and ranks."""

    envs: Int64Array
    positions: Int64Array
    ranks: Int64Array


class DomainMix:
    """The order of an endless stream of domain-balanced global batches.

    Args:
        index: The shard set.
        sources: Numbers of the domains to train on.
        batch_per_domain: Images of each source domain in the global batch.
        seed: Seed of order and augmentation.
        trial_seed: Number of the trial, which fixes the 80/20 split.
        mode: `permutation` (every image once per epoch) or `replacement` (independent draws).
        holdout_fraction: Share of every domain that is kept for validation.

    Raises:
        DataConfigError: If an argument is out of range.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        sources: Sequence[int],
        batch_per_domain: int,
        seed: int,
        trial_seed: int,
        mode: SamplingMode = "permutation",
        holdout_fraction: float = 0.2,
    ) -> None:
        _check_arguments(index, sources, batch_per_domain, mode)
        self.index = index
        self.sources = tuple(int(env) for env in sources)
        self.batch_per_domain = batch_per_domain
        self.seed = seed
        self.trial_seed = trial_seed
        self.mode: SamplingMode = mode
        self.holdout_fraction = holdout_fraction
        self._train_ranks = {
            env: split_indices(index.num_samples(env), trial_seed, env, holdout_fraction)[0]
            for env in self.sources
        }

    @property
    def global_batch(self) -> int:
        """Images per step over all ranks."""
        return len(self.sources) * self.batch_per_domain

    def num_train(self, env: int) -> int:
        """Give the number of training samples of a source domain.

        Args:
            env: Number of the domain.

        Returns:
            The size of its `in` split, which is the length of its epoch.
        """
        return len(self._train_ranks[env])

    def epochs(self, step: int) -> dict[str, float]:
        """Tell how often each source domain has been gone through before a step.

        Args:
            step: Number of the step.

        Returns:
            Domain name to (possibly fractional) number of epochs.
        """
        seen = step * self.batch_per_domain
        return {self.index.domains[env]: seen / self.num_train(env) for env in self.sources}

    def legal_world_sizes(self) -> list[int]:
        """List the numbers of ranks that can share the global batch equally.

        Returns:
            All divisors of the global batch, ascending.
        """
        total = self.global_batch
        return [size for size in range(1, total + 1) if total % size == 0]

    def check_world_size(self, world_size: int, accumulation: int = 1) -> None:
        """Raise unless the global batch can be cut for that many ranks and micro-batches.

        Args:
            world_size: Number of ranks.
            accumulation: Micro-batches per step and rank.

        Raises:
            DataConfigError: If it cannot; lists what can.
        """
        made_of = (
            f"the global batch of {self.global_batch} images "
            f"({len(self.sources)} source domains x {self.batch_per_domain})"
        )
        if world_size not in (legal := self.legal_world_sizes()):
            raise DataConfigError(
                f"world size {world_size} does not divide {made_of}; "
                f"legal: {', '.join(map(str, legal))}"
            )
        per_rank = self.global_batch // world_size
        if accumulation < 1 or per_rank % accumulation:
            legal = [count for count in range(1, per_rank + 1) if per_rank % count == 0]
            raise DataConfigError(
                f"{accumulation} micro-batches do not divide the {per_rank} images per rank of "
                f"{made_of} on {world_size} ranks; legal: {', '.join(map(str, legal))}"
            )

    def slots(self, step: int, part: range | None = None) -> Slots:
        """Compute what stands in some slots of a global batch.

        Args:
            step: Number of the step.
            part: The slots; None for all.

        Returns:
            Domain, stream position and ImageFolder rank of each slot.
        """
        part = range(self.global_batch) if part is None else part
        numbers = np.arange(part.start, part.stop, dtype=np.int64)
        which = numbers % len(self.sources)
        positions = step * self.batch_per_domain + numbers // len(self.sources)
        ranks = np.empty_like(numbers)
        for place, env in enumerate(self.sources):
            here = which == place
            train = self._train_ranks[env]
            name = self.index.domains[env]
            chosen = stream_index(self.seed, name, len(train), positions[here], self.mode)
            ranks[here] = train[chosen]
        return Slots(np.asarray(self.sources, dtype=np.int64)[which], positions, ranks)

    def keys(self, step: int) -> list[str]:
        """Name the samples of a global batch without reading them.

        Args:
            step: Number of the step.

        Returns:
            Sample keys by slot.
        """
        envs, _, ranks = self.slots(step)
        return [self.index.key(int(env), int(rank)) for env, rank in zip(envs, ranks, strict=True)]

    def batch_digest(self, step: int) -> str:
        """Hash the keys of a global batch, to compare runs step by step.

        Args:
            step: Number of the step.

        Returns:
            16 hexadecimal digits.
        """
        text = "\n".join(self.keys(step))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def fingerprint(self) -> dict[str, Any]:
        """Describe everything that determines the order of the samples.

        Returns:
            A dictionary that JSON can store; two streams with equal fingerprints give the same keys
            at every step. World size, micro-batches and workers are not in it: they change nothing.
        """
        return {
            "version": FINGERPRINT_VERSION,
            "order": ORDER_ID,
            "index_sha256": self.index.sha256,
            "sources": [[self.index.domains[env], self.num_train(env)] for env in self.sources],
            "batch_per_domain": self.batch_per_domain,
            "seed": self.seed,
            "trial_seed": self.trial_seed,
            "mode": self.mode,
            "window": 0,
            "holdout_fraction": self.holdout_fraction,
        }


def _check_arguments(
    index: ShardIndex, sources: Sequence[int], batch_per_domain: int, mode: str
) -> None:
    """Raise on the first argument that is out of range."""
    count = len(index.domains)
    if not sources or len(set(sources)) != len(sources):
        raise DataConfigError(f"sources = {list(sources)}: need at least one domain, each once")
    for env in sources:
        if not 0 <= env < count:
            raise DataConfigError(f"sources: domain number {env} must lie in [0, {count})")
        if index.num_samples(env) < 1:
            raise DataConfigError(f"sources: domain {index.domains[env]!r} holds no sample")
    if batch_per_domain < 1:
        raise DataConfigError(f"train.batch_per_domain = {batch_per_domain}: must be 1 or more")
    if mode not in get_args(SamplingMode):
        raise DataConfigError(
            f"data.mode = {mode!r}: must be one of {', '.join(get_args(SamplingMode))}"
        )
