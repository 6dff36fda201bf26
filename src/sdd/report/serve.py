"""Serve the report of a run while it trains, to browsers on the same machine: `sdd train --live`.

A thread answers requests on 127.0.0.1. It draws nothing itself: when a browser asks and the run has gone on, it starts
a process of the lowest priority that writes RUN/report.html, and answers with the latest page. So training never waits,
and without a browser there is no work. Only "/" is answered, and only if the Host header names this machine: a foreign
name means that a web page had its own name rebound to this address.
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
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from sdd.errors import UserError
from sdd.report import require_report_extra

HOST, PORT = "127.0.0.1", 8765
#: Least time between the starts of two pages: in seconds, and as a multiple of the time that the last one took.
SECONDS_BETWEEN, TIMES_THE_LAST = 5.0, 3.0
#: Seconds that the end of a run waits for a browser to fetch the last page; live.js asks every four seconds.
LINGER = 12.0
_SOURCES = ("config.json", "environment.json", "metrics.jsonl", "probe.jsonl", "samples.jsonl", "result.json")
_SCRIPT = (Path(__file__).parent / "templates" / "live.js").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    f"form-action 'none'; script-src 'sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}'"
)
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
_EMPTY = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>sdd</title></head><body><p>{}</p></body></html>'
)

#: Name, size and time of the files of a run.
_State = tuple[tuple[str, int, int], ...]


class LivePage:
    """Serves one run's report on 127.0.0.1.

    Args:
        port: 0 for 8765, or any free port if that is taken.

    Attributes:
        url: the address to open.

    Raises:
        UserError: if the port is taken, or the extra `report` is not installed.
    """

    def __init__(self, port: int = 0) -> None:
        require_report_extra()
        try:
            self._server = _Server((HOST, port or PORT), _Handler)
        except OSError as error:
            if port:
                raise UserError(f"port {port} is not free ({error.strerror}): name another, --live PORT") from None
            self._server = _Server((HOST, 0), _Handler)
        self.url = f"http://{HOST}:{self._server.server_port}"

    @contextmanager
    def serving(self, run: Path) -> Iterator[None]:
        """Serve the report of the run in that directory; at the end, give an open browser the last state."""
        maker = self._server.maker = _Maker(run)
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
    """Holds the latest page, and the process that makes the next one."""

    def __init__(self, run: Path) -> None:
        self._run, self._page = run, run / "report.html"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._asked = self._began = -math.inf
        self._took, self._problem = 0.0, ""
        #: States of the run: of the page in the making, of the latest page, of the page fetched last.
        self._making_of: _State = ()
        self._made_of: _State = ()
        self._fetched_of: _State = ()

    def page(self) -> tuple[str, str]:
        """Return the latest page and a tag that changes with it; start a newer one if the run has gone on."""
        with self._lock:
            self._asked = time.monotonic()
            self._renew()
            self._fetched_of = self._made_of if self._process is None else ()
            try:
                text = self._page.read_text(encoding="utf-8") if self._made_of else ""
            except OSError as error:
                text, self._problem = "", str(error)
        if not text:
            text = _EMPTY.format(html.escape(f"No page: {self._problem}" if self._problem else "Making the page …"))
        return text, f'"{hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]}"'

    def finish(self) -> None:
        """If a browser is open, make the last page and wait until it is fetched; in any case end the process."""
        if time.monotonic() - self._asked < LINGER:
            until = time.monotonic() + LINGER
            while time.monotonic() < until and self._fetched_of != self._state() and not self._problem:
                with self._lock:
                    self._renew(at_once=True)
                time.sleep(0.1)
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()

    def _renew(self, at_once: bool = False) -> None:
        """Take the page of a process that has ended, and start the next one if it is due and the run has gone on."""
        if self._process is not None and self._process.poll() is not None:
            _, complaint = self._process.communicate()
            self._problem = (complaint.strip().splitlines() or ["?"])[-1] if self._process.returncode else ""
            self._took = time.monotonic() - self._began
            self._made_of = self._made_of if self._problem else self._making_of
            self._process = None
        pause = 0 if at_once else max(SECONDS_BETWEEN, TIMES_THE_LAST * self._took)
        newest = self._state()
        if self._process is None and newest != self._made_of and time.monotonic() - self._began > pause:
            self._start(newest)

    def _state(self) -> _State:
        """Return a value that changes whenever a file of the run does."""
        found = []
        for name in _SOURCES:
            with suppress(OSError):
                status = (self._run / name).stat()
                found.append((name, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _start(self, state: _State) -> None:
        self._began, self._making_of = time.monotonic(), state
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sdd.report.serve", str(self._run), str(self._page)],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the training
            )
        except OSError as error:
            self._problem = str(error)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    maker: _Maker

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: browsers hang up all the time."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds for a connection that sends nothing

    def do_GET(self) -> None:
        """Answer with the page."""
        server = cast(_Server, self.server)
        own = {f"{name}:{server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in own or (origin is not None and origin.removeprefix("http://") not in own):
            self.send_error(403, "Open the address that the command printed")
        elif self.path != "/":
            self.send_error(404)
        else:
            self._answer(*server.maker.page())

    def _answer(self, text: str, tag: str) -> None:
        if self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        body = text.replace("</body>", f"<script>{_SCRIPT}</script></body>").encode("utf-8", errors="replace")
        self.send_response(200)
        for name, value in {**_HEADERS, "Content-Length": str(len(body)), "ETag": tag}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the screen belongs to the training."""


def main() -> None:
    """Write one page, at the lowest priority: `python -m sdd.report.serve RUN PAGE`."""
    if hasattr(os, "nice"):
        os.nice(19)
    from sdd.report import html as pages
    from sdd.report.page import render
    from sdd.report.runs import load_runs

    run, page = map(Path, sys.argv[1:])
    pages.write_page(page, render(load_runs([run])))


if __name__ == "__main__":
    main()
