"""The report of a run while it trains, for a browser on the same machine: `sdd train --live`.

A thread answers requests on 127.0.0.1. It makes no page itself: when a browser asks, and the run has gone on, it starts
a process of the lowest priority that writes RUN/report.html, and answers with the page there is. So training waits for
nothing, and without a browser there is no work. Only "/" is answered, and only to who calls this machine by its own
name: a foreign Host header means that a page from elsewhere had its name rebound to this address.
"""

import base64
import hashlib
import html
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from sdd.errors import UserError
from sdd.report.extras import require_report_extra

HOST, PORT = "127.0.0.1", 8765
#: Seconds between the beginnings of two pages: at least so many, and so many times what the last one took.
SECONDS_BETWEEN, TIMES_THE_LAST = 5.0, 3.0
#: How long the end of a run waits until a browser has fetched the last page; live.js asks every four seconds.
LINGER = 12.0
_SOURCES = ("config.json", "environment.json", "metrics.jsonl", "probe.jsonl", "samples.jsonl", "result.json")
_SCRIPT = (Path(__file__).parent / "templates" / "live.js").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    f"form-action 'none'; script-src 'sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}'"
)
_EMPTY = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sdd</title></head><body><p>{}</p></body></html>'
)

#: Name, size and time of the files of a run.
_State = tuple[tuple[str, int, int], ...]


class LivePage:
    """Serves one run's report on 127.0.0.1.

    Args:
        port: 0 for 8765, or any free one if that is taken.

    Attributes:
        url: what to open.

    Raises:
        UserError: if the port cannot be had, or the extra `report` is not installed.
    """

    def __init__(self, port: int = 0) -> None:
        require_report_extra()
        self._server = _bound(port)
        self.url = f"http://{HOST}:{self._server.server_port}"

    @contextmanager
    def serving(self, run: Path) -> Iterator[None]:
        """Serve the report of the run in that directory; then, to a browser that looks on, its last state."""
        maker = _Maker(run)
        self._server.maker = maker
        thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="live page", daemon=True)
        thread.start()
        try:
            yield
        finally:
            try:
                maker.finish()
            finally:
                self._server.shutdown()
                self._server.server_close()


class _Maker:
    """The page there is, and the process that makes the next one."""

    def __init__(self, run: Path) -> None:
        self._run, self._page = run, run / "report.html"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._began, self._took, self._problem = -math.inf, 0.0, ""
        #: States of the run: of the page that is being made, of the one there is, of the one that was fetched last.
        self._making_of: _State = ()
        self._made_of: _State = ()
        self._fetched_of: _State = ()
        self._asked = -math.inf

    def page(self) -> tuple[str, str]:
        """The page, and a tag that changes with it; begins to make a newer one if there is something to show."""
        with self._lock:
            self._asked = time.monotonic()
            self._collect()
            newest = self._state()
            wait = max(SECONDS_BETWEEN, TIMES_THE_LAST * self._took)
            if self._process is None and newest != self._made_of and time.monotonic() - self._began > wait:
                self._start(newest)
            self._fetched_of = self._made_of if self._process is None else ()
            try:
                text = self._page.read_text(encoding="utf-8") if self._made_of else ""
            except OSError as error:
                text, self._problem = "", str(error)
        if not text:
            text = _EMPTY.format(
                html.escape(f"No page: {self._problem}" if self._problem else "The page is being made …")
            )
        return text, f'"{hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]}"'

    def finish(self) -> None:
        """Make the last page and wait until it was fetched, if somebody looks on; in any case end the process."""
        if time.monotonic() - self._asked < LINGER:
            until = time.monotonic() + LINGER
            while time.monotonic() < until and self._fetched_of != self._state() and not self._problem:
                with self._lock:
                    self._collect()
                    if self._process is None and self._made_of != self._state():
                        self._start(self._state())
                time.sleep(0.1)
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()

    def _state(self) -> _State:
        """Changes whenever a file that is drawn does."""
        found = []
        for name in _SOURCES:
            try:
                status = (self._run / name).stat()
            except OSError:
                continue
            found.append((name, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _start(self, state: _State) -> None:
        self._began, self._making_of = time.monotonic(), state
        command = [sys.executable, "-m", "sdd.report.serve", str(self._run), str(self._page)]
        alone = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                command,
                env=alone,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the training
            )
        except OSError as error:
            self._problem = str(error)

    def _collect(self) -> None:
        """Take the page of a process that has ended."""
        if self._process is None or self._process.poll() is None:
            return
        _, complaint = self._process.communicate()
        self._problem = "" if self._process.returncode == 0 else (complaint.strip().splitlines() or ["?"])[-1]
        self._took = time.monotonic() - self._began
        if not self._problem:
            self._made_of = self._making_of
        self._process = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    maker: _Maker

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # of a connection that says nothing

    def do_GET(self) -> None:
        """Answer with the page."""
        server = cast(_Server, self.server)
        port = server.server_port
        own = {f"{HOST}:{port}", f"localhost:{port}"}
        if self.headers.get("Host") not in own or self.headers.get("Origin", f"http://{HOST}:{port}")[7:] not in own:
            self.send_error(403, "Open the address that the command printed")
            return
        if self.path != "/":
            self.send_error(404)
            return
        text, tag = server.maker.page()
        if self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        body = text.replace("</body>", f"<script>{_SCRIPT}</script></body>").encode("utf-8", errors="replace")
        self.send_response(200)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("ETag", tag),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the screen is the training's."""


def _bound(port: int) -> _Server:
    """A server on that port; 0 for the usual one, or a free one."""
    try:
        return _Server((HOST, port or PORT), _Handler)
    except OSError as error:
        if port:
            raise UserError(f"port {port} cannot be had ({error.strerror}): name another, --live PORT") from None
    return _Server((HOST, 0), _Handler)


def main() -> None:
    """Write one page, at the lowest priority: `python -m sdd.report.serve RUN PAGE`."""
    if hasattr(os, "nice"):
        os.nice(19)
    from sdd.report import html as page
    from sdd.report.page import render
    from sdd.report.runs import load_runs

    run, out = map(Path, sys.argv[1:])
    page.write_page(out, render(load_runs([run])))


if __name__ == "__main__":
    main()
