"""Which images belong together: a pattern tells it from their paths."""

import logging
import re

import numpy as np

from shards.errors import DataConfigError
from shards.randomness import UInt64Array, hash64
from shards.read.checking import GROUP_BY
from shards.write.listing import DomainListing, Listing

log = logging.getLogger(__name__)


def find_groups(
    listing: Listing, group_by: str | None, *, extending: bool = False
) -> tuple[UInt64Array, ...]:
    """The group of every image by domain and place, as a hash of its name; empty without a pattern.

    The pattern is searched in `<domain>/<path>`. What its parentheses match names the group, or
    all that it matches if it has none; images that it is not found in are groups of their own.

    Raises `DataConfigError`: it is no regular expression, or is found in no path and the set is not
    one that is extended.
    """
    if group_by is None:
        return ()
    given = f"--group_by {group_by!r:.200}"
    if not re.fullmatch(GROUP_BY, group_by):
        raise DataConfigError(f"{given}: must be one line of up to 500 characters")
    try:
        pattern = re.compile(group_by)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataConfigError(
            f"{given}: no regular expression ({error}); one is 'patient_([0-9]+)'"
        ) from error
    found = [[_group(pattern, domain, path) for path in domain.paths] for domain in listing.domains]
    names = [name for domain in found for name in domain]
    lacking = sum(name[0] == "alone" for name in names)
    first = f"{listing.domains[0].name}/{listing.domains[0].paths[0]}"
    if lacking == len(names) and not extending:
        raise DataConfigError(
            f"{given}: found in none of the {len(names)} paths, such as {first!r:.200}; give a "
            "regular expression that is found there"
        )
    if lacking:
        log.warning("%s: not found in %d of %d paths; each of these images is a group of its own",
                    given, lacking, len(names))  # fmt: skip
    for domain, groups in zip(listing.domains, found, strict=True):
        if len(set(groups)) == 1:
            log.warning("%s: all images of %r are in one group, so it cannot be split",
                        given, domain.name)  # fmt: skip
    log.info("%s: %d images in %d groups", given, len(names), len(set(names)))
    return tuple(np.array([hash64(*name) for name in domain], np.uint64) for domain in found)


def _group(pattern: re.Pattern[str], domain: DomainListing, path: str) -> tuple[str, ...]:
    match = pattern.search(f"{domain.name}/{path}")
    if match is None:
        return ("alone", domain.name, path)
    return ("group", *(part or "" for part in match.groups() or (match[0],)))
