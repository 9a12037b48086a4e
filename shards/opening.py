"""The shard set that a configuration names, opened and compared with what it promises."""

from shards.config import DataConfig
from shards.datasets import DatasetSpec, dataset_spec
from shards.embedded.digits import embedded_shards
from shards.errors import DataConfigError, make_command
from shards.read.index import ShardIndex
from shards.read.remote import StorageOptions
from shards.read.subset import read_subset


def check_dataset(index: ShardIndex, spec: DatasetSpec, setting: str = "data.dataset") -> None:
    """Raise unless a shard set holds a dataset with the domains and classes it must have.

    Args:
        index: The opened set.
        spec: The dataset it should hold.
        setting: What the user set, for the error message.

    Raises:
        DataConfigError: If it holds another dataset, or domains or classes differ in name, number
            or order; names the first difference.
    """
    here = f"{setting} = {spec.name!r}: the shard set in {index.root}"
    if index.dataset != spec.name:
        folder = "--out" if setting.startswith("--") else "data.root"
        raise DataConfigError(
            f"{here} holds {index.dataset!r}; set {setting} to that or {folder} to another folder"
        )
    wrong = None
    if spec.domains is not None and index.domains != spec.domains:
        wrong = _first_difference("domain", index.domains, spec.domains)
    elif spec.num_classes not in (None, len(index.classes)):
        wrong = f"has {len(index.classes)} classes, the dataset has {spec.num_classes}"
    elif index.classes != tuple(sorted(set(index.classes))):
        wrong = _first_difference("class", index.classes, tuple(sorted(set(index.classes))))
    if wrong is not None:
        raise DataConfigError(
            f"{here} {wrong}; make the set again with {make_command(spec.name, out='NEW_SET')}, or "
            "use --dataset folder for data of your own"
        )


def _first_difference(what: str, found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    """Phrase the first place where two lists of names differ."""
    place = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(len(found), len(expected)),
    )
    has, wants = (
        repr(names[place]) if place < len(names) else "nothing" for names in (found, expected)
    )
    return f"has {has} as {what} {place}, expected {wants}"


def open_shards(config: DataConfig) -> ShardIndex:
    """Open the shard set a configuration asks for, building the embedded one on first use.

    Args:
        config: The data section of a run.

    Returns:
        The opened index.

    Raises:
        DataConfigError: If there is no such set, or it holds another dataset than configured, or
            its domains or classes are not those of the dataset.
        DamagedDataError: If the set is incomplete or altered.
    """
    if config.root is not None:
        index = ShardIndex.load(config.root, StorageOptions.of(config), config.dataset)
    elif config.dataset == "digits":
        index = ShardIndex.load(embedded_shards())
    else:
        raise DataConfigError(
            f"data.root is not set: dataset {config.dataset!r} is not embedded; "
            "give the folder of its shard set"
        )
    check_dataset(index, dataset_spec(config.dataset))
    index.subset = read_subset(index, config.exclude_list, config.include_list)
    return index
