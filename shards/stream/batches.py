"""What the loaders share: the batch they yield, one image's way to a tensor, and clean errors."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy
import torch
from torch.utils.data import DataLoader, get_worker_info

from shards.errors import DamagedDataError, DataConfigError, OutputError
from shards.pixels.decoding import Pixels
from shards.pixels.transforms import LoaderTransform, finish_batch
from shards.stream.bad_samples import BadSample
from shards.stream.mixup import mixed
from shards.stream.worker_faults import share, told

log = logging.getLogger(__name__)

Made = TypeVar("Made")
StartMethod = Literal["fork", "spawn", "forkserver"]


class Batch(NamedTuple):
    """A (micro-)batch of one rank."""

    images: torch.Tensor
    """float32 [b, 3, H, W], normalised; or uint8, and `finish_images` does what is left."""
    labels: torch.Tensor
    """int64 [b], class numbers."""
    domains: torch.Tensor
    """int64 [b], domain numbers in the dataset's order."""
    first_slot: int
    """Slot of the first image in the global batch, or its number in the evaluated split."""
    substituted: int
    """How many images could not be used and were replaced."""
    bad: Sequence[BadSample] = ()
    """Every image that could not be used as it is, substitutes included."""
    colour: torch.Tensor | None = None
    """float32 [b, 9], draws of `shards.pixels.colour` still to be applied; None when done."""
    mix: torch.Tensor | None = None
    """float32 [b, 8] of `shards.stream.mixup`, for `finish_images`: there may be more than b
    `images` and `colour`s then, the last of which are only mixed into others."""

    def __reduce__(self) -> tuple[Any, ...]:
        """What a loader process sends: the images through shared memory, the rest as it is.

        There every tensor costs a connection of its own, half a millisecond for a few numbers.
        """
        rest = [value.numpy() if isinstance(value, torch.Tensor) else value for value in self[1:]]
        return _received, (self.images, *rest)


def _received(images: torch.Tensor, *rest: Any) -> Batch:
    tensors: Any = [torch.from_numpy(x) if isinstance(x, numpy.ndarray) else x for x in rest]
    return Batch(images, *tensors)


class LoadedImage(NamedTuple):
    """One image on its way into a batch."""

    image: torch.Tensor
    label: int
    domain: int
    substituted: bool
    bad: Sequence[BadSample] = ()
    colour: torch.Tensor | None = None


def stack(loaded: Iterable[LoadedImage], count: int, first_slot: int) -> Batch:
    """Make a batch of `count` images of equal size, at least one; the first has slot `first_slot`.

    Every image is copied to its place as soon as it is made, while it is in the processor's cache,
    and its own memory serves the next one.
    """
    images, items = torch.empty(0), []
    for number, item in enumerate(loaded):
        if number == 0:
            images = item.image.new_empty((count, *item.image.shape))
        images[number] = item.image
        items.append(item._replace(image=images[number]))
    colours = [item.colour for item in items if item.colour is not None and len(item.colour)]
    return Batch(
        images=images,
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        domains=torch.tensor([item.domain for item in items], dtype=torch.int64),
        first_slot=first_slot,
        substituted=sum(item.substituted for item in items),
        bad=[sample for item in items for sample in item.bad],
        colour=torch.stack(colours) if colours else None,
    )


def finish_images(
    batch: Batch, device: torch.device, data_config: Mapping[str, Any]
) -> torch.Tensor:
    """Bring a batch's images to a device, and do there what the loader left to it.

    Gives normalised float32 [b, 3, H, W]; `data_config` is that of `train_transform`.
    """
    images = batch.images.to(device, non_blocking=True)
    if not images.is_floating_point():
        draws = torch.empty(len(images), 0) if batch.colour is None else batch.colour
        images = finish_batch(images, draws, data_config)
    return images if batch.mix is None else mixed(images, batch.mix)


def seeded(transform: Callable[[Pixels], Made], pixels: Pixels, seed: int) -> Made:
    """Apply a transform with random numbers that depend on `seed`, in [0, 2**64), alone.

    It must draw from torch's default generator only.
    """
    torch.default_generator.manual_seed(seed)  # 100 times faster than torch.manual_seed
    return transform(pixels)


def made(
    transform: LoaderTransform, pixels: Pixels, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An image by a `seeded` transform, and the draws for what is left to `finish_images`."""
    result = seeded(transform, pixels, seed)
    return (result, None) if isinstance(result, torch.Tensor) else result


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore torch's random state afterwards, and compute in one thread meanwhile.

    The loader may run in the training process, whose random numbers belong to the model. One
    thread, since the sum over an image, and so its contrast jitter, can depend on their number.
    """
    state = torch.default_generator.get_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.default_generator.set_state(state)


@dataclass(eq=False)
class _Built:
    """The batches that `build` makes, by number."""

    build: Callable[[Any], Batch]

    def __getitem__(self, number: Any) -> Batch | Exception:
        """Build one batch, or give what went wrong, for `BatchLoader` to raise."""
        try:
            with undisturbed():
                batch = self.build(number)
            if get_worker_info() is not None:
                share(batch.images)
        except (DamagedDataError, DataConfigError, OutputError, OSError) as error:
            return error
        return batch


class BatchLoader(DataLoader[Batch]):
    """A torch loader of numbered batches, in order.

    It draws nothing from torch's random state, and an error in a loader process arrives as it was
    raised, not wrapped in a traceback.

    Args:
        build: makes the batch of a number, or of another name, on its own, in any process.
        numbers: of the batches in order; a list may be changed between two iterations.
        reported: keys of bad samples that the log has named; shared by the loaders of a set.
        workers: loader processes; 0 loads in this one.
        pin_memory: put batches into page-locked memory.
        start_method: how loader processes are started; None for the platform's own way.
        keep: let the loader processes stay for the next iteration.
    """

    def __init__(
        self,
        build: Callable[[Any], Batch],
        numbers: Sequence[Any],
        *,
        reported: set[str],
        workers: int,
        pin_memory: bool = False,
        start_method: StartMethod | None = None,
        keep: bool = False,
    ) -> None:
        if workers < 0:
            raise DataConfigError(f"data.workers = {workers}: must be 0 or more")
        super().__init__(
            _Built(build),  # type: ignore[arg-type]  # its errors are raised in __iter__
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
            multiprocessing_context=start_method if workers else None,
            persistent_workers=keep and workers > 0,
        )
        self._reported = reported

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches in order.

        Raises:
            DamagedDataError: stored data is not what the index promises.
            DataConfigError: a shard is larger than the cache of a remote set.
            OutputError: that cache cannot be written.
            OSError: the storage fails.
            LoaderKilledError: a loader process is gone.
        """
        for batch in told(super().__iter__, self.num_workers):
            if isinstance(batch, Exception):
                raise batch
            for sample in batch.bad:  # once, and here: a loader process may have no log of its own
                if sample.key not in self._reported:
                    self._reported.add(sample.key)
                    log.warning("%s", sample)
            yield batch


def rank_range(total: int, rank: int, world_size: int) -> range:
    """Give the contiguous part of 0..total-1 that belongs to a process; all parts are disjoint.

    The number of processes need not divide `total`.

    Raises `DataConfigError`: the rank is not in the world.
    """
    if not 0 <= rank < world_size:
        raise DataConfigError(f"rank = {rank}: must lie in [0, {world_size}), the world size")
    return range(rank * total // world_size, (rank + 1) * total // world_size)
