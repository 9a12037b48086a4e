"""The datasets of `datasets.yaml`: domains in order, classes, documented sizes."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shards.errors import DataConfigError


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


def _specs() -> dict[str, DatasetSpec]:
    text = Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8")
    found = {}
    for name, entry in yaml.safe_load(text).items():
        known: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        found[name] = DatasetSpec(name=name, **known)
    return found


DATASETS = _specs()


def nearest(name: str, legal: list[str]) -> str:
    """Phrase the legal name closest to a mistyped one; empty when nothing is close."""
    match = difflib.get_close_matches(name, legal, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def dataset_spec(name: str, setting: str = "data.dataset", also: Sequence[str] = ()) -> DatasetSpec:
    """Look up a dataset; `setting` is what the error says it was given as, and `also` legal there.

    Raises `DataConfigError`: there is no such dataset; lists the known ones and the nearest.
    """
    if name not in DATASETS:
        legal = [*DATASETS, *also]
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
