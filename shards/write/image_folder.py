"""Image folders, listed exactly as torchvision's `ImageFolder` and DomainBed list them.

`ROOT/<domain>/<class>/**/<image>`: domains and classes sorted by code point, the files of a class
by a sorted walk. An image's *place* in its domain's list, its label and the 80/20 split all rest on
this order.
"""

import logging
import os
import shlex
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shards.datasets import DatasetSpec
from shards.errors import DataConfigError
from shards.write.folder_names import check_names

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_OTHER_IMAGES = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"}


@dataclass(frozen=True, kw_only=True)
class DomainListing:
    """The images of one domain: file names below the domain folder and labels, by place."""

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
    passed_over: Mapping[str, int]
    """Files in class folders that are no images by their names: ending -> how many."""


def list_images(root: Path, spec: DatasetSpec, exclude: Collection[str] = ()) -> Listing:
    """List all images of a dataset.

    Args:
        root: folder with one folder per domain, or the folder above it if the dataset has a usual
            name for that one (`data/` for `data/PACS/photo/...`).
        spec: the dataset; its domains, where it has a fixed list, must be the folders found.
        exclude: paths `<domain>/<class>/...` with forward slashes; left out before counting.

    Raises:
        DataConfigError: a folder is missing or cannot be listed, domains or class lists differ from
            what they should be, or a domain or class is empty. Names the first difference.
    """
    if not root.is_dir():
        raise DataConfigError(
            f"--root {root}: no such folder; give the folder that holds one folder per domain"
        )
    root = dataset_folder(root, spec)
    names = _domain_names(root, spec)
    classes = _class_names(root, names)
    if spec.num_classes is not None and len(classes) != spec.num_classes:
        raise DataConfigError(
            f"--root {root}: {len(classes)} classes found, dataset {spec.name} has "
            f"{spec.num_classes}; found: {_some(classes)}; complete the folders or move what is no "
            f"class away, or use --dataset folder{_hidden(root / names[0], *classes)}"
        )
    remaining = set(exclude)
    wanted = len(remaining)
    passed_over: Counter[str] = Counter()
    domains = tuple(_list_domain(root, name, classes, remaining, passed_over) for name in names)
    return Listing(
        root=root, domains=domains, classes=tuple(classes), excluded=wanted - len(remaining),
        unmatched=tuple(sorted(remaining)), passed_over=passed_over,
    )  # fmt: skip


def report_passed_over(listing: Listing) -> None:
    """Log how many files of class folders are no images by their names."""
    if listing.passed_over:
        counts = Counter(listing.passed_over).most_common()
        log.log(
            logging.WARNING if _OTHER_IMAGES & listing.passed_over.keys() else logging.INFO,
            "not images by their names, passed over: %s",
            _some([f"{count} {ending or 'without ending'}" for ending, count in counts]),
        )


def dataset_folder(root: Path, spec: DatasetSpec) -> Path:
    """Step into the dataset's own folder, so far as names tell, if a folder is the one above it."""
    if spec.folder is None or spec.domains is None:
        return root
    inside = root / spec.folder
    if inside.is_dir() and not any((root / name).is_dir() for name in spec.domains):
        return inside
    return root


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")


