"""Domains as WebDataset shards: written, indexed, split, and streamed in an exact order."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.config import DataConfig
    from shards.datasets import open_shards
    from shards.decoding import Decoder, decode_image
    from shards.digits import embedded_shards
    from shards.errors import DamagedDataError, DataConfigError, OutputError
    from shards.evaluation import evaluation_loader
    from shards.index import ShardIndex
    from shards.loading import Batch, finish_images
    from shards.split import split_indices
    from shards.stream import DomainStream
    from shards.transforms import eval_transform, loader_transform, train_transform

_MODULES = {
    "Batch": "loading",
    "DamagedDataError": "errors",
    "DataConfig": "config",
    "DataConfigError": "errors",
    "Decoder": "decoding",
    "DomainStream": "stream",
    "OutputError": "errors",
    "ShardIndex": "index",
    "decode_image": "decoding",
    "embedded_shards": "digits",
    "eval_transform": "transforms",
    "evaluation_loader": "evaluation",
    "finish_images": "loading",
    "loader_transform": "transforms",
    "open_shards": "datasets",
    "split_indices": "split",
    "train_transform": "transforms",
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
