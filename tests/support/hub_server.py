"""A stand-in for a model hub: repositories in memory, by the calls that the hub's client makes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = dict[str, bytes]
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name; only `TOKEN` may write."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Files] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Keeps the tests' output clean."""

    def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, content: object, code: int = 200, **headers: str) -> None:
        self.answer(json.dumps(content).encode(), code, Content_Type="application/json", **headers)

    def repository(self, name: str) -> Files | None:
        found = self.server.repositories.get(name)
        if found is None:
            self.json({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        return found

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if (files := self.repository(name)) is not None:
                entries = [{"rfilename": f} for f in files]
                if "tree" in parts:
                    self.json([
                        {"type": "file", "path": f, "size": len(c), "oid": blob(c)}
                        for f, c in files.items()
                    ])  # fmt: skip
                else:
                    self.json({"id": name, "sha": commit(files), "siblings": entries})
            return
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if (files := self.repository(name)) is not None:
            if file in files:
                self.answer(files[file], ETag=f'"{blob(files[file])}"', X_Repo_Commit=commit(files))
            else:
                self.json({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self.json({"warnings": [], "errors": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.json({"error": "not allowed"}, 403)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.json({"url": f"{self.server.address}/{name}", "id": name})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif "/commit/" in path:
            name = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
            found = commit(self.server.repositories[name])
            url = f"{self.server.address}/{name}/commit/{found}"
            self.json({"success": True, "commitOid": found, "commitUrl": url})
        else:
            self.json({"error": f"unknown call {path}"}, 500)


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def commit(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