def _subfolders(folder: Path) -> list[str]:
    """Name the folders in a folder, links followed, sorted by code point."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    """Raise that a folder cannot be listed; its images must not be missing without a word."""
    raise DataConfigError(
        f"--root: {error.filename}: cannot be listed ({error.strerror}); check its permissions and "
        "the disk, or move it away"
    ) from error


def _domain_names(root: Path, spec: DatasetSpec) -> list[str]:
    """Name the domains in order, after checking the folders found against the dataset."""
    found = _subfolders(root)
    if not found:
        raise DataConfigError(
            f"--root {root}: holds no folder; expected <domain>/<class>/<image> below it"
        )
    check_names(root, "domain", found)
    if spec.domains is None:
        return found
    missing = [f"{name!r} is missing" for name in spec.domains if name not in found]
    stray = [f"{name!r} does not belong there" for name in found if name not in spec.domains]
    if missing or stray:
        raise DataConfigError(
            f"--root {root}: folder {_some(missing + stray)}; dataset {spec.name} has the domains "
            f"{', '.join(spec.domains)}{_hidden(root, *found)}"
        )
    return list(spec.domains)


def _class_names(root: Path, domains: list[str]) -> list[str]:
    """Name the classes; raises unless every domain has the class folders of the first one."""
    found = {domain: _subfolders(root / domain) for domain in domains}
    for domain, names in found.items():
        if not names:
            raise DataConfigError(_no_class_folder(root, domain, domains))
        check_names(root, "class", names)
    counts = Counter(name for names in found.values() for name in names)
    first, classes = domains[0], found[domains[0]]
    for domain, names in found.items():
        extra = [name for name in names if name not in classes]
        lacking = [name for name in classes if name not in names]
        if not (extra or lacking):
            continue
        parts = []
        for kind, some in (("has the extra class", extra), ("lacks the class", lacking)):
            if some:
                where = f" (in {counts[some[0]]} of {len(domains)} domains)"
                parts.append(f"{kind} {_some(list(map(repr, some)))}{where}")
        hints = [f"{domain}/{name}" for name in extra] + [f"{first}/{name}" for name in lacking]
        raise DataConfigError(
            f"--root {root}: domain {domain!r} {' and '.join(parts)} compared with domain "
            f"{first!r}; all domains need the same class folders"
            f"{_hidden(root, domain, first, *hints)}"
        )
    return classes


def _no_class_folder(root: Path, domain: str, domains: list[str]) -> str:
    """Phrase that a domain holds no class folder, and what to do; no image is to be lost by it."""
    where = f"--root {root}: domain {domain!r} holds"
    if hidden := _hidden(root, domain):
        return f"{where} no class folder{hidden}"
    if not any(map(_is_image, _all_files(root, domain))):
        return f"{where} no class folder; move the folder away if it is not a domain"
    if any(_subfolders(root / name) for name in domains if not name.startswith(".")):
        return (
            f"{where} images but no class folder; sort them into class folders, or move the folder "
            "away if it is not a domain"
        )
    parent = os.path.dirname(os.path.abspath(root))
    return (
        f"{where} images but no class folder; --root seems to be one level too deep: expected "
        f"<domain>/<class>/<image> below it; give its parent folder, --root {shlex.quote(parent)}"
    )


def _hidden(root: Path, *paths: str) -> str:
    """Phrase what to do about the first hidden folder of some below a root, if there is one."""
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name.startswith("."):
            precious = any(map(_is_image, _all_files(root / folder, name)))
            remedy = "move it away" + ("" if precious else " or delete it")
            return f"; {path!r} is a hidden folder: {remedy}"
    return ""


def _list_domain(
    root: Path, domain: str, classes: list[str], exclude: set[str], passed_over: Counter[str]
) -> DomainListing:
    """List one domain's images by place.

    Entries of `exclude` that matched are taken out of it, and other files counted by their endings.
    """
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        before = len(paths)
        for path in _all_files(root / domain, class_name):
            if not _is_image(path):
                passed_over[os.path.splitext(path)[1].lower()] += 1
            elif f"{domain}/{path}" in exclude:
                exclude.remove(f"{domain}/{path}")
            else:
                paths.append(path)
                labels.append(label)
        if len(paths) == before:
            raise DataConfigError(
                f"--root {root}: class {class_name!r} of domain {domain!r} holds no image to use; "
                f"images end in {' '.join(EXTENSIONS)} (upper or lower case)"
                f"{_hidden(root, domain, f'{domain}/{class_name}')}"
            )
    return DomainListing(name=domain, paths=tuple(paths), labels=tuple(labels))


def _is_image(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def _all_files(domain_folder: Path, class_name: str) -> list[str]:
    """List the files of one class, relative to the domain folder, in ImageFolder's order."""
    top = os.fspath(domain_folder)
    files = []
    walk = os.walk(os.path.join(top, class_name), onerror=_refuse, followlinks=True)
    for folder, _, names in sorted(walk):
        for name in sorted(names):
            path = os.path.relpath(os.path.join(folder, name), top)
            files.append(path.replace(os.sep, "/"))
    return files
