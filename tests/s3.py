"""An S3 server on loopback, moto's, behind a proxy that can fail or be slow on request."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

# What a request meets: given its method and path, an HTTP status to answer with, or None to pass it on.
Trouble = Callable[[str, str], int | None]

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "loopback",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-but-never-printed",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We are sorry.</Message></Error>"


def none(method: str, path: str) -> None:
    """No trouble."""


class Store:
    """The server.

    Attributes:
        endpoint: its URL.
        requests: (method, path) of all that came.
        trouble: what requests meet.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.requests: list[tuple[str, str]] = []
        self.trouble: Trouble = none

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it: the usual variables."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.endpoint}


@contextmanager
def s3_server() -> Iterator[Store]:
    """The store, until the block ends."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    inner = moto.get_host_and_port()
    store = Store("")

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            store.requests.append((self.command, self.path))
            if status := store.trouble(self.command, self.path):
                self._answer(status, {}, b"" if self.command == "HEAD" else _ERROR)
                return
            connection = http.client.HTTPConnection(*inner, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            self._answer(response.status, dict(response.getheaders()), response.read())
            connection.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            length = headers.get("Content-Length", headers.get("content-length")) if self.command == "HEAD" else None
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    store.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()


def slow(seconds: float) -> Trouble:
    """Every request waits."""

    def trouble(method: str, path: str) -> None:
        time.sleep(seconds)

    return trouble


def failing(every: int, status: int = 500) -> Trouble:
    """Every so many-th request fails."""
    lock, count = threading.Lock(), 0

    def trouble(method: str, path: str) -> int | None:
        nonlocal count
        with lock:
            count += 1
            return status if count % every == 0 else None

    return trouble
