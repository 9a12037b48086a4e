"""A part of a shard set, chosen sample by sample when it is read; the shards stay as they are.

A list names samples to leave out, or the only ones to keep, by key (`sketch-0000012`) or by
original path (`sketch/cat/im_3.jpg`), one per line. The 80/20 split is made first, over all
samples, so that a list moves no sample from one side to the other. What is left out is neither
trained on nor counted in the usual accuracies; it is evaluated on its own, which gives both numbers
of DomainBed-OOP (the images that a backbone was, and was not, aligned with before).
"""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import DamagedDataError, DataConfigError, verify_command
from shards.read.index import ShardIndex, Subset
from shards.read.members import plain_members

log = logging.getLogger(__name__)

_DIGITS = 20  # and more, no place has; Python refuses to read numbers of thousands
_ODD_CONTENT = (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError)


def read_subset(
    index: ShardIndex, exclude_list: str | None, include_list: str | None
) -> Subset | None:
    """The part of a shard set that a list keeps, or does not leave out; None without a list.

    Raises:
        DataConfigError: a list cannot be read, or names no sample of the set.
        DamagedDataError: a shard cannot be searched for paths.
    """
    if exclude_list is None and include_list is None:
        return None
    name = "data.exclude_list" if exclude_list is not None else "data.include_list"
    file = Path(exclude_list or include_list or "")
    listed = [np.zeros(info.samples, dtype=np.bool_) for info in index.domain_infos]
    entries = set(read_list(f"{name} = {str(file)!r}", file))
    if unknown := _mark_keys(index, entries, listed):
        unknown = _mark_paths(index, unknown, listed, name)
    if not any(domain.any() for domain in listed):
        raise DataConfigError(
            f"{name} = {str(file)!r}: names no sample of {index.root}; give keys such as "
            f"{index.key(0, 0)!r}, or paths as in the folder that was converted"
        )
    if unknown:
        log.warning(
            "%s: %d of %d entries name no sample of the set (%s%s)",
            name, len(unknown), len(entries), ", ".join(f"{e!r:.80}" for e in sorted(unknown)[:3]),
            " ..." if len(unknown) > 3 else "",
        )  # fmt: skip
    kept = tuple(domain if exclude_list is None else ~domain for domain in listed)
    packed = b"".join(np.packbits(domain).tobytes() for domain in kept)
    return Subset(kept, hashlib.blake2b(packed, digest_size=8).hexdigest())


def _mark_keys(
    index: ShardIndex, entries: set[str], listed: list[npt.NDArray[np.bool_]]
) -> set[str]:
    """Marks the samples that are named by key; the rest are no keys."""
    prefixes = {info.key_prefix: domain for domain, info in enumerate(index.domain_infos)}
    rest = set()
    for entry in entries:
        prefix, _, number = entry.rpartition("-")
        domain = prefixes.get(prefix, -1)
        place = int(number) if number.isdecimal() and len(number) < _DIGITS else -1
        if domain >= 0 and 0 <= place < len(listed[domain]) and index.key(domain, place) == entry:
            listed[domain][place] = True
        else:
            rest.add(entry)
    return rest


def _mark_paths(
    index: ShardIndex, entries: set[str], listed: list[npt.NDArray[np.bool_]], name: str
) -> set[str]:
    """Marks the samples that are named by path, in one pass over the shards; the rest are none."""
    if index.remote:
        raise DataConfigError(
            f"{name}: names samples by path ({min(entries)!r:.80}), which only a local set can "
            f"look up; name them by key, as {index.key(0, 0)!r}"
        )
    log.info("%s: looking up %d paths in the shards", name, len(entries))
    rest = set(entries)
    numbers = {name: domain for domain, name in enumerate(index.domains)}
    for shard in index.shards:
        try:
            for member in plain_members(index.root / shard.file):
                if member.name.endswith(".json"):
                    about = json.loads(member.content)
                    if about["path"] in entries:
                        listed[numbers[about["domain"]]][int(about["index"])] = True
                        rest.discard(about["path"])
        except (DamagedDataError, *_ODD_CONTENT) as error:
            raise DamagedDataError(
                f"{index.root / shard.file}: cannot be searched for the paths of {name} ({error}); "
                f"check the set with {verify_command(index.root, deep=False)}"
            ) from error
    return rest


def read_list(setting: str, path: Path) -> list[str]:
    """The lines of a list of images or samples, without blank ones, outer spaces and `./`.

    The file holds paths with forward slashes, or keys; names of files need not be UTF-8. `setting`
    is what the user set, for the error message.

    Raises `DataConfigError`: the file cannot be read, or is no text.
    """
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise DataConfigError(f"{setting}: cannot be read ({error.strerror})") from error
    if b"\0" in data:
        raise DataConfigError(
            f"{setting}: cannot be read (not plain text); save it as UTF-8, one entry a line"
        )
    lines = data.decode("utf-8-sig", "surrogateescape").split("\n")
    return [line.strip().removeprefix("./") for line in lines if line.strip()]
