"""Image folders, listed exactly as torchvision's `ImageFolder` and DomainBed list them.

`ROOT/<domain>/<class>/**/<image>`: domains and classes sorted by code point, the files of a class
by a sorted walk.
"""

import os
import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from shards.datasets import DatasetSpec
from shards.errors import DataConfigError
from shards.write.folder_names import check_names
from shards.write.listing import Listing, is_image, list_source


def list_images(
    root: Path, spec: DatasetSpec, exclude: Collection[str] = (), only: Collection[str] = ()
) -> Listing:
    """List all images of a folder, as `list_source` does.

    `root` has one folder per domain, or is the folder above it if the dataset has a usual name for
    that one (`data/` for `data/PACS/photo/...`).
    """
    if not root.is_dir():
        raise DataConfigError(
            f"--root {root}: no such folder; give the folder that holds one folder per domain"
        )
    return list_source(ImageFolder(dataset_folder(root, spec)), spec, exclude, only)


class ImageFolder:
    """The source that is a folder."""

    stage: Callable[[BinaryIO], None] | None = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def domains(self) -> list[str]:
        """Name the folders."""
        found = _subfolders(self.root)
        if not found:
            raise DataConfigError(
                f"--root {self.root}: holds no folder; expected <domain>/<class>/<image> below it"
            )
        check_names(self.root, "domain", found)
        return found

    def classes(self, domain: str) -> list[str]:
        """Name the folders in a domain's."""
        names = _subfolders(self.root / domain)
        if not names:
            raise DataConfigError(_no_class_folder(self.root, domain))
        check_names(self.root, "class", names)
        return names

    def images(self, domain: str, class_name: str) -> Iterator[tuple[str, None]]:
        """Name the files of one class, relative to the domain folder, in ImageFolder's order."""
        return ((path, None) for path in _all_files(self.root / domain, class_name))

    def hint(self, *paths: str) -> str:
        """Phrase what to do about the first hidden folder, if there is one."""
        return _hidden(self.root, *paths)


def dataset_folder(root: Path, spec: DatasetSpec) -> Path:
    """Step into the dataset's own folder, so far as names tell, if a folder is the one above it."""
    if spec.folder is None or spec.domains is None:
        return root
    inside = root / spec.folder
    if inside.is_dir() and not any((root / name).is_dir() for name in spec.domains):
        return inside
    return root


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


def _no_class_folder(root: Path, domain: str) -> str:
    """Phrase that a domain holds no class folder, and what to do; no image is to be lost by it."""
    where = f"--root {root}: domain {domain!r} holds"
    if hidden := _hidden(root, domain):
        return f"{where} no class folder{hidden}"
    if not any(map(is_image, _all_files(root, domain))):
        return f"{where} no class folder; move the folder away if it is not a domain"
    if any(_subfolders(root / name) for name in _subfolders(root) if not name.startswith(".")):
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
            precious = any(map(is_image, _all_files(root / folder, name)))
            remedy = "move it away" + ("" if precious else " or delete it")
            return f"; {path!r} is a hidden folder: {remedy}"
    return ""


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
