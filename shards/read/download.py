"""Where files of a remote shard set come from: servers, commands and registered openers, in chunks.

Every way gives up when nothing arrives for some seconds, and takes an answer that ends early, or a
command that ends badly, for an error, never for the end of the file.
"""

import os
import re
import select
import shlex
import signal
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable
from urllib.parse import urlsplit, urlunsplit

from shards.addresses import _COMMAND, without_secrets
from shards.errors import DamagedDataError, DataConfigError

_CHUNK = 1 << 20
_SERVERS = ("http", "https", "file")  # what Python's own client speaks
_PASSING_STATUS = {408, 425, 429}  # of the 4xx answers, those that may change by waiting


Chunks = Generator[bytes, None, None]


class FinalAnswerError(OSError):
    """An answer that asking again will not change."""


def check_remote(root: str) -> None:
    """Raise unless files of this root can be asked for.

    Args:
        root: A URL or a command.

    Raises:
        DataConfigError: If the command has no place for the file name, the URL is none or holds a
            user name, or nothing opens such URLs.
    """
    shown = without_secrets(root)
    if root.startswith(_COMMAND):
        if "{}" not in root:
            raise DataConfigError(
                f"data.root = {shown!r}: the command needs {{}} where the file name belongs, as in "
                "'pipe:aws s3 cp s3://bucket/set/{} -'"
            )
        return
    try:
        parts = urlsplit(root)
        _ = parts.port  # raises as well
    except ValueError as error:
        raise DataConfigError(
            f"data.root = {shown!r}: no URL ({error}); give one as http://HOST:PORT/SET"
        ) from error
    if parts.scheme not in _SERVERS:
        _check_opener(parts.scheme, shown)
    elif "@" in parts.netloc:
        plain = shown.partition("?")[0].rstrip("/")
        raise DataConfigError(
            f"data.root = {shown!r}: user names and passwords in URLs are not sent; put them into "
            f"~/.netrc and give 'pipe:curl -fsS --netrc {plain}/{{}}'"
        )


def _check_opener(scheme: str, root: str) -> None:
    """Raise unless WebDataset has an opener for such URLs."""
    from webdataset.gopen import gopen_schemes

    if scheme not in gopen_schemes:
        raise DataConfigError(
            f"data.root = {root!r}: nothing opens {scheme}://; give a command that writes a file "
            f"to its output, 'pipe:COMMAND {root.rstrip('/')}/{{}} -', or add an opener for "
            f"{scheme!r} to gopen_schemes of webdataset.gopen"
        )


def file_url(root: str, name: str) -> str:
    """Give the URL or command of one file of a set.

    Args:
        root: A URL, to whose path the name is added, or a command with `{}` for the name.
        name: File name.

    Returns:
        What `fetch` opens.
    """
    if root.startswith(_COMMAND):
        return root.replace("{}", shlex.quote(name))
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def chunks(url: str, stall: float) -> Chunks:
    """Yield the content of a URL, as soon as there is some.

    Args:
        url: As from `file_url`.
        stall: Seconds without a byte after which to give up.

    Returns:
        A generator of bytes; close it if you stop early.

    Raises:
        FinalAnswerError: If asking again cannot help.
        OSError: On any other failure.
    """
    if url.startswith(_COMMAND):
        return _command_chunks(url.removeprefix(_COMMAND), stall)
    if urlsplit(url).scheme in _SERVERS:
        return _http_chunks(url, stall)
    return _opener_chunks(url, stall)


def _http_chunks(url: str, stall: float) -> Chunks:
    """Yield what a server gives; an answer cut short is an error."""
    try:
        with urllib.request.urlopen(url, timeout=stall) as response:
            promised, size = response.headers.get("Content-Length"), 0
            while chunk := response.read1(_CHUNK):
                size += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        final = 400 <= error.code < 500 and error.code not in _PASSING_STATUS
        raise (FinalAnswerError if final else OSError)(f"HTTP status {error.code}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FinalAnswerError(
                f"its certificate is not trusted: {error.reason.verify_message}; the environment "
                "variable SSL_CERT_FILE names the file of an authority of your own"
            ) from error
        raise
    if promised is not None and promised.strip() != str(size):
        raise ConnectionError(f"connection closed after {size} of {promised} bytes")


def _command_chunks(command: str, stall: float) -> Chunks:
    """Yield what a shell command writes; it must end with 0."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,  # so that all of a pipeline can be ended
        )
        try:
            yield from _process_chunks(process, stall)
            status = process.wait(timeout=stall)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if status:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the command ended with {status}{': ' + last if last else ''}")


def _process_chunks(process: "subprocess.Popen[bytes]", stall: float) -> Chunks:
    """Yield what a process writes, unless it falls silent."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    waiter = select.poll()
    waiter.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        if not waiter.poll(1000 * stall):
            raise TimeoutError(f"nothing came for {stall:.1f} s")
        if not (chunk := os.read(descriptor, _CHUNK)):
            return
        yield chunk


def _opener_chunks(url: str, stall: float) -> Chunks:
    """Yield what a registered opener gives; one of its own must bring its own time limits."""
    from webdataset.gopen import Pipe, gopen

    with gopen(url) as stream:
        if not isinstance(stream, Pipe):
            while chunk := stream.read(_CHUNK):
                yield chunk
            return
        try:
            yield from _process_chunks(stream.proc, stall)
            stream.proc.wait(timeout=stall)
        except BaseException:
            stream.proc.kill()
            stream.ignore_errors = True  # the way it ends now says nothing
            raise


def check_names(names: Iterable[str]) -> None:
    """Raise unless all names are plain file names, since they come from elsewhere.

    Args:
        names: File names in an index.

    Raises:
        DamagedDataError: If one could leave its folder or be more than a name to a shell.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise DamagedDataError(f"index.json: {name!r} is no file name of a shard set")
