"""A server between a client and an S3 server, which answers as a bad day would have it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REFUSED = "<Error><Code>{}</Code><Message>as asked for</Message></Error>"


class FaultyStorage:
    """Passes requests on, unless `behaviour(method, path, number)` says otherwise.

    It gives None: pass on; a number: answer with that status; "stall": never answer; "cut": send half of the body and hang up;
    "short": say and send half of the body. `number` counts the requests of that method and path.
    """

    def __init__(self, behind: str) -> None:
        self.behaviour: Callable[[str, str, int], int | str | None] = lambda method, path, number: None
        self.asked: list[tuple[str, str]] = []
        self._behind, self._ended = urlsplit(behind), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def _any(self):
                outer._answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        number = self.asked.count((handler.command, path))
        self.asked.append((handler.command, path))
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        what = self.behaviour(handler.command, path, number)
        handler.close_connection = True
        if what == "stall":
            self._ended.wait(20)
            return
        if isinstance(what, int):
            text = REFUSED.format({403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}.get(what, "InternalError")).encode()
            self._send(handler, what, {"Content-Type": "application/xml"}, text)
            return
        connection = http.client.HTTPConnection(self._behind.hostname or "", self._behind.port, timeout=20)
        connection.request(handler.command, handler.path, body, dict(handler.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        headers = {
            name: value for name, value in answer.getheaders() if name.lower() not in ("content-length", "connection", "transfer-encoding")
        }
        if handler.command == "HEAD":
            handler.send_response(answer.status)
            for name, value in answer.getheaders():
                handler.send_header(name, value)
            handler.end_headers()
            return
        self._send(handler, answer.status, headers, data[: len(data) // 2] if what == "short" else data, cut=what == "cut")

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[: len(data) // 2] if cut else data)
            handler.wfile.flush()
        time.sleep(0.01 if cut else 0)
