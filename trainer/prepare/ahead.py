"""The next batch: fetched and brought to the device while the one before is computed."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shards import Batch, finish_images
from shards.stream.mixup import labels_and_shares


class Ready(NamedTuple):
    """A batch of b images whose tensors are on the device, or under way to it."""

    batch: Batch
    images: Tensor
    """[b, 3, H, W], normalised, in the model's dtype."""
    labels: Tensor
    """int64 [b]."""
    mixed_in: tuple[Tensor, ...] = ()
    """If images were mixed: labels [b] of those mixed in, and shares [b] of the own."""


class Ahead:
    """Holds one batch at a time; on a GPU a stream of its own prepares it.

    What goes wrong in fetching it is raised when it is taken: what comes before is whole by then.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, data_config: Mapping[str, Any]
    ) -> None:
        self.device, self.dtype, self.data_config = device, dtype, data_config
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._held: Ready | Exception | None = None

    def fetch(self, batches: Iterator[Batch]) -> None:
        """Takes a batch out of `batches` and begins to prepare it, if none is held."""
        if self._held is None:
            try:
                self._held = self._prepared(next(batches))
            except Exception as error:
                self._held = error

    def take(self, batches: Iterator[Batch]) -> Ready:
        """The batch that is held, else the next one; what is computed from now on may use it."""
        self.fetch(batches)
        held, self._held = self._held, None
        if isinstance(held, Exception):
            raise held
        assert held is not None
        if self._stream is not None:
            using = torch.cuda.current_stream(self.device)
            using.wait_stream(self._stream)
            for tensor in (held.images, held.labels, *held.mixed_in):
                tensor.record_stream(using)  # not freed before it has been used
        return held

    def _prepared(self, batch: Batch) -> Ready:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            images = finish_images(batch, self.device, self.data_config).to(self.dtype)
            labels = batch.labels.to(self.device, non_blocking=True)
            if batch.mix is None:
                return Ready(batch, images, labels)
            mix = batch.mix.to(self.device, non_blocking=True)
            return Ready(batch, images, labels, labels_and_shares(mix))
