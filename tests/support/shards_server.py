"""A web server on this machine that hands out a folder, and misbehaves as it is told."""

import contextlib
import json
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from shards.config import DataConfig
from shards.read.layout import FORMAT_VERSION, INDEX_NAME
from shards.read.node_cache import NodeCache, folder_of


def node_cache(root: Path, limit: int, **options: float) -> NodeCache:
    """The cache of a set whose index lists `0.tar` to `9.tar`, `a.tar` to `c.tar`, `kept.tar`."""
    shard = {"samples": 1, "bytes": 10, "sha256": "0" * 64}
    domain = {"name": "art", "key_prefix": "art", "table": "art.npy", **shard}
    del domain["bytes"]
    content = {
        "format_version": FORMAT_VERSION, "dataset": "folder", "classes": ["cat"],
        "domains": [domain],
        "shards": [{"file": f"{name}.tar", **shard} for name in (*"0123456789abc", "kept")],
    }  # fmt: skip
    data = json.dumps(content).encode()
    cache = NodeCache(root, folder_of(data), limit, **options)
    cache.path(INDEX_NAME).write_bytes(data)
    return cache


Change = Callable[[bytes], bytes]


class Server:
    """Serves a folder under `url`.

    Attributes:
        script: file name -> what its next requests get: a status, `cut` (closed half-way), `stall`
            (silence half-way), `endless`, `length abc` (as announced), `to URL` (a redirection), or
            a function that changes the content.
            An entry is used once, unless it is the last and `forever` holds the name.
        requests: file name -> how often it was asked for.
        sent: file name -> bytes sent of an endless one.
    """

    def __init__(self, folder: Path, tls: ssl.SSLContext | None = None) -> None:
        self.folder = folder
        self.script: dict[str, list[int | str | Change]] = defaultdict(list)
        self.forever: set[str] = set()
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.stopping = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.http.server_port}/sets/one"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))

    def __enter__(self) -> "Server":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2].partition("?")[0]
        self.requests[name] += 1
        script = self.script[name]
        act = script[0] if script else None
        if script and name not in self.forever:
            script.pop(0)
        path = self.folder / name
        if isinstance(act, int) or not path.is_file():
            request.send_error(act if isinstance(act, int) else 404)
            return
        content = path.read_bytes()
        if callable(act):
            content = act(content)
        if isinstance(act, str) and act.startswith("to "):
            request.send_response(302)
            request.send_header("Location", act.removeprefix("to "))
            request.end_headers()
            return
        request.send_response(200)
        if act == "endless":
            request.end_headers()
            with contextlib.suppress(OSError):
                while not self.stopping.is_set():
                    self.sent[name] += request.wfile.write(bytes(1 << 16))
            return
        odd = isinstance(act, str) and act.startswith("length ")
        length = act.removeprefix("length ") if odd else str(len(content))
        request.send_header("Content-Length", length)
        request.end_headers()
        if act in ("cut", "stall"):
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            if act == "stall":
                self.stopping.wait(30)
            return
        request.wfile.write(content)


def remote_config(
    cache: Path, limit: int = 10**9, deadline: float = 20.0, retries: int = 3
) -> DataConfig:
    """How a remote set is reached; `limit` bytes are kept."""
    return DataConfig(
        cache_dir=str(cache),
        cache_gib=limit / 2**30,
        fetch_deadline=deadline,
        fetch_retries=retries,
    )
