import http.client
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdd.commands.train import parse
from sdd.errors import UserError
from sdd.report import serve
from sdd.report.serve import HOST, LivePage

MakeRun = Callable[..., Path]
Answer = tuple[int, dict[str, str], str]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the drawing process by one that writes the size of the metrics; returns the runs it was started for."""
    started: list[Path] = []

    class Copy:
        returncode = 0

        def __init__(self, command: list[str], **_: object) -> None:
            run, page = map(Path, command[-2:])
            started.append(run)
            page.write_text(f"<html><body>{len((run / 'metrics.jsonl').read_text())}</body></html>")

        def poll(self) -> int:
            return 0

        def communicate(self) -> tuple[None, str]:
            return None, ""

        def kill(self) -> None: ...

    monkeypatch.setattr(serve.subprocess, "Popen", Copy)
    monkeypatch.setattr(serve, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(serve, "TIMES_THE_LAST", 0.0)  # a busy machine may take long to notice the last page
    monkeypatch.setattr(serve, "LINGER", 0.5)
    return started


@pytest.fixture
def live() -> Iterator[LivePage]:
    page = LivePage(0)
    yield page
    page._server.server_close()


def ask(live: LivePage, path: str = "/", method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection(HOST, int(live.url.rsplit(":", 1)[1]), timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def test_without_a_browser_nothing_is_drawn(made: list[Path], live: LivePage, make_run: MakeRun) -> None:
    began = time.monotonic()
    with live.serving(make_run("a")):
        pass
    assert made == []
    assert time.monotonic() - began < 2


def test_page_follows_the_run_and_is_made_only_when_it_has_gone_on(
    made: list[Path], live: LivePage, make_run: MakeRun
) -> None:
    run = make_run("a")
    size = (run / "metrics.jsonl").stat().st_size
    with live.serving(run):
        assert "Making the page" in ask(live)[2]
        status, headers, text = ask(live)
        assert (status, str(size) in text) == (200, True)
        assert ask(live, If_None_Match=headers["etag"])[0] == 304
        assert len(made) == 1
        with (run / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        ask(live)
        assert str(size + 3) in ask(live)[2]
        assert len(made) == 2


def test_open_browser_gets_the_last_state(made: list[Path], live: LivePage, make_run: MakeRun) -> None:
    run = make_run("a")
    with live.serving(run):
        ask(live)
        (run / "result.json").write_text("{}")
    assert len(made) == 2
    with pytest.raises(OSError):
        ask(live)


def test_only_this_machine_is_answered(made: list[Path], live: LivePage, make_run: MakeRun) -> None:
    port = live.url.rsplit(":", 1)[1]
    with live.serving(make_run("a")):
        assert live._server.server_address[0] == "127.0.0.1"
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
            assert ask(live, Host=host)[0] == 403
        for origin in ("http://evil.example", "null"):
            assert ask(live, Origin=origin)[0] == 403
        assert made == []
        for name in ("localhost", "127.0.0.1"):
            assert ask(live, Host=f"{name}:{port}", Origin=f"http://{name}:{port}")[0] == 200


def test_only_the_page_is_served(made: list[Path], live: LivePage, make_run: MakeRun) -> None:
    with live.serving(make_run("a")):
        for path in ("/config.json", "/../config.json", "/?x", "/%2e%2e/config.json"):
            assert ask(live, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(live, method=method)[0] == 501
    assert made == []


def test_page_may_load_nothing_and_be_read_by_no_other(made: list[Path], live: LivePage, make_run: MakeRun) -> None:
    with live.serving(make_run("a")):
        headers = ask(live)[1]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


def test_error_of_the_drawing_process_is_shown(
    made: list[Path], live: LivePage, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no <memory> for a process")

    monkeypatch.setattr(serve.subprocess, "Popen", refuse)
    with live.serving(make_run("a")):
        ask(live)
        assert "no &lt;memory&gt; for a process" in ask(live)[2]


def test_failing_run_leaves_nothing_behind(made: list[Path], live: LivePage, make_run: MakeRun) -> None:
    with pytest.raises(ZeroDivisionError), live.serving(make_run("a")):
        raise ZeroDivisionError
    with pytest.raises(OSError):
        ask(live)


def test_port_given_must_be_free_and_the_usual_one_is_replaced(live: LivePage) -> None:
    port = int(live.url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"port {port} is not free"):
        LivePage(port)
    other = LivePage(0)
    assert other.url != live.url
    other._server.server_close()


def test_command_takes_a_port_or_none() -> None:
    assert [parse(["nano", *words])[1].live for words in ([], ["--live"], ["--live", "9000"])] == [None, 0, 9000]
    for port in ("0", "65536", "x"):
        with pytest.raises(UserError, match="from 1 to 65,535"):
            parse(["nano", "--live", port])
