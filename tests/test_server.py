"""A Visdom server that fails prints one line and does not stop or delay the run.

The server here is a stand-in that answers as a test wants; real ones are in test_page.py.
"""

import http.server
import inspect
import json
import threading
from functools import partial
from pathlib import Path

import pytest
from conftest import QUICK, load_checkpoint, made_up, metrics, port, train, wait_for

import main

pytestmark = pytest.mark.usefixtures("patient")


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


def the_line(capsys) -> str:
    """The only line about Visdom of a run that has gone on."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "Visdom" in line]
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
    assert server.drawn() == set(main.WINDOW_SIZES)
    assert f"Dashboard: {server.url}/env/main\n" in capsys.readouterr().out


def test_messages_go_to_the_environment_that_they_name(server):
    client = main.Client(server.url, "mine")
    client.text("hello")
    client.text("hello", env="other")
    client.delete_env("third")
    assert [message["eid"] for message in server.messages[-3:]] == ["mine", "other", "third"]


# ---- errors ----
@pytest.mark.parametrize("bad", ["http://visdom.invalid:8097", "abc"])
def test_an_address_without_a_server(monkeypatch, capsys, bad):
    monkeypatch.setenv("no_proxy", "*")
    run = train(f"{QUICK} --epochs 2 --visdom {bad}")
    assert bad in the_line(capsys) and len(metrics(run)) == 2


def test_a_server_that_does_not_start(url, monkeypatch, capsys):
    monkeypatch.setattr(main, "SERVER_SCRIPT", "raise SystemExit('broken')")
    train(f"{QUICK} --epochs 1 --visdom {url}")
    log = the_line(capsys).partition("see ")[2].removesuffix(". The run goes on.")
    assert Path(log).read_text() == "broken\n"


def test_a_server_that_hangs(server, fewest_digits, monkeypatch, capsys):
    """Twelve epochs wait for it twice, three seconds each: at the start and after the tenth."""
    assert inspect.signature(main.Client.func).parameters["time_limit"].default == 3
    monkeypatch.setattr(main, "Client", partial(main.Client, time_limit=0.3))
    server.answering.clear()
    run = train(f"{QUICK} --epochs 12 --data {fewest_digits} --visdom {server.url}")
    assert "timed out" in the_line(capsys) and len(metrics(run)) == 12
    wait_for(lambda: len(server.messages) >= 2)
    assert len(server.messages) == 2


def test_every_series_of_errors_prints_one_line(server, few_digits, capsys):
    """Errors of Visdom's, and another program at its port. Every tenth epoch tries again."""
    images, evaluation, history = made_up(few_digits, epochs=22)
    dashboard = main.Dashboard(main.parser.parse_args(["--visdom", server.url]), "run", images)
    drawn, lines = [], []
    for epoch in range(1, 23):
        server.status = {3: 500, 13: "SSH"}.get(epoch, 200)
        server.messages.clear()
        dashboard.show(history[:epoch], evaluation)
        drawn += [epoch] * (server.drawn() == set(main.WINDOW_SIZES))
        lines += capsys.readouterr().err.splitlines()
    assert drawn == [1, 2, 10, 11, 12, 20, 21, 22]
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
