"""Domains as WebDataset shards: written, indexed, split, and streamed in an exact order."""

from .config import DataConfig as DataConfig
from .embedded.digits import embedded_shards as embedded_shards
from .errors import (
    DamagedDataError as DamagedDataError,
    DataConfigError as DataConfigError,
    OutputError as OutputError,
)
from .opening import open_shards as open_shards
from .pixels.decoding import Decoder as Decoder, decode_image as decode_image
from .pixels.transforms import (
    eval_transform as eval_transform,
    loader_transform as loader_transform,
    train_transform as train_transform,
)
from .read.index import ShardIndex as ShardIndex
from .stream.batches import Batch as Batch, finish_images as finish_images
from .stream.evaluation import evaluation_loader as evaluation_loader
from .stream.split import split_indices as split_indices
from .stream.stream import DomainStream as DomainStream
