"""The datasets this package knows: domains in order, classes, documented sizes and schedules."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import DataConfigError, make_command

if TYPE_CHECKING:
    from shards.config import DataConfig
    from shards.read.index import ShardIndex


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a dataset is trained on and how often evaluated, both in steps."""

    steps: int
    eval_every: int


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
    folder: str | None = None
    """Name DomainBed gives the folder that holds the domains; None: any."""
    samples: tuple[int, ...] | None = None
    """Documented number of images of each domain, duplicates left out; None: not documented."""
    duplicates: tuple[int, ...] | None = None
    """Entries of DomainBed's list of duplicates by domain; None: there is no such list."""
    domainbed: Schedule | None = None
    """Schedule of DomainBed's code; None: it does not have this dataset."""
    paper: Schedule | None = None
    """Schedule of the Mixture-of-Adapters paper's code; None: it does not have this dataset."""


_SPECS = (
    DatasetSpec(
        name="digits",
        domains=("plain", "inverted", "outline", "coarse", "textured", "rotated"),
        num_classes=10,
        horizontal_flip=False,
    ),
    DatasetSpec(name="folder", domains=None, num_classes=None, horizontal_flip=True),
    DatasetSpec(
        name="pacs",
        folder="PACS",
        domains=("art_painting", "cartoon", "photo", "sketch"),
        samples=(2048, 2344, 1670, 3929),
        num_classes=7,
        horizontal_flip=True,
        domainbed=Schedule(steps=5001, eval_every=300),
        paper=Schedule(steps=5001, eval_every=200),
    ),
    DatasetSpec(
        name="vlcs",
        folder="VLCS",
        domains=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
        samples=(1415, 2656, 3282, 3376),
        num_classes=5,
        horizontal_flip=True,
        domainbed=Schedule(steps=5001, eval_every=300),
        paper=Schedule(steps=5001, eval_every=200),
    ),
    DatasetSpec(
        name="officehome",
        folder="office_home",
        domains=("Art", "Clipart", "Product", "Real World"),
        samples=(2427, 4365, 4439, 4357),
        num_classes=65,
        horizontal_flip=True,
        domainbed=Schedule(steps=5001, eval_every=300),
        paper=Schedule(steps=5001, eval_every=200),
    ),
    DatasetSpec(  # no documented sizes: the usual downloaders start from different annotations
        name="terraincognita",
        folder="terra_incognita",
        domains=("location_100", "location_38", "location_43", "location_46"),
        num_classes=10,
        horizontal_flip=True,
        domainbed=Schedule(steps=5001, eval_every=300),
        paper=Schedule(steps=5001, eval_every=200),
    ),
    DatasetSpec(
        name="domainnet",
        folder="domain_net",
        domains=("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        samples=(48129, 51605, 72266, 172500, 172947, 69128),
        duplicates=(704, 1596, 3493, 0, 2380, 1258),
        num_classes=345,
        horizontal_flip=True,
        domainbed=Schedule(steps=5001, eval_every=1000),
        paper=Schedule(steps=15001, eval_every=1000),
    ),
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


def check_dataset(index: "ShardIndex", spec: DatasetSpec, setting: str = "data.dataset") -> None:
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


def open_shards(config: "DataConfig") -> "ShardIndex":
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
    from shards.read.index import ShardIndex  # here, so that looking up a name stays light
    from shards.read.subset import read_subset

    if config.root is not None:
        from shards.read.remote import StorageOptions

        index = ShardIndex.load(config.root, StorageOptions.of(config), config.dataset)
    elif config.dataset == "digits":
        from shards.embedded.digits import embedded_shards

        index = ShardIndex.load(embedded_shards())
    else:
        raise DataConfigError(
            f"data.root is not set: dataset {config.dataset!r} is not embedded; "
            "give the folder of its shard set"
        )
    check_dataset(index, dataset_spec(config.dataset))
    index.subset = read_subset(index, config.exclude_list, config.include_list)
    return index


def held_out_names(text: str, domains: Sequence[str]) -> tuple[str, ...]:
    """Read `data.held_out`: one domain, or several joined by `+`.

    Args:
        text: Such as `sketch` or `sketch+photo`; a domain's own name may contain a `+`.
        domains: Domain names.

    Returns:
        The names, the first of which is the target; whether there are such domains is not checked.

    Raises:
        DataConfigError: If a name is given twice.
    """
    names = (text,) if text in domains else tuple(text.split("+"))
    if len(set(names)) < len(names):
        raise DataConfigError(f"data.held_out = {text!r}: names a domain twice; give each once")
    return names
