"""A loopback proxy in front of a local S3 server that loses, refuses, delays and cuts chosen calls."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("throttled", "reset", "answer lost", "conflict", "own retry refused", "answer late")
SILENT = "no bytes"
"""Beside them: the connection stays open, the call is not made, and nothing is ever answered."""
_CODES = {"throttled": (503, "SlowDown"), "conflict": (409, "ConditionalRequestConflict")}


NAME = "AWS4-HMAC-SHA256 Credential=a/20261122/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def speak_s3(headers: Message) -> None:
    """Put a call of the client for gs into the words of S3: its condition, and who it comes from."""
    if headers.get("Authorization", "").startswith("AWS4"):
        return
    del headers["Authorization"]
    headers["Authorization"] = NAME
    if headers.get("x-goog-if-generation-match") == "0":
        headers["If-None-Match"] = "*"


class FaultProxy(ThreadingHTTPServer):
    """Forward HTTP to a local port, with a fault where asked.

    Args:
        upstream: Port of the real server.
        choose: Returns a fault of `FAULTS`, or None, for the number of a call, counted from 1.
        late_s: How long a late answer takes; longer than the client waits.
    """

    daemon_threads = True

    def __init__(self, upstream: int, choose: Callable[[int], str | None], late_s: float = 2.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.choose, self.late_s = upstream, choose, late_s
        self.num_calls = self.num_faults = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def restart(self, choose: Callable[[int], str | None]) -> None:
        """Count from the beginning, with other faults."""
        with self.lock:
            self.choose, self.num_calls, self.num_faults = choose, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        with self.lock:
            self.num_calls += 1
            fault = self.choose(self.num_calls)
            self.num_faults += fault is not None
            return fault

    def handle_error(self, request, client_address) -> None:
        """Say nothing about connections that were cut on purpose."""

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""

    def _serve(self) -> None:
        speak_s3(self.headers)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.next_fault()
        if fault in _CODES:
            self._answer(*_CODES[fault])
        elif fault == SILENT:
            self.server.closing.wait()
        elif fault == "reset":
            self.close_connection = True
        else:
            self._forward(body, fault)

    def _forward(self, body: bytes, fault: str | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if fault == "answer lost":
            self.close_connection = True
        elif fault == "own retry refused" and self.headers.get("If-None-Match"):
            self._answer(412, "PreconditionFailed")
        else:
            if fault == "answer late":
                self.server.closing.wait(self.server.late_s)
            self._relay(response, content)

    def _relay(self, response: http.client.HTTPResponse, content: bytes) -> None:
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>made up</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve
