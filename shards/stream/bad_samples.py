"""Images that could not be used as they are: what is noted of each, and when there are too many.

A bad image is never dropped. In training another image of its domain, chosen by the position alone,
stands in for it; in evaluation a grey one does. What the model says to that counts like any other,
so it is right by chance, and how many there were is told beside the accuracy.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from shards.errors import DamagedDataError, verify_command

REASONS = ("crc32", "undecodable", "truncated")
"""Columns of a count: altered bytes, no decoder reads it, incomplete but used as far as it goes."""

TOLERATED_PER_EPOCH = 10
"""Replaced images of a domain that never end a run, lest one bad file of a small set should."""

_REMEDY = f"check the set with {verify_command()}, or raise data.max_bad_fraction"
_REPLACED = slice(0, 2)  # of REASONS: an image kept as far as it goes was not replaced


class BadSample(NamedTuple):
    """One image that could not be used as it is."""

    domain: int
    key: str
    shard: str
    """File name of the shard."""
    offset: int
    """First byte of the image in the shard."""
    reason: str
    """One of `REASONS`."""
    detail: str
    """What the reader said."""
    attempt: int = 0
    """0 for the image that stands in the slot, 1 for its first substitute, and so on."""

    def __str__(self) -> str:
        """Describe it in one line, for the log."""
        what = "used as far as it goes" if self.reason == "truncated" else "replaced"
        return f"sample {self.key} ({self.shard}, offset {self.offset}): {self.detail}; {what}"


def count_bad(samples: Iterable[BadSample], num_domains: int) -> torch.Tensor:
    """Count the slots that were hit, int64 [num_domains, len(REASONS)]; add over batches and ranks.

    Substitutes that were bad too are not counted again.
    """
    counts = torch.zeros(num_domains, len(REASONS), dtype=torch.int64)
    for sample in samples:
        if sample.attempt == 0:
            counts[sample.domain, REASONS.index(sample.reason)] += 1
    return counts


def named_counts(counts: torch.Tensor, domains: Sequence[str]) -> dict[str, int]:
    """Name the counts (as from `count_bad`) that are not zero: `<domain>/<reason>` to count."""
    return {
        f"{domain}/{reason}": count
        for domain, row in zip(domains, counts.tolist(), strict=True)
        for reason, count in zip(REASONS, row, strict=True)
        if count
    }


def counts_from_names(named: Mapping[str, int], domains: Sequence[str]) -> torch.Tensor:
    """Undo `named_counts`; names of other domains are ignored."""
    rows = [[int(named.get(f"{name}/{reason}", 0)) for reason in REASONS] for name in domains]
    return torch.tensor(rows, dtype=torch.int64)


def check_unusable(where: str, unusable: int, total: int, limit: float) -> None:
    """Raise `DamagedDataError` if grey images stand for too many images of an evaluated split.

    `limit` is the largest tolerated share; `TOLERATED_PER_EPOCH` are tolerated unless it is 0.
    """
    if unusable > max(limit * total, TOLERATED_PER_EPOCH if limit else 0):
        raise DamagedDataError(
            f"{where}: {unusable} of {total} images cannot be used, more than "
            f"data.max_bad_fraction = {limit} allows; {_REMEDY}"
        )


def check_bad_fraction(
    counts: torch.Tensor,
    seen: Mapping[int, int],
    sizes: Mapping[int, int],
    domains: Sequence[str],
    limit: float,
) -> None:
    """Raise `DamagedDataError` if too many images of a domain had to be replaced.

    A domain may have `limit` of its images replaced, and in any case `TOLERATED_PER_EPOCH` for
    every epoch begun, unless `limit` is 0. Images that were used as far as they go do not count.

    The `counts` are as from `count_bad`, over all batches and ranks so far; `seen` and `sizes` have
    of each domain's number the images drawn so far, and how many different ones there are.
    """
    replaced = counts[:, _REPLACED].sum(dim=1).tolist()
    for domain, drawn in seen.items():
        epochs_begun = -(-drawn // max(1, sizes[domain]))
        tolerated = max(limit * drawn, TOLERATED_PER_EPOCH * epochs_begun if limit else 0)
        if replaced[domain] > tolerated:
            by_reason = ", ".join(f"{k} {v}" for k, v in named_counts(counts, domains).items())
            raise DamagedDataError(
                f"domain {domains[domain]!r}: {replaced[domain]} of {drawn} images had to be "
                f"replaced ({by_reason}), more than data.max_bad_fraction = {limit} allows; "
                f"{_REMEDY}"
            )
