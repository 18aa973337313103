"""A Hub on the loopback interface, for the real ``huggingface_hub`` client over real HTTP.

Users with roles, private and gated repositories, branches, pull requests, commits, the LFS protocol, copies of files
and of whole repositories, resolve with ranges, and faults on request. The client reads HF_ENDPOINT when it is imported,
so run it in a process of its own with :meth:`HubServer.environment`. That turns xet off unless ``cas`` is there: a
folder in which the clients' own storage library keeps what it uploads.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.hub_routes import Routes
from support.hub_store import LFS_SUFFIXES, Blob, Fault, Refusal, Repo, User
from support.hub_xet import LocalXet

__all__ = ["Blob", "Fault", "HubServer", "Repo", "User"]


class HubServer:
    """The server and all that it holds.

    ``received`` has every request body, with base64 parts decoded as well; ``sizes`` how large each body was, by
    request; ``ranges`` the requests that asked for a part of a file. ``after_request`` is called when a request was
    answered, to look at what is visible then.
    """

    def __init__(self, cas: LocalXet | None = None) -> None:
        self.cas = cas
        self.after_request: Callable[[], None] | None = None
        self.sizes: list[tuple[str, int]] = []
        self.ranges: list[str] = []
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: list[bytes] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """Variables for a client process: this server, a cache of its own, no tokens of the user's."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1" if self.cas is None else "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, **kwargs: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, **kwargs)
        tree = {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}
        tree |= {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in (files or {}).items()}
        self.lfs |= {blob.sha256: blob.data for blob in tree.values() if blob.lfs}
        repo.commit("main", tree, "initial commit")
        return repo

    def uploaded(self, pattern: str = "") -> int:
        """Bytes of the bodies of all requests that match."""
        return sum(size for line, size in self.sizes if re.search(pattern, line))

    def fail(self, pattern: str, **kwargs: Any) -> None:
        self.faults.append(Fault(pattern, **kwargs))

    def fault_for(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if not re.search(fault.pattern, line) or fault.times == 0:
                    continue
                fault.after -= 1
                if fault.after < 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Handler(Routes, BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body that waits for the receipt of its header comes 40 ms later
    body = b""

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet; ``hub.requests`` has it."""

    def _serve(self) -> None:
        line = f"{self.command} {self.path}"
        fault = self.hub.fault_for(line)
        try:
            self.body = self._read_body(half=fault is not None and fault.drop and not fault.done)
        except ConnectionError:
            return
        with self.hub.lock:
            self.hub.requests.append(line)
            self.hub.received.append(self.body)
            self.hub.sizes.append((line, len(self.body)))
            if self.headers.get("Range"):
                self.hub.ranges.append(line)
        if fault is not None and fault.status:
            return self._send(fault.status, {"error": fault.message}, fault.headers)
        if fault is not None and fault.drop and self.command != "GET":
            if fault.done:
                with self.hub.lock:
                    self.route()
            return self._cut()
        try:
            with self.hub.lock:
                answer = self.route()
                if self.hub.after_request is not None:
                    self.hub.after_request()
            self._send(*answer, half=fault is not None and fault.drop)
        except Refusal as refusal:
            self._send(refusal.status, refusal.body, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _read_body(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    return b"".join(parts)
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(size // 2 if half else size)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, half: bool = False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
