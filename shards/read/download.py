"""Bytes of a remote file, in chunks: from a web server, a command, or a file system of fsspec.

Every way gives up when nothing arrives for some seconds, and takes an answer that ends early, or a
command that ends badly, for an error, never for the end of the file.

Web servers are asked by Python's own client: fsspec's asks twice for every file, takes a busy
server, a refused connection and a certificate that is not trusted alike for a missing file, and
ignores a change of `SSL_CERT_FILE`.
"""

import contextlib
import os
import select
import shlex
import signal
import ssl
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from shards.addresses import COMMAND, without_secrets
from shards.errors import DataConfigError
from shards.read.checking import regular_file

T = TypeVar("T")
Chunks = Generator[bytes, None, None]

_CHUNK = 1 << 20
_BLOCK = 8 << 20  # of a file system, where each read may be a request of its own
_SERVERS = ("http", "https", "file")  # what Python's own client speaks
_PASSING_STATUS = {408, 425, 429}  # of the 4xx answers, those that may change by waiting
_LAST_WORDS = 4096  # bytes of what a command complains about
_SILENCE = "nothing came for {:.1f} s"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # scheme -> extra of this package


class FinalAnswerError(OSError):
    """An answer that asking again will not change."""


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows a server to other web servers alone: not to ftp, and to no file of this machine."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https"):
            raise urllib.error.HTTPError(newurl, code, f"to {scheme}:, not followed", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_remote(root: str) -> None:
    """Raises `DataConfigError` unless files of this URL or command can be asked for."""
    shown = without_secrets(root)
    if root.startswith(COMMAND):
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
        _check_file_system(parts.scheme, shown)
    elif "@" in parts.netloc:
        plain = shown.partition("?")[0].rstrip("/")
        raise DataConfigError(
            f"data.root = {shown!r}: user names and passwords in URLs are not sent; put them into "
            f"~/.netrc and give 'pipe:curl -fsS --netrc {plain}/{{}}'"
        )


def _check_file_system(scheme: str, root: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'moa-trainer[{extra}]'" if extra else str(error)
        raise DataConfigError(
            f"data.root = {root!r}: the package for {scheme}:// is not installed; {remedy}"
        ) from error
    except ValueError as error:
        raise DataConfigError(
            f"data.root = {root!r}: nothing opens {scheme}://; give a command that writes a file "
            f"to its output, 'pipe:COMMAND {root.rstrip('/')}/{{}} -', or add a file system for "
            f"{scheme!r} with fsspec.register_implementation"
        ) from error


def file_url(root: str, name: str) -> str:
    """The URL of one file of a set, its name added to the path, or put for `{}` of a command."""
    if root.startswith(COMMAND):
        return root.replace("{}", shlex.quote(name))
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def chunks(url: str, stall: float) -> Chunks:
    """Yields the content of a URL or command, as from `file_url`, as soon as there is some.

    Gives up after `stall` seconds without a byte.

    Raises:
        DamagedDataError: a file of this machine is no regular one of its folder.
        FinalAnswerError: asking again cannot help.
        OSError: any other failure.
    """
    if url.startswith(COMMAND):
        return _command_chunks(url.removeprefix(COMMAND), stall)
    parts = urlsplit(url)
    if parts.scheme == "file":
        with contextlib.suppress(FileNotFoundError):
            regular_file(Path(unquote(parts.path)))
    if parts.scheme in _SERVERS:
        return _server_chunks(url, stall)
    return _file_system_chunks(url, stall)


def _server_chunks(url: str, stall: float) -> Chunks:
    """What a server gives; an answer cut short is an error."""
    try:
        with urllib.request.build_opener(_WebOnly).open(url, timeout=stall) as response:
            promised, size = response.headers.get("Content-Length"), 0
            while chunk := response.read1(_CHUNK):
                size += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        final = 300 <= error.code < 500 and error.code not in _PASSING_STATUS
        why = f" ({error.reason.splitlines()[0]})" if error.code < 400 else ""
        raise (FinalAnswerError if final else OSError)(f"HTTP status {error.code}{why}") from error
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
    """What a shell command writes, unless it falls silent; it must end with 0."""
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=complaints, start_new_session=True,  # so that all of a pipeline can be ended
        )  # fmt: skip
        assert process.stdout is not None
        output = process.stdout.fileno()
        waiter = select.poll()
        waiter.register(output, select.POLLIN | select.POLLHUP)
        try:
            while True:
                if not waiter.poll(1000 * stall):
                    raise TimeoutError(_SILENCE.format(stall))
                if not (chunk := os.read(output, _CHUNK)):
                    break
                yield chunk
            status = process.wait(timeout=stall)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()
        if status:
            complaints.seek(max(0, complaints.seek(0, os.SEEK_END) - _LAST_WORDS))
            last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise OSError(f"the command ended with {status}{': ' + last if last else ''}")


def _file_system_chunks(url: str, stall: float) -> Chunks:
    """What a file system of fsspec gives; one that hangs is left behind."""
    import fsspec

    try:
        system, path = _within(stall, lambda: fsspec.url_to_fs(url))
        system.invalidate_cache()  # the size it remembers may be that of an earlier file
        stream = _within(stall, lambda: system.open(path, block_size=_BLOCK))
        while chunk := _within(stall, lambda: stream.read(_BLOCK)):
            yield chunk
        stream.close()
    except Exception as error:  # each has errors of its own
        final = isinstance(error, FileNotFoundError | PermissionError)
        kind = FinalAnswerError if final else OSError
        raise kind(f"{type(error).__name__}: {error}") from error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may take that long; then its thread goes on unheard."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([result], seconds).done:
        raise TimeoutError(_SILENCE.format(seconds))
    return result.result()
