"""A Visdom server that fails prints one line and does not stop or delay the run.

The server here is a stand-in that answers as a test wants; real ones are in test_page.py.
"""

import http.server
import json
import socketserver
import threading
from functools import partial
from pathlib import Path

import pytest
from conftest import QUICK, load_checkpoint, metrics, port, train

import main

WINDOWS = ["x", "x_hat", "loss", "traversal", "kl", "samples", "latent"]  # as they are sent


class StandIn:
    """What the server has got, and how it answers."""

    def __init__(self, url: str):
        self.url = url
        self.messages = []
        self.status = 200
        self.answering = threading.Event()  # until it is set, there are no answers
        self.answering.set()

    def drawn(self) -> list[str]:
        return [
            message["win"] for message in self.messages if "data" in message and "win" in message
        ]


@pytest.fixture
def server(url):
    stand_in = StandIn(url)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            stand_in.messages.append(json.loads(body))
            stand_in.answering.wait()
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
def test_the_address_of_a_page_or_without_http(server, patient, capsys, typed):
    """Visdom 0.2.4 would take everything that is sent to /env/main/events, and show nothing."""
    address = typed.format(f"localhost:{port(server.url)}")
    train(f"{QUICK} --epochs 1 --visdom {address}")
    assert server.drawn() == WINDOWS
    assert f"Dashboard: {server.url}/env/main\n" in capsys.readouterr().out


def test_a_local_server_ignores_proxies(server, patient, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    train(f"{QUICK} --epochs 1 --visdom {server.url}")
    assert server.drawn() == WINDOWS


# ---- errors ----
@pytest.mark.parametrize("bad", ["http://visdom.invalid:8097", "abc"])
def test_an_address_without_a_server(monkeypatch, capsys, bad):
    monkeypatch.setenv("no_proxy", "*")
    run = train(f"{QUICK} --epochs 2 --visdom {bad}")
    assert bad in the_line(capsys) and len(metrics(run)) == 2


def test_a_server_with_errors(server, capsys):
    server.status = 500
    run = train(f"{QUICK} --epochs 2 --visdom {server.url}")
    line = the_line(capsys)
    assert server.url in line and "500" in line and len(metrics(run)) == 2


def test_another_program_at_the_port(url, capsys):
    class Greeting(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", port(url)), Greeting) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        run = train(f"{QUICK} --epochs 2 --visdom {url}")
        other.shutdown()
    assert url in the_line(capsys) and len(metrics(run)) == 2


def test_a_server_that_hangs(server, fewest_digits, monkeypatch, capsys):
    """Twelve epochs wait for it twice: at the start and after the tenth."""
    monkeypatch.setattr(main, "Client", partial(main.Client, time_limit=0.3))
    server.answering.clear()
    train(f"{QUICK} --epochs 12 --data {fewest_digits} --visdom {server.url}")
    assert "timed out" in the_line(capsys)
    assert len(server.messages) == 2


def test_the_time_limit_of_a_request(server):
    """Three seconds; this test waits for them."""
    server.answering.clear()
    with pytest.raises(OSError, match="timeout=3"):
        main.Client(server.url, "main")


def test_an_error_in_the_drawing_code_is_raised(server, patient, monkeypatch):
    """It is the reader's own. The epoch before it is saved."""

    def draw_kl(*_):
        return misspelt  # noqa: F821

    monkeypatch.setattr(main.Dashboard, "draw_kl", draw_kl)
    with pytest.raises(NameError):
        train(f"{QUICK} --epochs 3 --run run --visdom {server.url}")
    assert len(load_checkpoint("run")["history"]) == 1


def test_a_server_that_does_not_start(url, monkeypatch, capsys):
    monkeypatch.setattr(main, "SERVER_SCRIPT", "raise SystemExit('broken')")
    train(f"{QUICK} --epochs 1 --visdom {url}")
    log = the_line(capsys).partition("see ")[2].removesuffix(". The run goes on.")
    assert Path(log).read_text() == "broken\n"


def test_every_series_of_errors_prints_one_line(server, patient, few_digits, capsys):
    images = main.load_images("MNIST", few_digits)
    evaluation = main.evaluate(main.VAE(), images.test, beta=1.0, seed=0)
    row = {"train_loss": 2, "test_loss": 2, "neg_elbo": 2, "bce": 1, "kl": 1}
    args = main.parser.parse_args(["--visdom", server.url])
    dashboard = main.Dashboard(args, "run", images)
    drawn, history = [], []
    for epoch in range(1, 23):
        server.status = 500 if epoch in (3, 13) else 200
        server.messages.clear()
        history.append({"epoch": epoch, **row})
        dashboard.show(history, evaluation)
        drawn += [epoch] * (server.drawn() == WINDOWS)
    assert drawn == [1, 2, 10, 11, 12, 20, 21, 22]
    assert capsys.readouterr().err.count("The run goes on") == 2
