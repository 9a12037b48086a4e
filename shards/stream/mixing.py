"""What stands in every slot of every global batch: pure arithmetic on the index, no image is read.

Letters: D source domains, m images of each per global batch, G = D*m, R ranks, A micro-batches.
Slot s = i*D + d of step b holds element b*m + i of domain d's endless stream, and rank r owns the
slots [r*G/R, (r+1)*G/R), cut in A equal pieces. Nothing is stored: to resume, ask for a later step.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shards.config import SamplingMode, order_problems
from shards.errors import DataConfigError
from shards.randomness import Int64Array, UInt32Array
from shards.read.index import ShardIndex
from shards.read.remote import Windows
from shards.stream.order import ORDER_ID, DomainOrder
from shards.stream.split import split_indices

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
        mode: `permutation` (every image once per epoch), `window` (the same, some shards at a time)
            or `replacement` (independent draws).
        window: Shards of a domain that are read at a time; only with `window`.
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
        window: int = 0,
        holdout_fraction: float = 0.2,
    ) -> None:
        _check_arguments(index, sources, batch_per_domain)
        if problems := order_problems(mode, window):
            raise DataConfigError(problems[0])
        self.index = index
        self.sources = tuple(int(env) for env in sources)
        self.batch_per_domain = batch_per_domain
        self.seed = seed
        self.trial_seed = trial_seed
        self.mode: SamplingMode = mode
        self.window = window
        self.holdout_fraction = holdout_fraction
        self._train_ranks = {env: self._training_part(env) for env in self.sources}
        self._orders = {
            env: DomainOrder(
                seed,
                index.domains[env],
                len(ranks),
                mode,
                window,
                index.table(env)["shard"][ranks],
            )
            for env, ranks in self._train_ranks.items()
        }

    def _training_part(self, env: int) -> UInt32Array:
        """Give the ranks of a domain's `in` split, as small as they can be stored."""
        num = self.index.num_samples(env)
        inside, _ = split_indices(num, self.trial_seed, env, self.holdout_fraction)
        kept = self.index.kept(env, inside)
        if not len(kept):
            raise DataConfigError(
                f"domain {self.index.domains[env]!r}: none of its {len(inside)} training images "
                "remains; change data.exclude_list or data.include_list"
            )
        return kept.astype(np.uint32)

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
            ranks[here] = self._train_ranks[env][self._orders[env].elements(positions[here])]
        return Slots(np.asarray(self.sources, dtype=np.int64)[which], positions, ranks)

    def windows(self, step: int) -> Windows:
        """Tell which shards a step reads, and which come after those.

        Args:
            step: Number of the step.

        Returns:
            Shards of all source domains' current windows, and of their next ones.
        """
        live: set[int] = set()
        following: set[int] = set()
        first = step * self.batch_per_domain
        for order in self._orders.values():
            windows = order.windows(first, first + self.batch_per_domain - 1)
            live.update(windows.live)
            following.update(windows.following)
        return Windows(sorted(live), sorted(following - live))

    def shard_bytes_at_a_time(self) -> int:
        """Bound the bytes of the shards that are read at a time, one window ahead included.

        Returns:
            Two windows of every source domain, by its largest shards; without windows all shards.
        """
        total = 0
        for order in self._orders.values():
            sizes = sorted((self.index.shards[shard].bytes for shard in order.shards), reverse=True)
            total += sum(sizes[: 2 * self.window] if self.mode == "window" else sizes)
        return total

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
            "window": self.window,
            "holdout_fraction": self.holdout_fraction,
            "subset": self.index.subset.fingerprint if self.index.subset else None,
        }


def _check_arguments(index: ShardIndex, sources: Sequence[int], batch_per_domain: int) -> None:
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
