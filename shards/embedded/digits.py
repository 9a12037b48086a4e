"""The embedded data: 1,797 scanned digits in six drawn domains, as a shard set.

Image i of the collection that scikit-learn bundles stands in domain i mod 6 alone, so no digit
appears in two domains. The images ship as uncompressed PNG files in one archive; the ordinary
writer makes the shards of them on first use.
"""

import logging
import os
import tarfile
import tempfile
from pathlib import Path

import filelock

from shards.datasets import dataset_spec
from shards.errors import DataConfigError, OutputError
from shards.read.index import ShardIndex
from shards.read.layout import FORMAT_VERSION, INDEX_NAME
from shards.write.conversion import write_shards

log = logging.getLogger(__name__)

_ARCHIVE = Path(__file__).with_name("digits.tar.xz")
_ARCHIVE_VERSION = 2
_CACHE_VARIABLE = "MOA_CACHE"


def unpack_digits(folder: str | Path) -> None:
    """Lay the embedded data out as an image folder `<domain>/<class>/<number>.png`.

    Raises `OSError`: `folder` cannot be written.
    """
    with tarfile.open(_ARCHIVE) as archive:
        archive.extractall(folder)


def write_digits(out: Path) -> ShardIndex:
    """Write the embedded data as a shard set, and open it.

    Raises `OutputError`: `out` cannot be written, is in use, or holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="digits-") as folder:
        try:
            unpack_digits(folder)
        except OSError as error:
            raise OutputError(f"temporary folder {folder}: {error.strerror}") from error
        return write_shards(Path(folder), out, dataset_spec("digits"))


def default_cache() -> Path:
    """The folder for what is built on first use: `MOA_CACHE`, or `~/.cache/moa-trainer`."""
    try:
        return Path(os.environ.get(_CACHE_VARIABLE) or "~/.cache/moa-trainer").expanduser()
    except RuntimeError as error:  # no HOME, and a user whom the system does not know
        raise DataConfigError(
            f"{_CACHE_VARIABLE}: {error} Set {_CACHE_VARIABLE} to a folder that can be written"
        ) from error


def embedded_shards(cache: Path | None = None) -> Path:
    """Give the folder of the embedded shard set, built on first use (a few seconds).

    Several processes may ask at once: one builds, the others wait for it.

    Args:
        cache: folder to keep it in; None for `default_cache()`.

    Raises:
        DataConfigError: the cache folder cannot be written.
    """
    cache = default_cache() if cache is None else cache
    target = cache / f"digits-v{FORMAT_VERSION}.{_ARCHIVE_VERSION}"
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
