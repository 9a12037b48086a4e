"""One file from a server or a command into a local file: within a deadline, retried, verified."""

import contextlib
import hashlib
import logging
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from subprocess import TimeoutExpired

from shards.addresses import without_secrets
from shards.errors import DamagedDataError, OutputError, StorageError
from shards.read.download import FinalAnswerError, chunks
from shards.read.node_cache import cannot_write

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """How long and how often storage is asked."""

    deadline: float = 60.0
    """Seconds for one file, all attempts together; an attempt is given up when nothing arrives for
    the share of it that falls to one."""
    retries: int = 3
    """Attempts after the first."""
    pause: float = 0.5
    """Seconds before the first retry; each later pause is twice as long."""

    def stall(self) -> float:
        """Give the seconds without a byte after which an attempt is given up."""
        return self.deadline / (self.retries + 1)


DEFAULT_POLICY = FetchPolicy()


def fetch(
    url: str,
    path: Path,
    policy: FetchPolicy,
    *,
    size: int | None = None,
    sha256: str | None = None,
) -> str:
    """Copy what a URL gives into a file.

    Args:
        url: As from `file_url`.
        path: Local file, overwritten.
        policy: How long and how often to try.
        size: Bytes it must have; None if that is not known.
        sha256: Hash it must have, as hexadecimal digits; None if that is not known.

    Returns:
        Its sha256.

    Raises:
        StorageError: If it cannot be had.
        DamagedDataError: If it is had, but not with the size and hash asked for.
        OutputError: If the local file cannot be written.
    """
    started = time.monotonic()
    failure: Exception | None = None
    attempts = 0
    for attempt in range(policy.retries + 1):
        if attempt:
            time.sleep(min(policy.pause * 2 ** (attempt - 1), policy.stall()))
        left = policy.deadline - (time.monotonic() - started)
        if left <= 0:
            break
        attempts += 1
        try:
            found = _copy(url, path, min(policy.stall(), left), started + policy.deadline)
            _compare(url, found, (size, sha256))
            return found[1]
        except FinalAnswerError as error:
            failure = error
            break
        except (OSError, HTTPException, TimeoutExpired, DamagedDataError) as error:
            if isinstance(error, OutputError):
                raise
            failure = error
            log.debug("%s", without_secrets(f"{url}: attempt {attempts}: {error}"))
    times = f"{attempts} attempt{'s' if attempts != 1 else ''}"
    if isinstance(failure, DamagedDataError):
        raise DamagedDataError(f"{failure} ({times}); restore the file where it is stored")
    raise StorageError(
        without_secrets(f"{url}: cannot be had ({failure}) in {times}")
        + f" within {policy.deadline:g} s; check the storage, or raise data.fetch_retries and "
        "data.fetch_deadline"
    ) from failure


def _copy(url: str, path: Path, stall: float, end: float) -> tuple[int, str]:
    """Write all chunks to the file; give size and sha256 of what arrived."""
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


def _compare(url: str, found: tuple[int, str], wanted: tuple[int | None, str | None]) -> None:
    """Raise if size or hash is known and another."""
    for what, have, want in zip(("bytes", "sha256"), found, wanted, strict=True):
        if want is not None and have != want:
            shown = without_secrets(url)
            raise DamagedDataError(f"{shown}: {what} {have}, the index promises {want}")
