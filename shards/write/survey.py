"""What a set holds, told before anybody trains on it: how even it is, and pictures seen twice."""

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.config import MAX_PIXELS
from shards.errors import DamagedDataError
from shards.randomness import Int64Array
from shards.read.index import ShardIndex
from shards.read.naming import printable
from shards.write.listing import some
from shards.write.progress import progress
from shards.write.worker_pool import run_tasks

log = logging.getLogger(__name__)

SEEN_DTYPE = np.dtype(
    [("format", "U5"), ("width", "<u4"), ("height", "<u4"), ("grey", "u1", (8, 9))]
)
"""A row per image; the format is empty where the image cannot be used."""

_FEW = 5  # images of a class, of which 20 % may be none
_SMALL_CLASS, _SMALL_DOMAIN = 10, 5  # times smaller than the median
_SHOWN_CLASSES, _SHOWN_DOMAINS = 20, 12
_PER_PROCESS = 2000  # images that are worth the start of a process


class LookAlikes(NamedTuple):
    """Images of one group, which look alike: domain, place, and whether it is held out, of each."""

    domains: Int64Array
    places: Int64Array
    held_out: npt.NDArray[np.bool_]

    @property
    def crossing(self) -> bool:
        """Whether some are trained on and others validated on."""
        return 0 < int(self.held_out.sum()) < len(self.held_out)

    @property
    def across(self) -> bool:
        """Whether they are in several domains."""
        return len(set(self.domains.tolist())) > 1


def class_counts(index: ShardIndex) -> Int64Array:
    """Count the images of every class, int64 [domains, classes]."""
    counts = [
        np.bincount(index.labels(domain), minlength=len(index.classes))
        for domain in range(len(index.domains))
    ]
    return np.stack(counts).astype(np.int64)


def counts_table(index: ShardIndex, counts: Int64Array) -> str:
    """The counts as a table, of the smallest classes and the first domains if there are many."""
    from tabulate import tabulate

    domains = [printable(name) for name in index.domains[:_SHOWN_DOMAINS]]
    if rest := len(index.domains) - len(domains):
        domains.append(f"{rest} others")
        counts = np.vstack([counts[:_SHOWN_DOMAINS], counts[_SHOWN_DOMAINS:].sum(0)])
    order = np.arange(len(index.classes))
    if len(order) > _SHOWN_CLASSES:
        order = np.argsort(counts.sum(0), kind="stable")[:_SHOWN_CLASSES]
    names = [printable(index.classes[label]) for label in order]
    rows = [[name, *counts[:, label], counts[:, label].sum()]
            for name, label in zip(names, order, strict=True)]  # fmt: skip
    if rest := len(index.classes) - len(order):
        others = counts.sum(1) - counts[:, order].sum(1)
        rows.append([f"{rest} larger classes", *others, others.sum()])
    rows.append(["all", *counts.sum(1), counts.sum()])
    return tabulate(
        [list(map(str, row)) for row in rows],
        ["class", *domains, "all"],
        tablefmt="plain", disable_numparse=True,
        colalign=["left", *["right"] * (len(domains) + 1)],
    )  # fmt: skip


def imbalances(index: ShardIndex, counts: Int64Array) -> list[str]:
    """What is far smaller than the rest, a line each."""
    found = []
    sizes = counts.sum(1)
    for domain, name in enumerate(map(printable, index.domains)):
        if sizes[domain] * _SMALL_DOMAIN < np.median(sizes):
            found.append(
                f"domain {name!r} has {sizes[domain]} images, less than 1/{_SMALL_DOMAIN} of the "
                f"median of the domains, {np.median(sizes):g}"
            )
        of_classes = counts[domain]
        least = max(_FEW, np.median(of_classes) / _SMALL_CLASS)
        if few := np.flatnonzero(of_classes < least).tolist():
            named = [f"{printable(index.classes[label])!r} {of_classes[label]}"
                     for label in sorted(few, key=lambda label: of_classes[label])]  # fmt: skip
            found.append(
                f"domain {name!r}: {len(few)} of {len(of_classes)} classes have less than "
                f"{least:g} images (fewer than {_FEW}, or 1/{_SMALL_CLASS} of the median): "
                f"{some(named)}"
            )
    return found


