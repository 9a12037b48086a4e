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
    unmatched: tuple[str, ...]
    """Entries to leave out that name no image, sorted."""


def list_images(root: Path, spec: DatasetSpec, exclude: Collection[str] = ()) -> Listing:
    """List all images of a dataset.

    Args:
        root: Folder with one folder per domain, or the folder above it if the dataset has a usual
            name for that one (`data/` for `data/PACS/photo/...`).
        spec: The dataset; its domains, where it has a fixed list, must be the folders found.
        exclude: Paths `<domain>/<class>/...` with forward slashes; left out before ranks are given.

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
    root = dataset_folder(root, spec)
    names = _domain_names(root, spec)
    classes = _subfolders(root / names[0])
    for name in names:
        _check_classes(root, name, classes, names[0])
    if spec.num_classes is not None and len(classes) != spec.num_classes:
        raise DataConfigError(
            f"--root {root}: {len(classes)} classes found, dataset {spec.name} has "
            f"{spec.num_classes}; found: {_some(classes)}; complete the folders or remove what is "
            "no class, or use --dataset folder"
        )
    remaining = set(exclude)
    wanted = len(remaining)
    domains = tuple(_list_domain(root, name, classes, remaining) for name in names)
    return Listing(
        root=root,
        domains=domains,
        classes=tuple(classes),
        excluded=wanted - len(remaining),
        unmatched=tuple(sorted(remaining)),
    )


def dataset_folder(root: Path, spec: DatasetSpec) -> Path:
    """Step into the dataset's own folder if a folder is the one above it.

    Args:
        root: What the user gave.
        spec: The dataset.

    Returns:
        The folder that holds the domain folders, so far as names tell.
    """
    if spec.folder is None or spec.domains is None:
        return root
    inside = root / spec.folder
    if inside.is_dir() and not any((root / name).is_dir() for name in spec.domains):
        return inside
    return root


def _some(names: list[str]) -> str:
    """Name the first few of many."""
    return ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")


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
    missing = [f"{name!r} is missing" for name in spec.domains if name not in found]
    stray = [f"{name!r} does not belong there" for name in found if name not in spec.domains]
    if missing or stray:
        raise DataConfigError(
            f"--root {root}: folder {_some(missing + stray)}; dataset {spec.name} has the domains "
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


def _list_domain(root: Path, domain: str, classes: list[str], exclude: set[str]) -> DomainListing:
    """List one domain's images by rank; entries of `exclude` that matched are taken out of it."""
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        before = len(paths)
        for path in _class_files(root / domain, class_name):
            if f"{domain}/{path}" in exclude:
                exclude.remove(f"{domain}/{path}")
            else:
                paths.append(path)
                labels.append(label)
        if len(paths) == before:
            raise DataConfigError(
                f"--root {root}: class {class_name!r} of domain {domain!r} holds no image to use; "
                f"images end in {' '.join(EXTENSIONS)} (upper or lower case)"
            )
    return DomainListing(name=domain, paths=tuple(paths), labels=tuple(labels))


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
