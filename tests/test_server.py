"""An error of Visdom prints one line and does not stop or delay the run.

The servers here are stand-ins that answer as a test wants; real ones are in test_page.py.
"""

import contextlib
import http.server
import json
import re
import signal
import socketserver
import threading
from pathlib import Path

import pytest
import requests
from conftest import (
    QUICK,
    load_checkpoint,
    metrics,
    patient_post,
    port,
    run_script,
    succeeded,
    wait_for,
)

import main

WINDOWS = ["x", "x_hat", "loss", "traversal", "kl", "samples", "latent"]  # as they are sent


class StandIn:
    """A server that records the windows it gets. Its answers can be changed while it runs."""

    def __init__(self, url: str):
        self.url = url
        self.windows = []
        self.requests = 0
        self.status = 200
        self.failing = None  # the number of a request that gets an error
        self.answering = threading.Event()  # until it is set, windows get no answer
        self.answering.set()

    def handle(self, message: dict) -> int:
        """Returns the status of the answer."""
        self.requests += 1
        if "win" in message:
            self.windows.append(message["win"])
            self.answering.wait()
        return 500 if self.requests == self.failing else self.status


@contextlib.contextmanager
def listening(stand_in: StandIn):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(stand_in.handle(message))
            self.end_headers()

        def log_message(self, *_):
            pass

    socketserver.ThreadingTCPServer.allow_reuse_address = True
    address = "127.0.0.1", port(stand_in.url)
    with socketserver.ThreadingTCPServer(address, Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            stand_in.answering.set()
            server.shutdown()


@pytest.fixture
def server(url):
    """A stand-in that is there."""
    stand_in = StandIn(url)
    with listening(stand_in):
        yield stand_in


def patient_script(*script) -> None:
    """Run main.py with a client that waits longer, for start_main."""
    requests.Session.post = patient_post
    run_script(*script)


def the_line(result) -> str:
    """The only line of stderr of a run that has gone on."""
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("Visdom at ") and line.endswith("The run goes on.")
    return line


NOT_SHOWN = "The dashboard does not show the last epoch."


# ---- what is sent ----
@pytest.mark.usefixtures("patient")
def test_a_page_has_seven_windows(run_main, server):
    result = succeeded(run_main(f"{QUICK} --epochs 1 --visdom {server.url}"))
    assert server.windows[-7:] == WINDOWS and NOT_SHOWN not in result.stdout


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("typed", ["http://{}/", "http://{}/env/main", "{}", "{}/env/other"])
def test_the_address_of_a_page_or_without_http(run_main, server, typed):
    """Visdom 0.2.4 would take everything that is sent to /env/main/events, and show nothing."""
    address = typed.format(f"localhost:{port(server.url)}")
    result = succeeded(run_main(f"{QUICK} --epochs 1 --visdom {address}"))
    assert server.windows and f"Dashboard: {server.url}/env/main\n" in result.stdout


@pytest.mark.usefixtures("patient")
def test_a_local_server_ignores_proxies(run_main, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    succeeded(run_main(f"{QUICK} --epochs 1 --visdom {server.url}"))


@pytest.mark.usefixtures("patient")
def test_no_visdom_and_resuming_with_a_dashboard(run_main, a_run, server):
    assert "Dashboard" not in succeeded(run_main("--resume run --epochs 2")).stdout
    again = succeeded(run_main(f"--resume run --epochs 3 --visdom {server.url}"))
    assert "Dashboard" in again.stdout and server.windows
    assert load_checkpoint(a_run)["options"]["visdom"] == server.url


# ---- errors ----
@pytest.mark.parametrize("bad", ["http://localhost:port", "http://visdom.invalid:8097", "abc"])
def test_a_bad_address(run_main, tmp_path, monkeypatch, bad):
    monkeypatch.setenv("no_proxy", "*")
    result = run_main(f"{QUICK} --epochs 2 --run run --visdom {bad}")
    assert bad in the_line(result) and re.search("Error|Invalid", result.stderr)
    assert NOT_SHOWN in result.stdout and len(metrics(tmp_path / "run")) == 2


def test_a_server_with_errors(run_main, server):
    server.status = 500
    result = run_main(f"{QUICK} --epochs 2 --visdom {server.url}")
    assert server.url in the_line(result) and "500" in result.stderr
    assert NOT_SHOWN in result.stdout


def test_a_server_that_does_not_answer(run_main, server):
    server.answering.clear()
    result = run_main(f"{QUICK} --epochs 2 --visdom {server.url}")
    assert "timed out" in the_line(result) and NOT_SHOWN in result.stdout


@pytest.mark.usefixtures("patient")
def test_an_error_while_drawing(run_main, server, monkeypatch):
    monkeypatch.setattr(main.Dashboard, "draw_kl", lambda *_: 1 / 0)
    result = run_main(f"{QUICK} --epochs 3 --visdom {server.url}")
    assert "ZeroDivisionError" in the_line(result)


def test_a_server_that_does_not_start(run_main, url, monkeypatch):
    monkeypatch.setattr(main, "SERVER_SCRIPT", "raise SystemExit('broken')")
    result = run_main(f"{QUICK} --epochs 1 --visdom {url}")
    (log,) = re.findall(r"see (\S+\.log)", the_line(result))
    assert Path(log).read_text() == "broken\n"


# ---- recoveries ----
def test_every_series_of_errors_prints_one_line(start_main, server):
    process = start_main(f"{QUICK} --epochs 100000 --visdom {server.url}", patient_script)

    def errors() -> int:
        return process.err.read_text().count("The run goes on")

    wait_for(process.trained)
    for series in (1, 2):
        server.status = 500
        wait_for(lambda: errors() == series)  # noqa: B023
        failed = server.requests
        wait_for(lambda: server.requests > failed + 3)  # noqa: B023
        server.status = 200
        drawn = server.windows.count("latent")
        wait_for(lambda: server.windows.count("latent") > drawn + 1)  # noqa: B023
    assert errors() == 2


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("request_number", [1, 4], ids=["at the start", "in epoch 0"])
def test_a_dashboard_that_has_recovered_says_nothing_at_the_end(run_main, server, request_number):
    server.failing = request_number
    result = run_main(f"{QUICK} --epochs 20 --visdom {server.url}")
    assert "500" in the_line(result)
    assert NOT_SHOWN not in result.stdout and server.windows[-7:] == WINDOWS


# ---- a slow server ----
def test_a_slow_server_gets_the_newest_epoch_only(start_main, server):
    """While it draws epoch 0, five epochs are trained; only the last of them waits."""
    server.answering.clear()
    process = start_main(f"{QUICK} --epochs 5 --visdom {server.url}", patient_script)
    wait_for(lambda: server.windows and process.trained(5))
    server.answering.set()
    result = succeeded(process.finished())
    assert server.windows == 2 * WINDOWS and NOT_SHOWN not in result.stdout


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_end_does_not_wait_for_a_server_that_hangs(start_main, server, interrupted):
    """A finished run waits ten seconds for the last page, an interrupted one does not."""
    server.answering.clear()
    epochs = 100_000 if interrupted else 3
    process = start_main(f"{QUICK} --epochs {epochs} --visdom {server.url}", patient_script)
    wait_for(lambda: server.windows and process.trained(3))
    if interrupted:
        process.send(signal.SIGINT)
    result = process.finished()
    assert server.windows == WINDOWS[:1]
    assert (result.returncode == 0) is not interrupted
    assert (NOT_SHOWN in result.stdout) is not interrupted
