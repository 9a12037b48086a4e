"""Images to leave out of a conversion or to look at twice, and the sizes that should remain."""

import logging
import shlex
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from shards.datasets import DatasetSpec
from shards.errors import DataConfigError
from shards.write.listing import Listing

log = logging.getLogger(__name__)

_APPLE_DOUBLE = b"\x00\x05\x16\x07"  # what begins the `._x.jpg` that macOS puts beside `x.jpg`


def report_exclusion(listing: Listing, exclude: Collection[str]) -> None:
    """Log how many images were left out, and the given entries that name none."""
    if not exclude:
        return
    log.info("--exclude_list: %d images left out", listing.excluded)
    if listing.unmatched:
        log.warning(
            "--exclude_list: %d of %d entries name no image (%s%s); right if these images "
            "were deleted before, otherwise check that the paths are relative to %s",
            len(listing.unmatched),
            len(set(exclude)),
            ", ".join(listing.unmatched[:5]),
            " ..." if len(listing.unmatched) > 5 else "",
            listing.root,
        )


def report_leftovers(listing: Listing) -> None:
    """Log how many of the images are files that macOS left beside them."""
    dotted = [
        listing.root / domain.name / path
        for domain in listing.domains
        for path in domain.paths
        if path.rpartition("/")[2].startswith("._")
    ]
    left = sum(_begins_with(path, _APPLE_DOUBLE) for path in dotted)
    if left:
        where = shlex.quote(str(listing.root))
        all_of_them = f"delete them with `find {where} -name '._*' -type f -delete`, or "
        log.warning(
            "%d of the images were written by macOS beside others and show nothing (._*): %slist "
            "them in --exclude_list",
            left, all_of_them if left == len(dotted) else "",
        )  # fmt: skip


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(magic)) == magic
    except OSError:
        return False  # whoever stores it says what is wrong


def check_sizes(listing: Listing, spec: DatasetSpec, exclude: Collection[str]) -> None:
    """Compare the numbers of images with those documented for the dataset.

    With DomainBed's own list of duplicates a difference raises `DataConfigError`, since the images'
    places and with them the 80/20 split depend on every file; otherwise it is only logged.
    """
    if spec.samples is None:
        return
    found = [len(domain.paths) for domain in listing.domains]
    if found == list(spec.samples):
        log.info("numbers of images: %d, as documented for %s", sum(found), spec.name)
        return
    differences = ", ".join(
        f"{domain.name} {have} instead of {want}"
        for domain, have, want in zip(listing.domains, found, spec.samples, strict=True)
        if have != want
    )
    if is_duplicates_list(spec, exclude):
        raise DataConfigError(
            f"--root {listing.root}: with its list of duplicates, {spec.name} has other numbers "
            f"of images: {differences}; download these domains again (not the 'cleaned' variant), "
            "or convert what is there with --dataset folder"
        )
    hint = "; give its list of duplicates as --exclude_list" if spec.duplicates else ""
    log.warning(
        "numbers of images differ from those documented for %s, so their order and the 80/20 split "
        "differ from DomainBed's: %s%s",
        spec.name,
        differences,
        hint,
    )


def is_duplicates_list(spec: DatasetSpec, exclude: Collection[str]) -> bool:
    """Tell whether a list has as many entries of every domain as DomainBed's of duplicates."""
    if spec.duplicates is None or spec.domains is None:
        return False
    counts = Counter(entry.partition("/")[0] for entry in set(exclude))
    return counts == Counter(dict(zip(spec.domains, spec.duplicates, strict=True)))
