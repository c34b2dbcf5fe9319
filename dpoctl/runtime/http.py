"""JSON over HTTP/1.1 to one server, from several threads; waiting for answers and retries. Standard library only."""

import json
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from datetime import timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import InputError
from . import signals

_CONNECT_S = 20.0  # nothing ends this wait earlier: a signal may have to wait for it
_POLL_S = 0.2  # how often signals are looked for while requests are in flight
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_RETRY_AFTER_S = 0.5, 30.0, 60.0
_SHORTEST_SECRET = 8  # a shorter key, such as EMPTY for a local server, is no secret
_CERTIFICATE = "SSL_CERT_FILE names a file of certificates to trust"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
T = TypeVar("T")


class NoResponse(Exception):
    """The server could not be reached, or the connection ended before its response."""


class Response(NamedTuple):
    """A response of any status; `headers` with names in lower case. `fresh`: its connection was opened for it."""

    status: int
    headers: dict[str, str]
    text: str
    fresh: bool


class Http:
    """Requests to the server at `url` (http://host:port/path), with a connection for each thread that is kept open.

    A request takes at most `timeout_s` without a sign of the server. The proxies of the environment (HTTP_PROXY,
    HTTPS_PROXY, NO_PROXY) are used, but for this machine's own address. Raises InputError for a malformed address.
    """

    def __init__(self, url: str, timeout_s: float, key: str = "", timeout_flag: str = "--timeout"):
        """`timeout_flag`: the option that gives the time, for messages; empty where none does."""
        self.url, self.timeout_s, self.timeout_flag = url.rstrip("/"), timeout_s, timeout_flag
        self.key = key.strip()
        try:
            parts = urlsplit(self.url)
            self.host, self.port = parts.hostname or "", parts.port
            self.host.encode("idna")
            parts.path.encode("ascii")
        except ValueError as e:
            raise InputError(f"{url}: not an address: {e}") from None
        if parts.scheme not in ("http", "https") or not self.host:
            raise InputError(f"{url}: expected an address such as http://localhost:8000")
        if parts.username or parts.query:  # it would be written into manifests and messages
            raise InputError(f"{parts.scheme}://{self.host}: an address without a user, a key or a query is expected")
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"{self.url}: the key in the environment has characters that a header cannot hold")
        self.is_https, self.path = parts.scheme == "https", parts.path
        self.context = ssl.create_default_context() if self.is_https else None
        self.proxy = "" if self.host in _LOOPBACK or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme, "")
        self.local = threading.local()
        self.lock = threading.Lock()
        self.open: set[HTTPConnection] = set()

    def get(self, path: str) -> Response:
        """GET of a path below the server's. Raises NoResponse, and InputError for a certificate that is not trusted."""
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Response:
        """POST of a JSON object to a path below the server's. Raises as get does."""
        return self._request("POST", path, json.dumps(body).encode())

    def abort(self) -> None:
        """Close every connection: requests in flight in other threads raise NoResponse."""
        with self.lock:
            for connection in self.open:
                with suppress(OSError, AttributeError):  # the connection is just being made or closed
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _request(self, method: str, path: str, body: bytes | None) -> Response:
        used: HTTPConnection | None = getattr(self.local, "connection", None)
        if used is not None and (used.sock is None or _is_readable(used.sock)):
            self._close(used)  # servers close a connection that was idle for some seconds
            used = None
        connection = used or self._connect()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "dpoctl"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        target = self.path + path
        if self.proxy and not self.is_https:
            target = self.url + path
        try:
            if connection.sock is None:
                self._open(connection)
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except TimeoutError:
            self._close(connection)
            within = f"{self.timeout_flag} {self.timeout_s:g} s".lstrip()
            raise NoResponse(f"no response within {within}") from None
        except ssl.SSLCertVerificationError as e:
            self._close(connection)
            raise InputError(f"{self.url}: its certificate is not trusted: {e.verify_message}", _CERTIFICATE) from None
        except (OSError, HTTPException) as e:
            self._close(connection)
            raise NoResponse(f"{type(e).__name__} ({str(e)[:160]})" if str(e) else type(e).__name__) from None
        if response.will_close:
            self._close(connection)
        return Response(response.status, {k.lower(): v for k, v in response.headers.items()}, text, used is None)

    def _connect(self) -> HTTPConnection:
        proxy = urlsplit(self.proxy if "://" in self.proxy else f"http://{self.proxy}") if self.proxy else None
        host, port = (proxy.hostname or "", proxy.port) if proxy else (self.host, self.port)
        connection: HTTPConnection
        if self.is_https:
            connection = HTTPSConnection(host, port, context=self.context)
            if proxy:
                connection.set_tunnel(self.host, self.port)
        else:
            connection = HTTPConnection(host, port)
        self.local.connection = connection
        with self.lock:
            self.open.add(connection)
        return connection

    def _open(self, connection: HTTPConnection) -> None:
        connection.timeout = min(_CONNECT_S, self.timeout_s)
        try:
            connection.connect()
        except TimeoutError:
            self._close(connection)
            raise NoResponse(f"no connection within {connection.timeout:g} s") from None
        connection.sock.settimeout(self.timeout_s)

    def _close(self, connection: HTTPConnection) -> None:
        connection.close()
        self.local.connection = None
        with self.lock:
            self.open.discard(connection)

    def close(self) -> None:
        """Close the connections. No request is in flight."""
        with self.lock:
            for connection in self.open:
                connection.close()
            self.open.clear()


def _is_readable(sock: socket.socket) -> bool:
    """Whether a kept connection, on which no request waits, has something to read: the server has closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def as_completed(requests: Iterable[Future[T]], done: str) -> Iterator[Future[T]]:
    """Requests in flight as they complete. Raises Interrupted where a signal arrives meanwhile, with what is `done`."""
    left = set(requests)
    while left:
        signals.at_boundary(done)
        completed, left = wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        yield from completed


def backoff_s(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 0): exponential, with jitter."""
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * (0.5 + random.random() / 2)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait, as a number or a date; at most a minute, 0 where it asks nothing."""
    value, milliseconds = headers.get("retry-after") or "", headers.get("retry-after-ms")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return 0.0
        seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time()
    return min(_LONGEST_RETRY_AFTER_S, seconds) if seconds > 0 else 0.0


def without_key(text: str, key: str) -> str:
    """The text without the key, which a server may repeat."""
    return text.replace(key, "[the key]") if len(key) >= _SHORTEST_SECRET else text
