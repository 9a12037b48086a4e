"""The datasets this package knows: domains in order, classes, documented sizes and schedules."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import DataConfigError


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
    domains: tuple[str, ...] | None = None
    """Domain folders in the dataset's own order; None: all folders found, sorted."""
    num_classes: int | None = None
    """Number of classes; None: as many as found."""
    horizontal_flip: bool = True
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


_USUAL: dict[str, Any] = {
    "domainbed": Schedule(steps=5001, eval_every=300),
    "paper": Schedule(steps=5001, eval_every=200),
}
_SPECS = (
    DatasetSpec(
        name="digits", num_classes=10, horizontal_flip=False,
        domains=("plain", "inverted", "outline", "coarse", "textured", "rotated"),
    ),
    DatasetSpec(name="folder"),
    DatasetSpec(
        name="pacs", folder="PACS", num_classes=7, **_USUAL,
        domains=("art_painting", "cartoon", "photo", "sketch"),
        samples=(2048, 2344, 1670, 3929),
    ),
    DatasetSpec(
        name="vlcs", folder="VLCS", num_classes=5, **_USUAL,
        domains=("Caltech101", "LabelMe", "SUN09", "VOC2007"),
        samples=(1415, 2656, 3282, 3376),
    ),
    DatasetSpec(
        name="officehome", folder="office_home", num_classes=65, **_USUAL,
        domains=("Art", "Clipart", "Product", "Real World"),
        samples=(2427, 4365, 4439, 4357),
    ),
    DatasetSpec(  # no documented sizes: the usual downloaders start from different annotations
        name="terraincognita", folder="terra_incognita", num_classes=10, **_USUAL,
        domains=("location_100", "location_38", "location_43", "location_46"),
    ),
    DatasetSpec(
        name="domainnet", folder="domain_net", num_classes=345,
        domains=("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        samples=(48129, 51605, 72266, 172500, 172947, 69128),
        duplicates=(704, 1596, 3493, 0, 2380, 1258),
        domainbed=Schedule(steps=5001, eval_every=1000),
        paper=Schedule(steps=15001, eval_every=1000),
    ),
)  # fmt: skip
DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


def nearest(name: str, legal: list[str]) -> str:
    """Phrase the legal name closest to a mistyped one; empty when nothing is close."""
    match = difflib.get_close_matches(name, legal, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def dataset_spec(name: str, setting: str = "data.dataset") -> DatasetSpec:
    """Look up a dataset; `setting` is what the error says it was given as.

    Raises `DataConfigError`: there is no such dataset; lists the known ones and the nearest.
    """
    if name not in DATASETS:
        legal = list(DATASETS)
        raise DataConfigError(
            f"{setting} = {name!r}: not a known dataset; "
            f"legal: {', '.join(legal)}{nearest(name, legal)}"
        )
    return DATASETS[name]


def held_out_names(text: str, domains: Sequence[str]) -> tuple[str, ...]:
    """Read `data.held_out`: the target domain, or several joined by `+` of which it is the first.

    A domain's own name may contain a `+`. Whether there are such domains is not checked.

    Raises `DataConfigError`: a name is given twice.
    """
    names = (text,) if text in domains else tuple(text.split("+"))
    if len(set(names)) < len(names):
        raise DataConfigError(f"data.held_out = {text!r}: names a domain twice; give each once")
    return names
