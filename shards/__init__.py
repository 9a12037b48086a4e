"""Domains as WebDataset shards: written, indexed, split, and streamed in an exact order."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.config import DataConfig
    from shards.embedded.digits import embedded_shards
    from shards.errors import DamagedDataError, DataConfigError, OutputError
    from shards.opening import open_shards
    from shards.pixels.decoding import Decoder, decode_image
    from shards.pixels.transforms import eval_transform, loader_transform, train_transform
    from shards.read.index import ShardIndex
    from shards.stream.batches import Batch, finish_images
    from shards.stream.evaluation import evaluation_loader
    from shards.stream.split import split_indices
    from shards.stream.stream import DomainStream

_MODULES = {
    "Batch": "stream.batches",
    "DamagedDataError": "errors",
    "DataConfig": "config",
    "DataConfigError": "errors",
    "Decoder": "pixels.decoding",
    "DomainStream": "stream.stream",
    "OutputError": "errors",
    "ShardIndex": "read.index",
    "decode_image": "pixels.decoding",
    "embedded_shards": "embedded.digits",
    "eval_transform": "pixels.transforms",
    "evaluation_loader": "stream.evaluation",
    "finish_images": "stream.batches",
    "loader_transform": "pixels.transforms",
    "open_shards": "datasets",
    "split_indices": "stream.split",
    "train_transform": "pixels.transforms",
}

__all__ = [
    "Batch",
    "DamagedDataError",
    "DataConfig",
    "DataConfigError",
    "Decoder",
    "DomainStream",
    "OutputError",
    "ShardIndex",
    "decode_image",
    "embedded_shards",
    "eval_transform",
    "evaluation_loader",
    "finish_images",
    "loader_transform",
    "open_shards",
    "split_indices",
    "train_transform",
]


def __getattr__(name: str) -> object:
    """Import a public name at first use, so that `--help` never waits for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shards.{_MODULES[name]}"), name)
