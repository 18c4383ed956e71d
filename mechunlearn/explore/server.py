"""The explorer as a page of this machine: one process, one address, nothing outside."""

import errno
import html
import ipaddress
import json
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mechunlearn.errors import MechunlearnError
from mechunlearn.explore.pages import served_page
from mechunlearn.explore.state import Workbench

LOOPBACK, PORT = "127.0.0.1", 8765
MESSAGE = 1 << 16  # bytes


class ExplorerServer(ThreadingHTTPServer):
    """A page for one workbench; `url` has the key without which nothing is answered.

    The port is opened when the server is made, so that a mistake shows before a model is loaded; `show` answers until
    Ctrl-C.
    """

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, host: str = LOOPBACK, port: int = PORT, remote: bool = False) -> None:
        """Open the port.

        Args:
            host: Address of this machine.
            port: Port; 0 for any that is free.
            remote: Allow an address that other machines can reach.

        Raises:
            MechunlearnError: Other machines can reach the address and `remote` is not given, or the port is taken.
        """
        if not remote and not _is_loopback(host):
            raise MechunlearnError(
                f"The address '{host}' can be reached from other machines. Expected {LOOPBACK}; if others shall see "
                "your model "
                "and facts, say so with --remote."
            )
        self.remote, self.key, self.turn = remote, secrets.token_urlsafe(16), threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "another program uses it" if taken else (error.strerror or str(error)).lower()
            raise MechunlearnError(
                f"Cannot open port {port} of {host}: {why}. Give another with --port, or --port 0 for any that is free."
            ) from None
        named = f"[{host}]" if ":" in host else host
        self.hosts = {f"{name}:{self.server_port}" for name in (named, LOOPBACK, "localhost")}
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else named
        self.url = f"http://{shown}:{self.server_port}/?key={self.key}"

    @contextmanager
    def page_for_the_browser(self) -> Iterator[str]:
        """Give the address of a file that leads to the page, readable by its owner alone, within the block.

        A program's arguments can be seen by all users of a machine, and a browser is started with an address.
        """
        with tempfile.TemporaryDirectory(prefix="explorer-") as folder:  # of mode 700
            page = Path(folder) / "explorer.html"
            page.write_text(f'<meta http-equiv="refresh" content="0; url={html.escape(self.url)}">', encoding="utf-8")
            yield page.as_uri()

    def show(self, bench: Workbench) -> None:
        """Answer until the program is ended.

        Args:
            bench: What does the work.
        """
        self.bench = bench
        self.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer

    def do_GET(self) -> None:
        if self.path != f"/?key={self.server.key}" or not self._known_host():
            return self._refuse()
        with self.server.turn:
            view = self.server.bench.view()
        return self._send(served_page(view, self.server.key).encode(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        given = self.headers.get("X-Explorer-Key", "")
        size = self.headers.get("Content-Length", "")
        if (
            self.path != "/act"
            or not self._known_host()
            or not secrets.compare_digest(given.encode(), self.server.key.encode())
        ):
            return self._refuse()
        if not size.isdecimal() or int(size) > MESSAGE:
            return self._refuse(400)
        try:
            message = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            return self._refuse(400)
        with self.server.turn:
            view = self.server.bench.act(message if isinstance(message, dict) else {})
        return self._send(json.dumps(view).encode(), "application/json")

    def _known_host(self) -> bool:
        """A page of another name that points here (DNS rebinding) is not answered."""
        return self.server.remote or self.headers.get("Host", "") in self.server.hosts

    def _refuse(self, code: int = 403) -> None:
        self._send(b"Open the address that mechunlearn explore printed.", "text/plain", code)

    def _send(self, body: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src "
            "data:; frame-ancestors 'none'",
        )
        with suppress(ConnectionError):  # the tab was closed
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged: the console belongs to the command."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