def survey(
    index: ShardIndex, jobs: int = 1, max_pixels: int = MAX_PIXELS
) -> list[npt.NDArray[np.void]]:
    """Look at every image of a set; gives for every domain an array of `SEEN_DTYPE` by place.

    Raises:
        OutputError: a process was killed, or the cache of a remote set cannot be written.
        StorageError: the storage fails.
    """
    tasks = []
    for domain in range(len(index.domains)):
        table = index.table(domain)
        order = np.lexsort((table["offset"], table["shard"]))
        ends = np.flatnonzero(np.diff(table["shard"][order])) + 1
        tasks += [(domain, places) for places in np.split(order, ends) if len(places)]
    total = sum(len(places) for _, places in tasks)
    seen = [np.zeros(info.samples, SEEN_DTYPE) for info in index.domain_infos]
    look = functools.partial(_look, index=index, max_pixels=max_pixels)
    with progress("looking at", total) as advance:
        jobs = min(jobs, len(tasks), 1 + total // _PER_PROCESS)
        for number, rows in run_tasks(look, tasks, jobs):
            domain, places = tasks[number]
            seen[domain][places] = rows
            advance(len(places))
    index.close()
    return seen


def _look(task: tuple[int, Int64Array], index: ShardIndex, max_pixels: int) -> npt.NDArray[np.void]:
    """Look at some images of one shard."""
    from shards.pixels.image_file import glance  # here: `--help` need not wait for Pillow
    from shards.pixels.likeness import GREY_SIZE

    domain, places = task
    rows = np.zeros(len(places), SEEN_DTYPE)
    for row, place in zip(rows, places.tolist(), strict=True):
        try:
            found = glance(index.read(domain, place).image, GREY_SIZE, max_pixels=max_pixels)
        except (DamagedDataError, ValueError):
            continue
        row["format"], (row["width"], row["height"]), row["grey"] = found
    return rows


def find_look_alikes(
    index: ShardIndex, seen: Sequence[npt.NDArray[np.void]], held_out: Sequence[Int64Array]
) -> list[LookAlikes]:
    """Group the images that look alike, within and across domains.

    Of every domain `seen` is from `survey`, and `held_out` has the places of its `out` split.
    """
    from shards.pixels.likeness import look_alikes

    usable = [np.flatnonzero(rows["format"] != "") for rows in seen]
    domains = np.repeat(np.arange(len(seen)), [len(places) for places in usable])
    places = np.concatenate(usable)
    grey = np.concatenate([rows["grey"][at] for rows, at in zip(seen, usable, strict=True)])
    out = np.concatenate([np.isin(at, held) for at, held in zip(usable, held_out, strict=True)])
    return [
        LookAlikes(domains[numbers], places[numbers], out[numbers]) for numbers in look_alikes(grey)
    ]


def told(index: ShardIndex, groups: Sequence[LookAlikes], trial_seed: int) -> str:
    """Say how many images look alike, and where the first are; empty if none do."""
    if not groups:
        return ""
    crossing, across = [g for g in groups if g.crossing], [g for g in groups if g.across]
    first = [*crossing, *across, *groups][0]
    pair = [int(first.held_out.argmin()), int(first.held_out.argmax())]
    if pair[0] == pair[1]:
        pair = [0, len(first.places) - 1]
    keys = [index.key(int(first.domains[at]), int(first.places[at])) for at in pair]
    return (
        f"{sum(len(g.places) for g in groups)} images look alike; groups of them: {len(groups)}, "
        f"on both sides of the split of trial seed {trial_seed}: {len(crossing)}, in several "
        f"domains: {len(across)} (such as {' and '.join(keys)})"
    )
