"""The training stream: domain-balanced batches, the same at any world size or worker count.

`DomainMix` says which sample stands where; here samples are read, decoded and augmented.
"""

import functools
from dataclasses import dataclass, field

import numpy as np

from shards.config import Mix
from shards.errors import DamagedDataError, DataConfigError, verify_command
from shards.pixels.decoding import Decoder
from shards.pixels.transforms import LoaderTransform
from shards.randomness import hash64
from shards.stream import batches
from shards.stream.bad_samples import BadSample
from shards.stream.mixing import DomainMix
from shards.stream.mixup import draw_mix, partners
from shards.stream.one_image import open_image
from shards.stream.order import substitute_index

_MAX_SUBSTITUTES = 16


@dataclass(eq=False, kw_only=True)
class DomainStream(DomainMix):
    """An endless stream of global batches with the same number of images of every source domain."""

    transform: LoaderTransform
    """From pixels to float32 [3, H, W], or to a half-done image for `finish_images`; random
    numbers from torch's default generator."""
    decoder: Decoder = field(default_factory=Decoder)
    """What decodes the images."""
    mix: Mix = "none"
    """What `finish_images` mixes within a domain; as `data.mix`."""
    mix_alpha: float = 1.0
    """Of the shares in which two images are mixed; as `data.mix_alpha`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "raise data.cache_gib or lower data.order_window"
        if self.mode != "window":
            remedy = (
                f"data.order {self.mode} needs all shards of the source domains in the cache: "
                "raise data.cache_gib, or read a few at a time with data.order window and "
                "data.order_window 4"
            )
        if self.index.reader.remote:
            self.index.reader.remote.check_capacity(self.shard_bytes_at_a_time(), remedy)

    def loader(
        self,
        start_step: int,
        stop_step: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        accumulation: int = 1,
        pin_memory: bool = False,
        start_method: batches.StartMethod | None = None,
    ) -> batches.BatchLoader:
        """Load a rank's share of a range of steps: `accumulation` micro-batches per step, in order.

        The steps go from `start_step`, to resume the first one not yet done, to before `stop_step`.
        `workers`, `pin_memory` and `start_method` are those of `BatchLoader`.

        Raises `DataConfigError`: the steps, rank, world size or accumulation do not fit.
        """
        if not 0 <= start_step <= stop_step:
            raise DataConfigError(
                f"steps {start_step} to {stop_step}: need 0 <= start_step <= stop_step"
            )
        if stop_step * self.global_batch >= 2**63:  # positions, and numbers of batches, are int64
            raise DataConfigError(
                f"steps {start_step} to {stop_step}: must stay below {2**63 // self.global_batch}, "
                f"or images of {self.global_batch} a step cannot be counted in 64 bits"
            )
        self.check_world_size(world_size, accumulation)
        mine = batches.rank_range(self.global_batch, rank, world_size)
        return batches.BatchLoader(
            functools.partial(self._build, start_step, mine, accumulation),
            range((stop_step - start_step) * accumulation), reported=self.index.reported,
            workers=workers, pin_memory=pin_memory, start_method=start_method,
        )  # fmt: skip

    def _build(self, start_step: int, mine: range, accumulation: int, number: int) -> batches.Batch:
        """Build a micro-batch of the rank with the slots `mine`; 0 is the first of `start_step`."""
        step, piece = divmod(number, accumulation)
        step += start_step
        if self.index.reader.remote:  # fetches one window ahead
            self.index.reader.remote.expect(self.windows(step))
        size = len(mine) // accumulation
        part = mine[piece * size : (piece + 1) * size]
        if self.mix != "none":
            return self._build_mixed(step, part)
        slots = zip(*(column.tolist() for column in self.slots(step, part)), strict=True)
        return batches.stack((self.load(*slot) for slot in slots), len(part), part.start)

    def _build_mixed(self, step: int, part: range) -> batches.Batch:
        """Build a micro-batch with what is mixed into its images, whoever's slots that stands in.

        Bad images are counted where they are a slot's own.
        """
        own = np.arange(part.start, part.stop)
        others = partners(own, len(self.sources), self.batch_per_domain)
        wanted = np.concatenate([own, np.setdiff1d(others, own)])
        slots = zip(*(column.tolist() for column in self.slots(step, wanted)), strict=True)
        loaded = (
            image if number < len(part) else image._replace(substituted=False, bad=())
            for number, image in enumerate(self.load(*slot) for slot in slots)
        )
        batch = batches.stack(loaded, len(wanted), part.start)
        place = {slot: number for number, slot in enumerate(wanted.tolist())}
        where = np.array([place[slot] for slot in others.tolist()])
        mix = draw_mix(
            self.mix, self.mix_alpha, (self.seed, step), part, self.global_batch, batch.labels,
            where, (batch.images.shape[-2], batch.images.shape[-1]),
        )  # fmt: skip
        labels, domains = batch.labels[: len(part)], batch.domains[: len(part)]
        return batch._replace(labels=labels, domains=domains, mix=mix)

    def load(self, domain: int, position: int, place: int) -> batches.LoadedImage:
        """Read, decode and augment one slot's image, or its substitute if it cannot be used.

        `position` is that in the domain's stream, which keys augmentation and substitute; `place`
        that of the sample in the domain's file list.

        Raises:
            DamagedDataError: a shard is damaged as a whole, or no substitute can be used.
            OSError: the storage fails.
        """
        name = self.index.domains[domain]
        train = self._train_places[domain]
        bad: list[BadSample] = []
        for attempt in range(_MAX_SUBSTITUTES + 1):
            if attempt:
                chosen = substitute_index(self.seed, name, len(train), position, attempt)
                place = int(train[chosen])
            found = open_image(self.index, domain, place, self.decoder, attempt)
            if found.bad is not None:
                bad.append(found.bad)
            if found.pixels is not None:
                seed = hash64(self.seed, "aug", name, position)
                image, draw = batches.made(self.transform, found.pixels, seed)
                return batches.LoadedImage(image, found.label, domain, attempt > 0, bad, draw)
        check = verify_command() if self.index.remote else verify_command(self.index.root)
        raise DamagedDataError(
            f"domain {name!r}: {_MAX_SUBSTITUTES + 1} images in a row cannot be used, the last: "
            f"{bad[-1]}; check the set with {check}"
        )
