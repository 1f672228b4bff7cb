"""A page served to browsers on this machine only."""

import functools
import http.server
import sys
from pathlib import Path

from jaxid.errors import OutputError

LOOPBACK = "127.0.0.1"


class _OnePage(http.server.BaseHTTPRequestHandler):
    """Answers with one file, whatever the path is."""

    def __init__(self, page: Path, *args: object):
        self.page = page
        super().__init__(*args)  # pyright: ignore[reportArgumentType] - what the server passes on

    def do_GET(self) -> None:
        found = self.path in ("/", f"/{self.page.name}")
        body = self.page.read_bytes() if found else b"There is one page: /"
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8" if found else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


def server(page: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of the page on the loopback interface.

    Args:
        page: the file; it is read anew for every request.
        port: of the server; 0 takes a free one.

    Raises:
        OutputError: if the port cannot be had.
    """
    try:
        return http.server.ThreadingHTTPServer((LOOPBACK, port), functools.partial(_OnePage, page))
    except OSError as error:
        raise OutputError(f"port {port} cannot be opened: {error.strerror}; give another --port.") from error


def serve(page: Path, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        OutputError: if the port cannot be had.
    """
    with server(page, port) as running:
        print(f"http://{LOOPBACK}:{running.server_port}/  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        running.serve_forever()
