"""A proxy on loopback, in front of an S3 server, that spoils requests: the next few of some methods, or any at random.

Knows HTTP and nothing of S3 but its error document. Requests pass unchanged, Host included, so signatures stay valid.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Fault(StrEnum):
    """What happens to a request."""

    SLOW_DOWN = "SlowDown"
    UNAVAILABLE = "ServiceUnavailable"
    INTERNAL = "InternalError"
    THROTTLED = "TooManyRequests"
    CONFLICT = "ConditionalRequestConflict"
    """Said of an object that is not there."""
    TIMEOUT = "RequestTimeout"
    EXPIRED = "ExpiredToken"
    DENIED = "AccessDenied"
    UNKNOWN_KEY = "InvalidAccessKeyId"
    RESET = "reset"
    """In the middle of the request's body; nothing arrives."""
    TORN = "torn upload"
    """Half of the request's body reaches the server, then both connections are reset."""
    LOST_REPLY = "lost reply"
    """The server does it, and the client never hears."""
    TRUNCATED = "truncated reply"
    HANG = "hang"
    """No answer for `hang_s`, then a reset."""


STATUSES = {
    Fault.SLOW_DOWN: 503,
    Fault.UNAVAILABLE: 503,
    Fault.INTERNAL: 500,
    Fault.THROTTLED: 429,
    Fault.CONFLICT: 409,
    Fault.TIMEOUT: 400,
    Fault.EXPIRED: 400,
    Fault.DENIED: 403,
    Fault.UNKNOWN_KEY: 403,
}
LASTING = frozenset({Fault.EXPIRED, Fault.DENIED, Fault.UNKNOWN_KEY})
PASSING = tuple(fault for fault in Fault if fault not in LASTING)
UPLOADS_ONLY = frozenset({Fault.CONFLICT, Fault.TIMEOUT, Fault.TORN})
"""At random no other request meets them, as in life."""
METHODS = frozenset({"GET", "PUT", "POST", "HEAD", "DELETE"})
NOT_FORWARDED = frozenset({"expect", "connection"})
NOT_RETURNED = frozenset({"transfer-encoding", "connection", "content-length", "date", "server"})


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    method: str
    path: str
    fault: Fault | None
    headers: dict[str, str]
    """Names in lower case."""


@dataclass
class Proxy:
    """A running proxy to the HTTP server at `target` (host:port)."""

    target: str
    hang_s: float = 3.0
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._at: dict[str, Fault] = {}
        self._next: tuple[Fault, int, Collection[str]] | None = None
        self._dice: tuple[random.Random, float, tuple[Fault, ...], Collection[str]] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def spoil(self, fault: Fault, times: int, methods: Collection[str] = METHODS) -> None:
        """The next `times` requests of `methods`."""
        with self._lock:
            self._next = (fault, times, methods)

    def spoil_puts(self, faults: Mapping[str, Fault]) -> None:
        """For each end of a path every PUT to it, until `heal`: a client may try again by itself."""
        with self._lock:
            self._at = dict(faults)

    def spoil_at_random(self, rate: float, seed: int, faults: tuple[Fault, ...] = PASSING, methods: Collection[str] = METHODS) -> None:
        """Each request with probability `rate`, until `heal`."""
        with self._lock:
            self._dice = (random.Random(seed), rate, faults, methods)

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._next = self._dice = None
            self._at = {}

    @contextmanager
    def log(self) -> Iterator[list[Request]]:
        """The requests from here to the end of the block."""
        with self._lock:
            self.requests = here = []
        yield here
        with self._lock:
            self.requests = []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            fault = self._meant_for(method, path) or self._draw(method)
            self.requests.append(Request(method, path, fault, headers))
        return fault

    def _meant_for(self, method: str, path: str) -> Fault | None:
        end = next((end for end in self._at if method == "PUT" and urlsplit(path).path.endswith(end)), None)
        return None if end is None else self._at[end]

    def _draw(self, method: str) -> Fault | None:
        if self._next is not None and self._next[1] > 0 and method in self._next[2]:
            fault, times, methods = self._next
            self._next = (fault, times - 1, methods)
            return fault
        if self._dice is not None:
            dice, rate, faults, methods = self._dice
            if method in methods and dice.random() < rate:
                return dice.choice([fault for fault in faults if method == "PUT" or fault not in UPLOADS_ONLY])
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *args: object) -> None:
        """The log is `Proxy.requests`."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client was killed, or gave up
            self.close_connection = True

    def serve(self) -> None:
        fault = self.proxy.take_fault(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        num_bytes = int(self.headers.get("Content-Length") or 0)
        if fault is Fault.RESET:
            self.rfile.read(num_bytes // 2)
            return self.reset()
        body = self.rfile.read(num_bytes)
        if fault is Fault.HANG:
            time.sleep(self.proxy.hang_s)
            return self.reset()
        if fault in STATUSES:
            return self.refuse(fault)
        return self.forward(body, fault)

    def refuse(self, fault: Fault) -> None:
        """As S3 does, which likes to quote the key's name and what was signed."""
        key = (self.headers.get("Authorization") or "").partition("Credential=")[2].partition("/")[0]
        document = (
            f"<?xml version='1.0'?><Error><Code>{fault}</Code><Message>injected</Message>"
            f"<AWSAccessKeyId>{key}</AWSAccessKeyId><StringToSign>{self.headers.get('Authorization')}</StringToSign></Error>"
        ).encode()
        self.answer(STATUSES[fault], [("Content-Type", "application/xml")], document, len(document))

    def forward(self, body: bytes, fault: Fault | None) -> None:
        parts = urlsplit(f"//{self.proxy.target}")
        server = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in NOT_FORWARDED:
                server.putheader(name, value)
        if fault is Fault.TORN and body:
            server.endheaders(body[: len(body) // 2])
            _break(server.sock)
            return self.reset()
        server.endheaders(body or None)
        reply = server.getresponse()
        data = reply.read()
        server.close()
        if fault is Fault.LOST_REPLY:
            return self.reset()
        headers = [(name, value) for name, value in reply.getheaders() if name.lower() not in NOT_RETURNED]
        num_bytes = int(reply.getheader("Content-Length") or 0) if self.command == "HEAD" else len(data)
        if fault is Fault.TRUNCATED and data:
            self.answer(reply.status, headers, data[: len(data) // 2], num_bytes)
            return self.reset()
        return self.answer(reply.status, headers, data, num_bytes)

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, num_bytes: int) -> None:
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(num_bytes))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()

    def reset(self) -> None:
        _break(self.connection)
        self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve


def _break(connection: socket.socket) -> None:
    """Close with RST, as a dying peer does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
