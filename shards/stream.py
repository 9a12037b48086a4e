"""The training stream: domain-balanced batches, the same at any world size or worker count.

`shards.mixing` says which sample stands where; here samples are read, decoded and augmented.
"""

import logging
from collections.abc import Sequence

from shards.config import SamplingMode
from shards.errors import DamagedDataError, DataConfigError
from shards.index import ShardIndex
from shards.loading import Batch, BatchLoader, LoadedImage, rank_range, seeded, stack
from shards.mixing import DomainMix
from shards.order import hash64, substitute_index
from shards.transforms import ImageTransform, decode_image

log = logging.getLogger(__name__)

_MAX_SUBSTITUTES = 16


class DomainStream(DomainMix):
    """An endless stream of global batches with the same number of images of every source domain.

    Args:
        index: The shard set.
        sources: Numbers of the domains to train on.
        batch_per_domain: Images of each source domain in the global batch.
        seed: Seed of order and augmentation.
        trial_seed: Number of the trial, which fixes the 80/20 split.
        transform: From uint8 [3, h, w] to float32 [3, H, W]; random numbers from torch's default
            generator.
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
        transform: ImageTransform,
        mode: SamplingMode = "permutation",
        holdout_fraction: float = 0.2,
    ) -> None:
        super().__init__(
            index,
            sources=sources,
            batch_per_domain=batch_per_domain,
            seed=seed,
            trial_seed=trial_seed,
            mode=mode,
            holdout_fraction=holdout_fraction,
        )
        self.transform = transform

    def loader(
        self,
        start_step: int,
        stop_step: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        accumulation: int = 1,
        pin_memory: bool = False,
    ) -> BatchLoader:
        """Load a rank's share of a range of steps.

        Args:
            start_step: First step; to resume, the first one not yet done.
            stop_step: First step not to load.
            rank: Number of this process.
            world_size: Number of processes.
            workers: Loader processes.
            accumulation: Micro-batches per step.
            pin_memory: Put batches into page-locked memory.

        Returns:
            A loader of `Batch`, `accumulation` per step, in order.

        Raises:
            DataConfigError: If the steps, rank, world size or accumulation do not fit.
        """
        if not 0 <= start_step <= stop_step:
            raise DataConfigError(
                f"steps {start_step} to {stop_step}: need 0 <= start_step <= stop_step"
            )
        self.check_world_size(world_size, accumulation)
        mine = rank_range(self.global_batch, rank, world_size)
        source = _TrainingBatches(self, range(start_step, stop_step), mine, accumulation)
        return BatchLoader(source, workers=workers, pin_memory=pin_memory)

    def load(self, env: int, position: int, rank: int) -> LoadedImage:
        """Read, decode and augment one slot's image, or its substitute if it cannot be decoded.

        Args:
            env: Number of the domain.
            position: Position in the domain's stream, which keys augmentation and substitute.
            rank: The sample that stands there.

        Returns:
            The image with the label of what was loaded.

        Raises:
            DamagedDataError: If stored bytes are damaged, or no substitute can be decoded.
            OSError: If the storage fails.
        """
        name = self.index.domains[env]
        train = self._train_ranks[env]
        for attempt in range(_MAX_SUBSTITUTES + 1):
            sample = self.index.read(env, rank)
            try:
                pixels = decode_image(sample.image)
            except ValueError as error:
                log.warning("sample %s: %s; replaced by another of its domain", sample.key, error)
                rank = int(
                    train[substitute_index(self.seed, name, len(train), position, attempt + 1)]
                )
                continue
            image = seeded(self.transform, pixels, hash64(self.seed, "aug", name, position))
            return LoadedImage(image, sample.label, env, attempt > 0)
        raise DamagedDataError(
            f"domain {name!r}: {_MAX_SUBSTITUTES} images in a row cannot be decoded; "
            "check the set with `python -m shards.writer --verify --deep`"
        )


class _TrainingBatches:
    """The micro-batches of one rank over a range of steps; `mine` is its range of slots."""

    def __init__(self, stream: DomainStream, steps: range, mine: range, accumulation: int) -> None:
        self.stream = stream
        self.steps = steps
        self.mine = mine
        self.accumulation = accumulation

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def build(self, number: int) -> Batch:
        step, piece = divmod(number, self.accumulation)
        size = len(self.mine) // self.accumulation
        part = self.mine[piece * size : (piece + 1) * size]
        slots = self.stream.slots(self.steps[step], part)
        items = [
            self.stream.load(int(env), int(position), int(rank))
            for env, position, rank in zip(*slots, strict=True)
        ]
        return stack(items, part.start)
