"""The datasets this package knows: their domains in order, their classes, their augmentation."""

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import DataConfigError

if TYPE_CHECKING:
    from shards.config import DataConfig
    from shards.index import ShardIndex


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is known of a dataset before any of its files is read."""

    name: str
    """Name on the command line and in the shard set."""
    domains: tuple[str, ...] | None
    """Domain folders in the dataset's own order; None: all folders found, sorted."""
    num_classes: int | None
    """Number of classes; None: as many as found."""
    horizontal_flip: bool
    """Whether a mirrored image still shows its class."""


_SPECS = (
    DatasetSpec(
        name="digits",
        domains=("plain", "inverted", "outline", "coarse", "textured", "rotated"),
        num_classes=10,
        horizontal_flip=False,
    ),
    DatasetSpec(name="folder", domains=None, num_classes=None, horizontal_flip=True),
)
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


def nearest(name: str, legal: list[str]) -> str:
    """Phrase the legal name closest to a mistyped one.

    Args:
        name: What was given.
        legal: What could have been given.

    Returns:
        `" (did you mean 'X'?)"`, or an empty string when nothing is close.
    """
    match = difflib.get_close_matches(name, legal, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def dataset_spec(name: str, setting: str = "data.dataset") -> DatasetSpec:
    """Look up a dataset.

    Args:
        name: Name of the dataset.
        setting: What the user set, for the error message.

    Returns:
        Its entry in the registry.

    Raises:
        DataConfigError: If there is no such dataset; lists the known ones and the nearest.
    """
    if name not in DATASETS:
        legal = list(DATASETS)
        raise DataConfigError(
            f"{setting} = {name!r}: not a known dataset; "
            f"legal: {', '.join(legal)}{nearest(name, legal)}"
        )
    return DATASETS[name]


def open_shards(config: "DataConfig") -> "ShardIndex":
    """Open the shard set a configuration asks for, building the embedded one on first use.

    Args:
        config: The data section of a run.

    Returns:
        The opened index.

    Raises:
        DataConfigError: If there is no such set, or it holds another dataset than configured.
        DamagedDataError: If the set is incomplete or altered.
    """
    from shards.index import ShardIndex  # here, so that looking up a name stays light

    if config.root is not None:
        index = ShardIndex.load(config.root)
    elif config.dataset == "digits":
        from shards.digits import embedded_shards

        index = ShardIndex.load(embedded_shards())
    else:
        raise DataConfigError(
            f"data.root is not set: dataset {config.dataset!r} is not embedded; "
            "give the folder of its shard set"
        )
    if index.dataset != config.dataset:
        raise DataConfigError(
            f"data.dataset = {config.dataset!r}: the shard set in {index.root} holds "
            f"{index.dataset!r}; set data.dataset to that or data.root to another folder"
        )
    return index
