"""The images of a dataset in order, whatever they come from: a folder, tables, archives.

Domains and classes are sorted by code point, the images of a class as torchvision's `ImageFolder`
sorts its files. An image's *place* in its domain's list, its label and the 80/20 split all rest on
this order.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from shards.datasets import DatasetSpec, nearest
from shards.errors import DataConfigError

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_OTHER_IMAGES = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"}

STAGED_NAME = ".writer.images"
"""Where images wait, one after the other, that cannot be read one by one from where they are."""


class Extent(NamedTuple):
    """Where an image's bytes are: `size` bytes of a file from `start`; None for all of it.

    A relative `file` is one in the folder of the shard set; `time` is the source's, in nanoseconds.
    """

    file: str
    start: int | None = None
    size: int = 0
    time: int = 0


@dataclass(frozen=True, kw_only=True)
class DomainListing:
    """The images of one domain, by place: names below the domain and labels."""

    name: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    extents: tuple[Extent, ...] | None = None
    """Where the bytes are; None: in files of these names in the domain's folder."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a dataset: its folder, domains in order, and class names in order."""

    root: Path
    domains: tuple[DomainListing, ...]
    classes: tuple[str, ...]
    excluded: int
    unmatched: tuple[str, ...]
    """Entries to leave out that name no image, sorted."""
    passed_over: Mapping[str, int]
    """Files in class folders that are no images by their names: ending -> how many."""
    stage: Callable[[BinaryIO], None] | None = None
    """Writes what `STAGED_NAME` holds; None: all images can be read where they are."""


class Source(Protocol):
    """Where images come from."""

    root: Path
    stage: Callable[[BinaryIO], None] | None
    """As of `Listing`."""

    def domains(self) -> list[str]:
        """Name the domains found, sorted."""

    def classes(self, domain: str) -> list[str]:
        """Name the classes of a domain, sorted."""

    def images(self, domain: str, class_name: str) -> Iterable[tuple[str, Extent | None]]:
        """Name the files of a class below the domain, in `ImageFolder`'s order."""

    def hint(self, *paths: str) -> str:
        """Phrase what to do about the first of some domains and classes that is none."""


def list_source(
    source: Source, spec: DatasetSpec, exclude: Collection[str] = (), only: Collection[str] = ()
) -> Listing:
    """List all images of a source.

    Args:
        source: where they come from.
        spec: the dataset; its domains, where it has a fixed list, must be those found.
        exclude: paths `<domain>/<class>/...` with forward slashes; left out before counting.
        only: the domains to list, in this order; all if there are none.

    Raises:
        DataConfigError: the source cannot be listed, domains or class lists differ from what they
            should be, or a domain or class is empty. Names the first difference.
    """
    names = _domain_names(source, spec, only)
    classes = _class_names(source, names)
    if spec.num_classes is not None and len(classes) != spec.num_classes:
        raise DataConfigError(
            f"--root {source.root}: {len(classes)} classes found, dataset {spec.name} has "
            f"{spec.num_classes}; found: {some(classes)}; complete the domains or move what is no "
            f"class away, or use --dataset folder"
            f"{source.hint(*(f'{names[0]}/{name}' for name in classes))}"
        )
    remaining = set(exclude)
    wanted = len(remaining)
    passed_over: Counter[str] = Counter()
    domains = tuple(_list_domain(source, name, classes, remaining, passed_over) for name in names)
    return Listing(
        root=source.root, domains=domains, classes=tuple(classes), stage=source.stage,
        excluded=wanted - len(remaining), unmatched=tuple(sorted(remaining)),
        passed_over=passed_over,
    )  # fmt: skip


def report_passed_over(listing: Listing) -> None:
    """Log how many files of class folders are no images by their names."""
    if listing.passed_over:
        counts = Counter(listing.passed_over).most_common()
        log.log(
            logging.WARNING if _OTHER_IMAGES & listing.passed_over.keys() else logging.INFO,
            "not images by their names, passed over: %s",
            some([f"{count} {ending or 'without ending'}" for ending, count in counts]),
        )


def some(names: Collection[str]) -> str:
    """Name up to twenty of them."""
    return ", ".join(list(names)[:20]) + (" ..." if len(names) > 20 else "")


def is_image(path: str) -> bool:
    """Whether a file is an image by its name."""
    return path.lower().endswith(EXTENSIONS)


def _domain_names(source: Source, spec: DatasetSpec, only: Collection[str]) -> list[str]:
    """Name the domains in order, after checking those found against the dataset."""
    found = source.domains()
    if only:
        for name in only:
            if name not in found:
                raise DataConfigError(
                    f"--extend {name!r}: not a domain of {source.root}; there are {some(found)}"
                    f"{nearest(name, found)}"
                )
        return list(dict.fromkeys(only))
    if spec.domains is None:
        return found
    missing = [f"{name!r} is missing" for name in spec.domains if name not in found]
    stray = [f"{name!r} does not belong there" for name in found if name not in spec.domains]
    if missing or stray:
        raise DataConfigError(
            f"--root {source.root}: domain {some(missing + stray)}; dataset {spec.name} has the "
            f"domains {', '.join(spec.domains)}{source.hint(*found)}"
        )
    return list(spec.domains)


def _class_names(source: Source, domains: list[str]) -> list[str]:
    """Name the classes; raises unless every domain has those of the first one."""
    found = {domain: source.classes(domain) for domain in domains}
    counts = Counter(name for names in found.values() for name in names)
    first, classes = domains[0], found[domains[0]]
    for domain, names in found.items():
        extra = [name for name in names if name not in classes]
        lacking = [name for name in classes if name not in names]
        if not (extra or lacking):
            continue
        parts = []
        for kind, these in (("has the extra class", extra), ("lacks the class", lacking)):
            if these:
                where = f" (in {counts[these[0]]} of {len(domains)} domains)"
                parts.append(f"{kind} {some(list(map(repr, these)))}{where}")
        hints = [f"{domain}/{name}" for name in extra] + [f"{first}/{name}" for name in lacking]
        raise DataConfigError(
            f"--root {source.root}: domain {domain!r} {' and '.join(parts)} compared with domain "
            f"{first!r}; all domains need the same classes{source.hint(domain, first, *hints)}"
        )
    return classes


def _list_domain(
    source: Source, domain: str, classes: list[str], exclude: set[str], passed_over: Counter[str]
) -> DomainListing:
    """List one domain's images by place.

    Entries of `exclude` that matched are taken out of it, and other files counted by their endings.
    """
    paths: list[str] = []
    labels: list[int] = []
    extents: list[Extent] = []
    for label, class_name in enumerate(classes):
        before = len(paths)
        for path, extent in source.images(domain, class_name):
            if not is_image(path):
                passed_over[os.path.splitext(path)[1].lower()] += 1
            elif f"{domain}/{path}" in exclude:
                exclude.remove(f"{domain}/{path}")
            else:
                paths.append(path)
                labels.append(label)
                if extent is not None:
                    extents.append(extent)
        if len(paths) == before:
            raise DataConfigError(
                f"--root {source.root}: class {class_name!r} of domain {domain!r} holds no image "
                f"to use; images end in {' '.join(EXTENSIONS)} (upper or lower case)"
                f"{source.hint(domain, f'{domain}/{class_name}')}"
            )
    return DomainListing(
        name=domain, paths=tuple(paths), labels=tuple(labels), extents=tuple(extents) or None
    )
