"""Image folders, listed exactly as torchvision's `ImageFolder` and DomainBed list them.

`ROOT/<domain>/<class>/**/<image>`: domains and classes sorted by code point, the files of a class
by a sorted walk. Ranks, labels and the 80/20 split all rest on this order.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from shards.datasets import DatasetSpec
from shards.errors import DataConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class DomainListing:
    """The images of one domain: file names below the domain folder and labels, by rank."""

    name: str
    paths: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a dataset: its folder, domains in order, and class names in order."""

    root: Path
    domains: tuple[DomainListing, ...]
    classes: tuple[str, ...]
    excluded: int


def list_images(root: Path, spec: DatasetSpec, exclude: Collection[str] = ()) -> Listing:
    """List all images of a dataset.

    Args:
        root: Folder with one folder per domain.
        spec: The dataset; its domains, where it has a fixed list, must be the folders found.
        exclude: Paths relative to `root`, with forward slashes; left out before ranks are given.

    Returns:
        The listing.

    Raises:
        DataConfigError: If the folder is missing, domains or class lists differ from what they
            should be, or a domain or class is empty. The message names the first difference.
    """
    if not root.is_dir():
        raise DataConfigError(
            f"--root {root}: no such folder; give the folder that holds one folder per domain"
        )
    names = _domain_names(root, spec)
    classes = _subfolders(root / names[0])
    unwanted = frozenset(exclude)
    domains: list[DomainListing] = []
    excluded = 0
    for name in names:
        _check_classes(root, name, classes, names[0])
        domain, left_out = _list_domain(root, name, classes, unwanted)
        domains.append(domain)
        excluded += left_out
    if spec.num_classes is not None and len(classes) != spec.num_classes:
        raise DataConfigError(
            f"--root {root}: {len(classes)} classes found, dataset {spec.name} has "
            f"{spec.num_classes}; give another folder, or use --dataset folder"
        )
    return Listing(root=root, domains=tuple(domains), classes=tuple(classes), excluded=excluded)


def _subfolders(folder: Path) -> list[str]:
    """Name the folders in a folder, links followed, sorted by code point."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise DataConfigError(f"{folder}: cannot be listed ({error.strerror})") from error


def _domain_names(root: Path, spec: DatasetSpec) -> list[str]:
    """Name the domains in order, after checking the folders found against the dataset."""
    found = _subfolders(root)
    if not found:
        raise DataConfigError(
            f"--root {root}: holds no folder; expected <domain>/<class>/<image> below it"
        )
    if spec.domains is None:
        return found
    for name in sorted(set(spec.domains) ^ set(found)):
        kind = "is missing" if name in spec.domains else "does not belong there"
        raise DataConfigError(
            f"--root {root}: folder {name!r} {kind}; dataset {spec.name} has the domains "
            f"{', '.join(spec.domains)}"
        )
    return list(spec.domains)


def _check_classes(root: Path, domain: str, classes: list[str], first: str) -> None:
    """Raise unless a domain has exactly the class folders of the first domain."""
    found = _subfolders(root / domain)
    if not found:
        raise DataConfigError(
            f"--root {root}: domain {domain!r} holds no class folder; "
            "remove the folder if it is not a domain"
        )
    for name in sorted(set(classes) ^ set(found)):
        kind = "lacks the class" if name in classes else "has the extra class"
        raise DataConfigError(
            f"--root {root}: domain {domain!r} {kind} {name!r} compared with domain {first!r}; "
            "all domains need the same class folders"
        )


def _list_domain(
    root: Path, domain: str, classes: list[str], unwanted: frozenset[str]
) -> tuple[DomainListing, int]:
    """List one domain's images by rank; also count those left out."""
    paths: list[str] = []
    labels: list[int] = []
    excluded = 0
    for label, class_name in enumerate(classes):
        before = len(paths)
        for path in _class_files(root / domain, class_name):
            if f"{domain}/{path}" in unwanted:
                excluded += 1
            else:
                paths.append(path)
                labels.append(label)
        if len(paths) == before:
            raise DataConfigError(
                f"--root {root}: class {class_name!r} of domain {domain!r} holds no image to use; "
                f"images end in {' '.join(EXTENSIONS)} (upper or lower case)"
            )
    listing = DomainListing(name=domain, paths=tuple(paths), labels=tuple(labels))
    return listing, excluded


def _class_files(domain_folder: Path, class_name: str) -> list[str]:
    """List the images of one class, relative to the domain folder, in ImageFolder's order."""
    top = os.fspath(domain_folder)
    files = []
    for folder, _, names in sorted(os.walk(os.path.join(top, class_name), followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS):
                path = os.path.relpath(os.path.join(folder, name), top)
                files.append(path.replace(os.sep, "/"))
    return files
