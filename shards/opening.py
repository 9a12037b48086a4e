"""The shard set that a configuration names, opened and compared with what it promises."""

from itertools import zip_longest

from shards.config import DataConfig
from shards.datasets import DatasetSpec, dataset_spec
from shards.embedded.digits import embedded_shards
from shards.errors import DataConfigError, make_command
from shards.read.index import ShardIndex
from shards.read.subset import read_subset


def open_shards(config: DataConfig) -> ShardIndex:
    """Opens the shard set of a configuration, building the embedded one on first use.

    Raises:
        DataConfigError: there is no such set, or it holds another dataset than configured, or its
            domains or classes are not those of the dataset.
        DamagedDataError: the set is incomplete or altered.
    """
    if config.root is not None:
        index = ShardIndex.load(config.root, config, config.dataset)
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


def check_dataset(index: ShardIndex, spec: DatasetSpec, setting: str = "data.dataset") -> None:
    """Raises `DataConfigError` unless a set holds a dataset with its domains and classes in order.

    The message names `setting`, which the user set, and the first difference.
    """
    here = f"{setting} = {spec.name!r}: the shard set in {index.root}"
    if index.dataset != spec.name:
        folder = "--out" if setting.startswith("--") else "data.root"
        raise DataConfigError(
            f"{here} holds {index.dataset!r}; set {setting} to that or {folder} to another folder"
        )
    in_order = tuple(sorted(set(index.classes)))
    if spec.domains is not None and index.domains != spec.domains:
        wrong = _first_difference("domain", index.domains, spec.domains)
    elif spec.num_classes not in (None, len(index.classes)):
        wrong = f"has {len(index.classes)} classes, the dataset has {spec.num_classes}"
    elif index.classes != in_order:
        wrong = _first_difference("class", index.classes, in_order)
    else:
        return
    raise DataConfigError(
        f"{here} {wrong}; make the set again with {make_command(spec.name, out='NEW_SET')}, or "
        "use --dataset folder for data of your own"
    )


def _first_difference(what: str, found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    pairs = enumerate(zip_longest(found, expected))
    place, names = next((place, names) for place, names in pairs if names[0] != names[1])
    has, wants = ("nothing" if name is None else repr(name) for name in names)
    return f"has {has} as {what} {place}, expected {wants}"
