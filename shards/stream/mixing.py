"""What stands in every slot of every global batch: pure arithmetic on the index, no image is read.

Letters: D source domains, m images of each per global batch, G = D*m, R ranks, A micro-batches.
Slot s = i*D + d of step b holds element b*m + i of domain d's endless stream, and rank r owns the
slots [r*G/R, (r+1)*G/R), cut in A equal pieces. Nothing is stored: to resume, ask for a later step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards.config import SamplingMode, order_problems
from shards.errors import DataConfigError
from shards.randomness import Int64Array, UInt32Array
from shards.read.index import ShardIndex
from shards.read.remote import Windows
from shards.stream.order import ORDER_ID, DomainOrder
from shards.stream.split import split_domain

FINGERPRINT_VERSION = 1


class Slots(NamedTuple):
    """A run of slots: int64 arrays [count] of domain numbers, stream positions and places.

    A place is one in the domain's sorted file list.
    """

    domains: Int64Array
    positions: Int64Array
    places: Int64Array


@dataclass(eq=False, kw_only=True)
class DomainMix:
    """The order of an endless stream of domain-balanced global batches.

    Raises `DataConfigError`: an argument is out of range.
    """

    index: ShardIndex = field(kw_only=False)
    sources: Sequence[int]
    """Numbers of the domains to train on."""
    batch_per_domain: int
    """Images of each source domain in the global batch."""
    seed: int
    """Of order and augmentation."""
    trial_seed: int
    """Number of the trial, which fixes the 80/20 split."""
    mode: SamplingMode = "permutation"
    """As `data.order`; see `DomainOrder`."""
    window: int = 0
    """Shards of a domain that are read at a time; only with `window`."""
    holdout_fraction: float = 0.2
    """Share of every domain that is kept for validation."""

    def __post_init__(self) -> None:
        self.sources = tuple(int(domain) for domain in self.sources)
        self._check_arguments()
        self._train_places = {domain: self._training_part(domain) for domain in self.sources}
        self._orders = {
            domain: DomainOrder(
                self.seed, self.index.domains[domain], len(places), self.mode, self.window,
                self.index.table(domain)["shard"][places],
            )
            for domain, places in self._train_places.items()
        }  # fmt: skip

    def _check_arguments(self) -> None:
        sources, count = list(self.sources), len(self.index.domains)
        if not sources or len(set(sources)) != len(sources):
            raise DataConfigError(f"sources = {sources}: need at least one domain, each once")
        for domain in sources:
            if not 0 <= domain < count:
                raise DataConfigError(f"sources: domain number {domain} must lie in [0, {count})")
            if self.index.num_samples(domain) < 1:
                raise DataConfigError(
                    f"sources: domain {self.index.domains[domain]!r} holds no sample"
                )
        if self.batch_per_domain < 1:
            raise DataConfigError(
                f"train.batch_per_domain = {self.batch_per_domain}: must be 1 or more"
            )
        if problems := order_problems(self.mode, self.window):
            raise DataConfigError(problems[0])

    def _training_part(self, domain: int) -> UInt32Array:
        """Give the places of a domain's `in` split, as small as they can be stored."""
        inside, _ = split_domain(self.index, domain, self.trial_seed, self.holdout_fraction)
        kept = self.index.kept(domain, inside)
        if not len(kept):
            raise DataConfigError(
                f"domain {self.index.domains[domain]!r}: none of its {len(inside)} training images "
                "remains; change data.exclude_list or data.include_list"
            )
        return kept.astype(np.uint32)

    @property
    def global_batch(self) -> int:
        """Images per step over all ranks."""
        return len(self.sources) * self.batch_per_domain

    def num_train(self, domain: int) -> int:
        """Count the training samples of a source domain, which is the length of its epoch."""
        return len(self._train_places[domain])

    def epochs(self, step: int) -> dict[str, float]:
        """Tell how often each source domain, by name, has been gone through before a step."""
        seen = step * self.batch_per_domain
        return {
            self.index.domains[source]: seen / self.num_train(source) for source in self.sources
        }

    def legal_world_sizes(self) -> list[int]:
        """List the numbers of ranks that can share the global batch equally, ascending."""
        total = self.global_batch
        return [size for size in range(1, total + 1) if total % size == 0]

    def check_world_size(self, world_size: int, accumulation: int = 1) -> None:
        """Raise `DataConfigError` unless the global batch can be cut so; it lists what is legal."""
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

    def slots(self, step: int, part: range | Int64Array | None = None) -> Slots:
        """Compute what stands in some slots of a step's global batch; `part` None means all."""
        part = range(self.global_batch) if part is None else part
        numbers = np.arange(part.start, part.stop) if isinstance(part, range) else part
        which = numbers % len(self.sources)
        positions = step * self.batch_per_domain + numbers // len(self.sources)
        places = np.empty_like(numbers)
        for source, domain in enumerate(self.sources):
            here = which == source
            elements = self._orders[domain].elements(positions[here])
            places[here] = self._train_places[domain][elements]
        return Slots(np.asarray(self.sources, dtype=np.int64)[which], positions, places)

    def windows(self, step: int) -> Windows:
        """Tell which shards a step reads, of all source domains, and which come after those."""
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

        Two windows of every source domain, by its largest shards; without windows all shards.
        """
        total = 0
        for order in self._orders.values():
            sizes = sorted((self.index.shards[shard].bytes for shard in order.shards), reverse=True)
            total += sum(sizes[: 2 * self.window] if self.mode == "window" else sizes)
        return total

    def keys(self, step: int) -> list[str]:
        """Name the samples of a global batch, by slot, without reading them."""
        domains, _, places = self.slots(step)
        return [
            self.index.key(*slot) for slot in zip(domains.tolist(), places.tolist(), strict=True)
        ]

    def batch_digest(self, step: int) -> str:
        """Hash the keys of a global batch to 16 hex digits, to compare runs step by step."""
        text = "\n".join(self.keys(step))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def fingerprint(self) -> dict[str, Any]:
        """Describe everything that determines the order of the samples, as JSON can store it.

        Two streams with equal fingerprints give the same keys at every step. World size,
        micro-batches and workers are not in it: they change nothing.
        """
        return {
            "version": FINGERPRINT_VERSION,
            "order": ORDER_ID,
            "index_sha256": self.index.sha256,
            "sources": [
                [self.index.domains[source], self.num_train(source)] for source in self.sources
            ],
            "batch_per_domain": self.batch_per_domain,
            "seed": self.seed,
            "trial_seed": self.trial_seed,
            "mode": self.mode,
            "window": self.window,
            "holdout_fraction": self.holdout_fraction,
            "subset": self.index.subset.fingerprint if self.index.subset else None,
        }
