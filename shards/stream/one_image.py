"""One stored image from its place in the index to pixels, with a note of what was wrong."""

from typing import NamedTuple

from shards.errors import DamagedSampleError
from shards.pixels.decoding import Decoder, Pixels
from shards.read.index import ShardIndex
from shards.stream.bad_samples import BadSample


class OpenedImage(NamedTuple):
    """What was found at a place.

    Attributes:
        pixels: The image; None if it cannot be used.
        label: Its class number.
        bad: What was wrong; None if nothing.
    """

    pixels: Pixels | None
    label: int
    bad: BadSample | None


def open_image(
    index: ShardIndex, env: int, rank: int, decoder: Decoder, attempt: int = 0
) -> OpenedImage:
    """Read and decode one image.

    Args:
        index: The shard set.
        env: Number of the domain.
        rank: Place in the domain's sorted file list.
        decoder: What decodes it.
        attempt: How many substitutes were tried before.

    Returns:
        The image, or the note that it cannot be used.

    Raises:
        DamagedDataError: If a shard as a whole is not what the index promises.
        OSError: If the storage fails.
    """

    def note(reason: str, detail: object) -> BadSample:
        row = index.table(env)[rank]
        shard, offset = index.shards[int(row["shard"])].file, int(row["offset"])
        key = index.key(env, rank)
        return BadSample(env, key, shard, offset, reason, str(detail), attempt)

    label = int(index.table(env)["label"][rank])
    try:
        sample = index.read(env, rank)
    except DamagedSampleError as error:
        return OpenedImage(None, label, note("crc32", error))
    try:
        pixels, truncated = decoder(sample.image)
    except ValueError as error:
        return OpenedImage(None, label, note("undecodable", error))
    return OpenedImage(pixels, label, note("truncated", "incomplete") if truncated else None)
