"""One file from elsewhere into a local file: within a deadline, retried, verified."""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from subprocess import TimeoutExpired

from shards.addresses import without_secrets
from shards.config import DataConfig
from shards.errors import DamagedDataError, StorageError
from shards.read.download import FinalAnswerError, chunks
from shards.read.node_cache import cannot_write

log = logging.getLogger(__name__)

PAUSE = 0.5  # seconds before the first retry; each later pause is twice as long


def attempts(retries: int, longest: float = math.inf) -> Iterator[int]:
    """Numbers from 1 for each attempt, after a pause of at most so many seconds before retries."""
    for retry in range(retries + 1):
        if retry:
            time.sleep(min(PAUSE * 2 ** (retry - 1), longest))
        yield retry + 1


def fetch(
    url: str,
    path: Path,
    config: DataConfig,
    *,
    size: int | None = None,
    sha256: str | None = None,
    most: int | None = None,
) -> None:
    """Copies what a URL gives into a local file, which must then have a size and hash if known.

    Stops at once when more comes than `size` or, where that is not known, `most` bytes.

    Raises:
        StorageError: it cannot be had.
        DamagedDataError: it is had, but not with the size and hash asked for.
        OutputError: the local file cannot be written.
    """
    shown = without_secrets(url)
    end = time.monotonic() + config.fetch_deadline
    stall = config.fetch_deadline / (config.fetch_retries + 1)  # the share of one attempt
    failure: Exception | None = None
    tried = 0
    for attempt in attempts(config.fetch_retries, stall):
        left = end - time.monotonic()
        if left <= 0:
            break
        tried = attempt
        try:
            found = _copy(url, path, min(stall, left), end, most if size is None else size)
            for what, have, want in zip(("bytes", "sha256"), found, (size, sha256), strict=True):
                if want is not None and have != want:
                    raise DamagedDataError(f"{shown}: {what} {have}, the index promises {want}")
            return
        except FinalAnswerError as error:
            failure = error
            break
        except (OSError, HTTPException, TimeoutExpired, DamagedDataError) as error:
            failure = error
            log.debug("%s: attempt %d: %s", shown, attempt, _reason(error))
    times = f"{tried} attempt{'s' if tried != 1 else ''}"
    if isinstance(failure, DamagedDataError):
        raise DamagedDataError(f"{failure} ({times}); restore the file where it is stored")
    raise StorageError(
        f"{shown}: cannot be had ({_reason(failure)}) in {times} within "
        f"{config.fetch_deadline:g} s; check the storage, or raise data.fetch_retries and "
        "data.fetch_deadline"
    ) from failure


def _reason(failure: Exception | None) -> str:
    if isinstance(failure, TimeoutExpired):  # its own words hold the whole command
        return f"the command did not end within {failure.timeout:g} s"
    return without_secrets(str(failure))


def _copy(url: str, path: Path, stall: float, end: float, most: int | None) -> tuple[int, str]:
    """Writes all chunks to the file, `most` bytes at most; size and sha256 of what arrived."""
    digest, size = hashlib.sha256(), 0
    try:
        # Keeps the size reserved for it. Unbuffered: a full disk is noticed while writing.
        sink = path.open("r+b" if path.is_file() else "wb", buffering=0)
    except OSError as error:
        raise cannot_write(path, error) from error
    with sink, contextlib.closing(chunks(url, stall)) as arriving:
        for chunk in arriving:
            digest.update(chunk)
            size += len(chunk)
            if most is not None and size > most:
                raise DamagedDataError(f"{without_secrets(url)}: gives more than {most} bytes")
            try:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[sink.write(rest) :]
            except OSError as error:
                raise cannot_write(path, error) from error
            if time.monotonic() > end:
                raise TimeoutError(f"only {size} bytes came before the deadline")
        if sink.seekable():
            sink.truncate()
    return size, digest.hexdigest()
