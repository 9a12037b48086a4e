"""One stored image from its place in the index to pixels, with a note of what was wrong."""

from typing import NamedTuple

from shards.errors import DamagedSampleError
from shards.pixels.decoding import Decoder, Pixels
from shards.read.index import ShardIndex
from shards.stream.bad_samples import BadSample


class OpenedImage(NamedTuple):
    """What was found at a place."""

    pixels: Pixels | None
    """None if it cannot be used."""
    label: int
    bad: BadSample | None
    """What was wrong; None if nothing."""


def open_image(
    index: ShardIndex, domain: int, place: int, decoder: Decoder, attempt: int = 0
) -> OpenedImage:
    """Read and decode the image at a place of a domain's file list, or note that it cannot be used.

    `attempt` counts the substitutes that were tried before.

    Raises:
        DamagedDataError: a shard as a whole is not what the index promises.
        OSError: the storage fails.
    """

    def note(reason: str, detail: object) -> BadSample:
        row = index.table(domain)[place]
        shard, offset = index.shards[int(row["shard"])].file, int(row["offset"])
        key = index.key(domain, place)
        return BadSample(domain, key, shard, offset, reason, str(detail), attempt)

    label = int(index.table(domain)["label"][place])
    try:
        sample = index.read(domain, place)
    except DamagedSampleError as error:
        return OpenedImage(None, label, note("crc32", error))
    try:
        pixels, truncated = decoder(sample.image)
    except ValueError as error:
        return OpenedImage(None, label, note("undecodable", error))
    return OpenedImage(pixels, label, note("truncated", "incomplete") if truncated else None)
