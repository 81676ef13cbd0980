"""A server on this machine that answers as the Hugging Face hub does, as far as a file's download goes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """What it has and how it behaves, and what it was asked.

    repos: files by repository;  gated: repositories whose files need `token`
    most: bytes of a file that it sends before it breaks off; None: all;  stalls: it falls silent there instead
    ranges: whether it begins where it is asked to;  lies: it sends other bytes than it has the hash of
    etag: what it says a file's hash is, in place of the right one
    elsewhere: files come from another host name, to which it redirects;  down: it answers nothing but 503
    asked: method, path and headers of each request;  sent: bytes of files
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    most: int | None = None
    stalls: bool = False
    ranges: bool = True
    lies: bool = False
    elsewhere: bool = False
    etag: str | None = None
    down: bool = False
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    port: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def downloads(self) -> list[dict[str, str]]:
        """The headers of each request for a file's bytes."""
        return [headers for method, path, headers in self.asked if method == "GET" and "/api/" not in path]

    def settings(self, cache: object) -> dict[str, str]:
        """The environment of a process that is to use it, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",  # which other tests set to 1
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if hub.down:
            self._say(503)
        elif path.startswith("/api/models/"):
            self._listing(path.removeprefix("/api/models/"))
        elif path.startswith("/elsewhere/"):
            repo, _, file = path.removeprefix("/elsewhere/").partition("::")
            self._file(hub.repos[repo][file], {})
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            self._resolve(repo, rest.partition("/")[2])

    def _listing(self, repo: str) -> None:
        if repo not in self.hub.repos:
            self._say(401, {"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": name} for name in self.hub.repos[repo]]
        self._say(200, {"Content-Type": "application/json"}, {"id": repo, "sha": COMMIT, "siblings": files})

    def _resolve(self, repo: str, file: str) -> None:
        hub = self.hub
        if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._say(403, {"X-Error-Code": "GatedRepo"})
            return
        content = hub.repos[repo][file]
        digest = hub.etag or hashlib.sha256(content).hexdigest()
        known = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if hub.elsewhere:
            self._say(302, {**known, "Location": f"http://localhost:{hub.port}/elsewhere/{repo}::{file}"})
        else:
            self._file(content, {**known, "ETag": f'"{digest}"'})

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        hub, start = self.hub, 0
        asked = self.headers.get("Range")
        if asked and hub.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        part = bytes(len(content) - start) if hub.lies else content[start:]
        whole = hub.most is None or hub.most >= len(part)
        part = part if whole else part[: hub.most]
        self.wfile.write(part)
        self.wfile.flush()
        hub.sent += len(part)
        if not whole:
            if hub.stalls:
                hub.stalled.set()
                self.connection.settimeout(30)
                with suppress(OSError):
                    self.rfile.read(1)  # until the other side has gone
            self.close_connection = True

    def _say(self, status: int, headers: dict[str, str] | None = None, content: object = None) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing: `asked` has it."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Listens on a free port of this machine while the block runs."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
