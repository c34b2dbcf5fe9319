"""A server on loopback in this process that hands every request to a function."""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Handler = BaseHTTPRequestHandler


class Loopback:
    """`answer(handler)` is called for each request, in a thread of its connection; idle ones end after `idle_s`.

    `connections` that are open; `opened` counts all of them. A server that is started again has the same port.
    """

    def __init__(self, answer: Callable[[Handler], object], idle_s: float | None = None):
        self.answer, self.idle_s = answer, idle_s
        self.connections: set[socket.socket] = set()
        self.port = self.opened = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        outer = self

        class Requests(Handler):
            protocol_version = "HTTP/1.1"
            timeout = outer.idle_s

            def log_message(self, *args):
                pass

            def setup(self):
                super().setup()
                outer.connections.add(self.connection)
                outer.opened += 1

            def finish(self):
                outer.connections.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def do_POST(self):
                outer.answer(self)

            do_GET = do_POST

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # of 5 connections that wait, a busy machine loses some
            daemon_threads = True

            def handle_error(self, *args):  # a client that has hung up
                pass

        self.httpd = Server(("127.0.0.1", self.port), Requests)
        self.port = self.httpd.server_address[1]
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go away: no new connections, and those that are open are cut."""
        self.httpd.shutdown()
        self.httpd.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()


def body_of(handler: Handler) -> bytes:
    return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))


def cut(handler: Handler) -> None:
    """End the connection without a response."""
    handler.close_connection = True
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)


def send(handler: Handler, status: int, data, headers=(), kind: str = "application/json") -> bool:
    """Send bytes or what becomes JSON; whether the response could be handed to the network."""
    payload = data if isinstance(data, bytes) else json.dumps(data).encode()
    try:
        handler.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(payload))} | dict(headers)).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(payload)
        handler.wfile.flush()
    except OSError:  # the client has hung up
        handler.close_connection = True
        return False
    return True


class Serving:
    """A server that answers on a loopback address while it is entered; `path` is that of its url."""

    path = "/v1"

    def __init__(self):
        self.keys: set[str] = set()  # with which it was asked
        self.lock = threading.Lock()
        self.loopback = Loopback(self.answer)

    def answer(self, handler: Handler) -> object:
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"{self.loopback.url}{self.path}"

    def __enter__(self):
        self.loopback.start()
        return self

    def __exit__(self, *exc):
        self.loopback.stop()
