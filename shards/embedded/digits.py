"""The embedded data: scikit-learn's 1,797 scanned digits in six drawn domains, as a shard set.

Image i goes to domain i mod 6 and is drawn there once, so no digit appears in two domains. The
shards are made by the ordinary writer on first use and kept in a cache folder.
"""

import functools
import logging
import os
import struct
import tempfile
import zlib
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt

from shards.datasets import dataset_spec
from shards.embedded.drawing import DRAWING_VERSION, draw
from shards.errors import DataConfigError, OutputError
from shards.randomness import Int64Array
from shards.read.index import ShardIndex
from shards.read.layout import FORMAT_VERSION, INDEX_NAME
from shards.write.conversion import write_shards

log = logging.getLogger(__name__)

_CACHE_VARIABLE = "MOA_CACHE"


@functools.cache
def scans() -> tuple[Int64Array, Int64Array]:
    """Read the scanned digits that scikit-learn bundles.

    Returns:
        `(pixels, labels)`: int64 [1797, 8, 8] in 0..16 and int64 [1797].
    """
    from sklearn.datasets import load_digits  # here: it takes a second to import

    bundle = load_digits()
    return bundle.images.astype(np.int64), bundle.target.astype(np.int64)


def draw_digits(folder: Path) -> None:
    """Draw the embedded data as an image folder `<domain>/<class>/<number>.png`.

    Args:
        folder: Where to draw; made if needed.

    Raises:
        OSError: If the folder cannot be written.
    """
    domains = dataset_spec("digits").domains
    assert domains is not None
    for number, (pixels, label) in enumerate(zip(*scans(), strict=True)):
        domain = domains[number % len(domains)]
        path = folder / domain / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(draw(pixels, domain, number)))


def encode_png(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encode a small picture as an uncompressed PNG.

    Compressed bytes would depend on the zlib at hand, and with them the hash of the shard set.

    Args:
        picture: uint8 [H, W, 3], at most 65,535 bytes with one more per line.

    Returns:
        The file's bytes.
    """
    height, width, _ = picture.shape
    lines = b"".join(b"\0" + line.tobytes() for line in picture)
    size = struct.pack("<HH", len(lines), len(lines) ^ 0xFFFF)
    stored = b"\x78\x01\x01" + size + lines + struct.pack(">I", zlib.adler32(lines))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stored), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def write_digits(out: Path) -> ShardIndex:
    """Draw the embedded data and write it as a shard set.

    Args:
        out: Folder of the shard set.

    Returns:
        The opened set.

    Raises:
        OutputError: If `out` cannot be written, is in use, or holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="digits-") as folder:
        try:
            draw_digits(Path(folder))
        except OSError as error:
            raise OutputError(f"temporary folder {folder}: {error.strerror}") from error
        return write_shards(Path(folder), out, dataset_spec("digits"))


def default_cache() -> Path:
    """Give the folder for what is built on first use.

    Returns:
        The environment variable `MOA_CACHE`, or `~/.cache/moa-trainer`.
    """
    value = os.environ.get(_CACHE_VARIABLE)
    return Path(value).expanduser() if value else Path.home() / ".cache" / "moa-trainer"


def embedded_shards(cache: Path | None = None) -> Path:
    """Give the shard set of the embedded data, building it on first use (a few seconds).

    Several processes may ask at once: one builds, the others wait for it.

    Args:
        cache: Folder to keep it in; None for `default_cache()`.

    Returns:
        Folder of the shard set.

    Raises:
        DataConfigError: If the cache folder cannot be written.
    """
    cache = default_cache() if cache is None else cache
    target = cache / f"digits-v{FORMAT_VERSION}.{DRAWING_VERSION}"
    if (target / INDEX_NAME).exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{target.name}.lock"):
            if not (target / INDEX_NAME).exists():
                log.info("building the embedded digits in %s (first use)", target)
                with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as folder:
                    write_digits(Path(folder) / target.name).close()
                    (Path(folder) / target.name).rename(target)
    except (OSError, OutputError) as error:
        if (target / INDEX_NAME).exists():
            return target  # another node finished first; its bytes are the same
        raise DataConfigError(
            f"{_CACHE_VARIABLE}: the cache folder {cache} cannot be written ({error}); "
            f"set {_CACHE_VARIABLE} to a folder that can"
        ) from error
    return target
