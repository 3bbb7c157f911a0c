"""A Visdom server that fails prints one line and does not stop or delay the run.

The server here is a stand-in that answers as a test wants; real ones are in test_page.py.
"""

import http.server
import inspect
import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import QUICK, load_checkpoint, made_up, metrics, port, train, wait_for
from filelock import FileLock

import main

pytestmark = pytest.mark.usefixtures("patient")
ALL_WINDOWS = {f"vae-{name}" for name in main.WINDOW_SIZES}


class StandIn:
    """What the server has got, and how it answers: with a status, or with another protocol."""

    def __init__(self, url: str):
        self.url = url
        self.messages = []
        self.status = 200
        self.answering = threading.Event()  # until it is set, there are no answers
        self.answering.set()

    def drawn(self) -> set[str]:
        return {message["win"] for message in self.messages if message.get("data")} - {None}


@pytest.fixture
def server(url):
    stand_in = StandIn(url)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            stand_in.messages.append({"win": None, **json.loads(body)})
            stand_in.answering.wait()
            if stand_in.status == "SSH":
                self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            else:
                self.send_response(stand_in.status)
                self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port(url)), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield stand_in
        stand_in.answering.set()
        listening.shutdown()


def the_line(errors: str) -> str:
    """The only line about Visdom of a run that has gone on."""
    lines = [line for line in errors.splitlines() if "Visdom" in line]
    assert len(lines) == 1 and lines[0].endswith("The run goes on."), lines
    return lines[0]


# ---- what is sent ----
@pytest.mark.parametrize("typed", ["http://{}/", "http://{}/env/main", "{}", "{}/env/other"])
def test_the_address_of_a_page_or_without_http(server, monkeypatch, capsys, typed):
    """Visdom 0.2.4 would take what is sent to /env/main/events, and show nothing. For this machine,
    no proxy is used.
    """
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    address = typed.format(f"localhost:{port(server.url)}")
    train(f"{QUICK} --epochs 1 --visdom {address}")
    assert server.drawn() == ALL_WINDOWS
    assert f"Dashboard: {server.url}/env/main\n" in capsys.readouterr().out


def test_messages_go_to_the_environment_that_they_name(server):
    client = main.Client(server.url, "mine")
    client.text("hello")
    client.text("hello", env="other")
    client.delete_env("third")
    assert [message["eid"] for message in server.messages[-3:]] == ["mine", "other", "third"]


# ---- errors ----
@pytest.mark.parametrize("bad", ["http://visdom.invalid:8097", "abc", "localhost:80970"])
def test_an_address_without_a_server(monkeypatch, capsys, bad):
    monkeypatch.setenv("no_proxy", "*")
    run = train(f"{QUICK} --epochs 2 --visdom {bad}")
    assert bad in the_line(capsys.readouterr().err) and len(metrics(run)) == 2


@pytest.fixture(params=["no home", "not a folder", "locked"])
def no_use_of_home(request, tmp_path, monkeypatch):
    """Nothing can be written there, or another run seems to be starting a server."""
    if request.param == "no home":
        monkeypatch.setattr(main.Path, "home", Path("~nobody-of-this-name").expanduser)
    elif request.param == "not a folder":
        monkeypatch.setenv("HOME", "/dev/null")
    else:

        def impatient(path, timeout):
            return FileLock(path, timeout=min(timeout, 0.1))

        with FileLock(tmp_path / "home" / ".visdom" / ".lock"):
            monkeypatch.setattr(main, "FileLock", impatient)
            yield
            return
    yield


def test_a_home_that_cannot_be_used(no_use_of_home, url, capsys):
    args = main.parser.parse_args(["--visdom", url])
    main.Dashboard(args, "run", images=None)
    assert url in the_line(capsys.readouterr().err)


def test_a_server_that_listens_needs_no_home(no_use_of_home, server, few_digits, capsys):
    images, evaluation, history = made_up(few_digits, epochs=1)
    args = main.parser.parse_args(["--visdom", server.url])
    main.Dashboard(args, "run", images).show(history, evaluation)
    assert server.drawn() == ALL_WINDOWS and not capsys.readouterr().err


def test_a_server_that_does_not_start(url, monkeypatch, capsys):
    monkeypatch.setattr(main, "SERVER_SCRIPT", "raise SystemExit('broken')")
    train(f"{QUICK} --epochs 1 --visdom {url}")
    output, errors = capsys.readouterr()
    log = the_line(errors).partition("see ")[2].removesuffix(". The run goes on.")
    assert Path(log).read_text() == "broken\n"
    assert "to stop it: kill" in output  # before anything could go wrong


def test_a_server_that_hangs(server, fewest_digits, monkeypatch, capsys):
    """Twelve short epochs wait for it twice, three seconds each: at the start and at the end."""
    assert inspect.signature(main.Client.func).parameters["time_limit"].default == 3
    monkeypatch.setattr(main, "Client", partial(main.Client, time_limit=0.3))
    server.answering.clear()
    run = train(f"{QUICK} --epochs 12 --data {fewest_digits} --visdom {server.url}")
    assert "timed out" in the_line(capsys.readouterr().err) and len(metrics(run)) == 12
    wait_for(lambda: len(server.messages) >= 2)
    assert len(server.messages) < 6  # more than twice if the machine is very slow


def test_every_series_of_errors_prints_one_line(server, few_digits, capsys):
    """Errors of Visdom's, and another program at its port. It is tried again 30 s after the last
    error, and in the last epoch.
    """
    images, evaluation, history = made_up(few_digits, epochs=9)
    args = main.parser.parse_args(["--visdom", server.url, "--epochs", "9"])
    dashboard = main.Dashboard(args, "run", images)
    drawn, lines = [], []
    for epoch in range(1, 10):
        server.status = {2: 500, 4: 500, 6: "SSH"}.get(epoch, 200)
        if epoch in (4, 5):  # half a minute later
            dashboard.failed_at -= 30
        elif dashboard.failed_at:
            dashboard.failed_at = time.monotonic()  # whatever the time this test has taken
        server.messages.clear()
        dashboard.show(history[:epoch], evaluation)
        drawn += [epoch] * (server.drawn() == ALL_WINDOWS)
        assert bool(server.messages) == (epoch not in (3, 7, 8))
        lines += capsys.readouterr().err.splitlines()
    assert drawn == [1, 5, 9]
    first, second = lines
    assert server.url in first and "500" in first and server.url in second


def test_an_error_in_the_drawing_code_is_raised(server, monkeypatch):
    """It is the reader's own, who wants its traceback. The epoch before it is saved."""

    def draw_kl(*_):
        return misspelt  # noqa: F821

    monkeypatch.setattr(main.Dashboard, "draw_kl", draw_kl)
    with pytest.raises(NameError):
        train(f"{QUICK} --epochs 3 --run run --visdom {server.url}")
    assert len(load_checkpoint("run")["history"]) == 1
