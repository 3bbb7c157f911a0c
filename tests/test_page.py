"""The dashboard as a person sees it: the real Visdom server, a real headless Chromium."""

import base64
import contextlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import string
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import visdom
from conftest import QUICK, SHORT, load_checkpoint, metrics, succeeded, wait_for
from PIL import Image
from playwright.sync_api import expect
from torch.distributions import Normal, kl_divergence

import main

PANES = ("x", "x_hat", "loss", "traversal", "kl", "samples", "latent")  # how titles begin
expect.set_options(timeout=300_000)  # the patience of wait_for


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict:
    """Chromium from the PATH, else playwright's own (`playwright install chromium`)."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    return {"executable_path": chromium, "args": ["--disable-gpu"]}


@pytest.fixture(scope="session")
def browser_context_args() -> dict:
    """A laptop of 1366 x 768 pixels shows at least as much."""
    return {"viewport": {"width": 1280, "height": 650}}


def free_url() -> str:
    """Of a free port, below those that the system gives to outgoing connections."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 30_000)))
            return f"http://localhost:{free.getsockname()[1]}"


def port(url: str) -> int:
    return int(url.rpartition(":")[2])


def answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(url, timeout=5).status == 200
    except OSError:
        return False


@contextlib.contextmanager
def visdom_server(url: str, home: Path):
    """Visdom's own server, as started in another terminal."""
    main.install_page_scripts()
    command = [sys.executable, "-c", main.SERVER_SCRIPT, "-port", str(port(url))]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | {"HOME": str(home)}, **quiet) as server:
        try:
            wait_for(lambda: answers(url) or server.poll() is not None)
            assert server.poll() is None, "Visdom's server has ended"
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def shared_url(tmp_path_factory):
    """The address of a server for all tests that are not about the server's life."""
    url = free_url()
    with visdom_server(url, tmp_path_factory.mktemp("visdom")):
        yield url


@pytest.fixture
def address(shared_url, env) -> str:
    """The test's own page on the shared server."""
    return f"{shared_url}/env/{env}"


@pytest.fixture
def shown(shared_url, env) -> str:
    """Options of a run that is shown there."""
    return f"{QUICK} --visdom {shared_url} --env {env}"


@pytest.fixture
def url() -> str:
    """An address at which nobody listens."""
    return free_url()


@pytest.fixture
def env(request) -> str:
    """An environment of the test's own."""
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def kill_later():
    """Ends by their pid the servers that main.py has left running."""
    pids = []

    def remember(output: str) -> int:
        pids.append(int(re.findall(r"to stop it: kill (\d+)", output)[-1]))
        return pids[-1]

    yield remember
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def see(page, condition):
    """Polls the page, which lives only while Playwright waits."""
    return wait_for(lambda: page.wait_for_timeout(50) or condition())


def pane(page, win: str):
    """The pane whose bar has the window's title, which begins with its name."""
    title = page.get_by_text(re.compile(rf"^{win}( from the prior$| by epoch: |: )"))
    return page.locator(".react-grid-item").filter(has=title).first


def picture(page, win: str) -> np.ndarray:
    """The image that a pane shows, decoded from the page, in [0, 1]."""
    source = pane(page, win).locator("img").get_attribute("src")
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("L")) / 255


def plotted(page, win: str, what: str = "y") -> list:
    """The y of each of a pane's curves or bars, or another property; [] while it has no plot."""
    plot = pane(page, win).locator(".js-plotly-plot")
    return plot.evaluate(f"plot => plot.data.map(curve => curve.{what})") if plot.count() else []


def epoch_shown(page) -> int:
    caption = pane(page, "loss").locator(".annotation-text")
    return int(re.findall(r"\d+", caption.text_content())[0]) if caption.count() else -1


def edges(locator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom."""
    box = locator.bounding_box()
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def assert_whole(page, address: str, run: Path, curves: int = 2) -> None:
    """Seven filled panes, all on the screen, which tell their run and epoch."""
    rows = metrics(run)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    expect(page.locator(".react-grid-item")).to_have_count(7)
    see(page, lambda: epoch_shown(page) == len(rows))
    caption = pane(page, "loss").locator(".annotation-text")
    newest = f"-ELBO {rows[-1]['bce'] + rows[-1]['kl']:.2f}"
    assert caption.text_content() == f"epoch {len(rows)}: {newest} ({run.name})"
    expect(pane(page, "kl")).to_contain_text(f"epoch {len(rows)}")
    see(page, lambda: all(edges(pane(page, win))[3] <= 650 for win in PANES))
    hidden = plotted(page, "loss", "visible").count("legendonly")
    assert (len(plotted(page, "loss")), hidden) == (curves + 2, 2)

    for win in PANES:
        left, top, right, bottom = edges(pane(page, win))
        assert 0 <= left and right <= 1280 and top >= 50
        if win in ("loss", "kl", "latent"):
            assert pane(page, win).locator(".xtick").count() > 0
        else:
            image_left, image_top, image_right, image_bottom = edges(pane(page, win).locator("img"))
            assert picture(page, win).std() > 0.1
            bar = 15
            white = (image_top - top - bar, bottom - image_bottom)
            # Visdom 0.2.4 moves the image down: below the last digits it cuts off black pixels.
            assert -4 <= min(white) and max(white) <= 14
            assert abs(image_left - left) < 2 and abs(image_right - right) < 2
    corner = page.get_by_placeholder("Filter text")  # in Visdom 0.3 it hangs down among the panes
    for one, other in itertools.combinations([corner, *(pane(page, win) for win in PANES)], 2):
        (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = edges(one), edges(other)
        assert max(left - right_2, left_2 - right, top - bottom_2, top_2 - bottom) >= -1
    # In order, as the rows of a text.
    corners = [edges(pane(page, win))[1::-1] for win in PANES]
    assert corners == sorted(corners)
    # These are missing, and nobody misses them; the last two are for graphs of nodes.
    known = ("mathjax", "favicon", "saveSvgAsPng", "d3")
    assert not [text for text in complaints if not any(name in text for name in known)]


@pytest.mark.parametrize("recipe", ["elbo", "article"])
def test_seven_panes_of_a_finished_run(
    run_main, few_digits, page, address, shown, tmp_path, recipe
):
    result = succeeded(run_main(f"{shown} --recipe {recipe} --epochs 3 --run run"))
    assert f"Dashboard: {address}\n" in result.stdout
    curves = {"elbo": 2, "article": 3}[recipe]  # its test loss is no -ELBO
    assert_whole(page, address, tmp_path / "run", curves)
    first = picture(page, "x")[:28, 4:32]
    digit = main.load_images("MNIST", few_digits).test[0, 0].numpy() / 255
    assert np.abs(first - digit).max() < 0.01


def test_every_number_on_the_page(run_main, few_digits, page, address, shown):
    succeeded(run_main(f"{shown} --epochs 3 --latent-dim 5 --beta 0.5 --run run"))
    page.goto(address)
    see(page, lambda: len(plotted(page, "latent")) == 10)
    rows = metrics(Path("run"))
    curves = {name: [row[name] for row in rows] for name in ("train_loss", "test_loss")}
    curves["elbo"] = [row["bce"] + row["kl"] for row in rows]
    curves |= {name: [row[name] for row in rows] for name in ("bce", "kl")}
    assert plotted(page, "loss") == [pytest.approx(ys) for ys in curves.values()]
    assert plotted(page, "loss", "x") == [[1, 2, 3]] * 5
    assert plotted(page, "loss", "name") == ["train", "test", "-ELBO", "bce", "kl"]

    _, test_images, labels, _ = main.load_images("MNIST", few_digits)
    model = main.load_model("run")
    with torch.no_grad():
        mu, sigma = model.encode(test_images / 255)
    kl = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).mean(0)
    (bars,), (units,) = plotted(page, "kl"), plotted(page, "kl", "x")
    assert list(map(int, units)) == [1, 2, 3, 4, 5] and bars == pytest.approx(kl.tolist(), rel=1e-4)

    pair = kl.argsort(descending=True)[:2].tolist()
    for axis, unit in zip("xy", pair, strict=True):
        title = pane(page, "latent").locator(f".{axis}title").text_content()
        assert title == f"mu of unit {unit + 1}"
        for label, shown in enumerate(plotted(page, "latent", axis)):
            assert shown == pytest.approx(mu[labels == label, unit].tolist(), abs=1e-5)
    assert plotted(page, "latent", "name") == [str(label) for label in range(10)]


def test_the_page_is_live(start_main, page, address, shown):
    """And a curve that was clicked on in the legend stays visible."""
    process = start_main(f"{shown} --batch-size 20")
    wait_for(lambda: process.out.exists() and f"Dashboard: {address}" in process.out.read_text())
    assert answers(address)  # from the moment when it is printed
    page.goto(address)
    see(page, lambda: epoch_shown(page) >= 1)
    digits, before, epoch = picture(page, "x"), picture(page, "x_hat"), epoch_shown(page)
    pane(page, "loss").locator(".legendtoggle").nth(2).click()
    visible = "plot => plot._fullData.map(curve => curve.visible)"
    see(page, lambda: epoch_shown(page) >= epoch + 2)
    assert (picture(page, "x_hat") != before).any() and (picture(page, "x") == digits).all()
    shown = pane(page, "loss").locator(".js-plotly-plot").evaluate(visible)
    assert shown == [True, True, True, "legendonly"]


def test_a_page_that_was_open_all_along_has_the_last_epoch(
    run_main, page, shared_url, env, address, shown
):
    main.Client(shared_url, env)
    page.goto(address)
    succeeded(run_main(f"{shown} --epochs 10"))
    see(page, lambda: epoch_shown(page) == 10)
    # A new run leaves no older curve standing.
    succeeded(run_main(f"{shown} --epochs 2"))
    see(page, lambda: epoch_shown(page) == 2 and len(plotted(page, "loss")[0]) == 2)


def history_of(epochs: int) -> list[dict]:
    """A made-up history that falls as a loss does."""
    rows = [
        {"epoch": n, "train_loss": 50 + 50 / n, "bce": 30 + 50 / n} for n in range(1, epochs + 1)
    ]
    return [row | {"test_loss": row["train_loss"], "kl": 20} for row in rows]


@pytest.fixture
def draw(environment, few_digits, address, shown):
    """Draws a history and a random model's evaluation, without a training."""

    def draw(history: list[dict], latent_dim: int = 10, letters: bool = False) -> str:
        images = main.load_images("MNIST", few_digits)
        if letters:  # as EMNIST has them
            labels = torch.arange(len(images.labels)) % 26
            images = images._replace(labels=labels, classes=list(string.ascii_lowercase))
        evaluation = main.evaluate(main.VAE(latent_dim), images.test, beta=1.0, seed=0)
        args = main.parser.parse_args(shown.split())
        main.Dashboard(args, "run", images).draw(history, evaluation)
        return address

    return draw


@pytest.mark.parametrize("epochs", [0, 1, 3, 10, 50, 1000])
def test_the_loss_is_readable_at_any_epoch(draw, page, epochs):
    """Without its first tenth, the rest fills the plot's height."""
    page.goto(draw(history_of(epochs)))
    see(page, lambda: epoch_shown(page) == epochs)
    first = epochs // 10 + 1
    assert plotted(page, "loss", "x")[0] == list(range(first, epochs + 1))
    if epochs:
        plot = pane(page, "loss").locator(".js-plotly-plot")
        bottom, top = plot.evaluate("plot => plot._fullLayout.yaxis.range")
        assert bottom < 50 + 50 / epochs and 50 + 50 / first < top
        assert epochs == 1 or 50 / first - 50 / epochs > 0.7 * (top - bottom)
        ticks = pane(page, "loss").locator(".xtick").all_text_contents()
        assert ticks and all(tick.isdigit() for tick in ticks)


@pytest.mark.parametrize("latent_dim", [1, 2, 10, 50])
def test_any_number_of_units_fits_the_page(draw, page, latent_dim):
    page.goto(draw(history_of(3), latent_dim))
    see(page, lambda: epoch_shown(page) == 3)
    see(page, lambda: all(edges(pane(page, win))[3] <= 650 for win in PANES))
    assert [len(bars) for bars in plotted(page, "kl")] == [latent_dim]
    title = "unit 1 across, unit 2 up" if latent_dim == 2 else f"row = unit 1 to {latent_dim}, "
    expect(pane(page, "traversal")).to_contain_text(title)
    rows, columns = (15, 15) if latent_dim == 2 else (latent_dim, 9)
    assert picture(page, "traversal").shape == (rows * 32 - 4, columns * 32 + 4)


def test_every_label_is_drawn(draw, page):
    page.goto(draw(history_of(3), letters=True))
    see(page, lambda: len(plotted(page, "latent")) == 26)
    assert sum(map(len, plotted(page, "latent"))) == 500
    look = "plot => plot._fullData.map(d => d.marker.color + d.marker.symbol)"
    assert len(set(pane(page, "latent").locator(".js-plotly-plot").evaluate(look))) == 26


def test_two_runs_compared(run_main, page, shared_url):
    options = f"{QUICK} --visdom {shared_url}"
    succeeded(run_main(f"{options} --epochs 3 --env first"))
    succeeded(run_main(f"{options} --recipe article --epochs 2 --env second"))
    page.goto(f"{shared_url}/compare/first+second")
    see(page, lambda: [len(ys) for ys in plotted(page, "loss")] == [3] * 4 + [2] * 5)
    see(page, lambda: [len(bars) for bars in plotted(page, "kl")] == [10, 10])
    # Points are laid over each other only if they are of the same two units.
    client = visdom.Visdom(port=port(shared_url), use_incoming_socket=False, send=False)
    client.send = True
    titles = {
        json.loads(client.get_window_data("latent", env=env))["title"]
        for env in ("first", "second")
    }
    assert page.get_by_text(re.compile("^latent: ")).count() == (len(titles) == 1)


def test_an_eighth_window(environment, page, address, shown, tmp_path):
    """The README's change of main.py, as it would be imported from there."""
    conftest.changed_copy(tmp_path, "an eighth window")
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "main.py")
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    changed.main(f"{shown} --epochs 1".split())
    page.goto(address)
    expect(page.locator(".react-grid-item")).to_have_count(8)


# ---- the server ----
@pytest.fixture
def bare_visdom(tmp_path, monkeypatch) -> Path:
    """Visdom as pip installs it, without its page's scripts, and none of them installed here."""
    copy = shutil.copytree(Path(visdom.__file__).parent, tmp_path / "packages" / "visdom")
    for place in (*main.PAGE_SCRIPTS.values(), "version.built"):
        (copy / "static" / place).unlink(missing_ok=True)
    monkeypatch.setenv("PYTHONPATH", str(copy.parent))
    monkeypatch.setattr(visdom, "__file__", str(copy / "__init__.py"))
    return copy.parent


@conftest.needs_npm
@conftest.needs_proc
def test_a_server_of_ones_own(
    unreachable, run_main, few_digits, bare_visdom, page, url, kill_later, tmp_path, monkeypatch
):
    """Its scripts come from npm, once. It is private, small, and outlives the run and a pip."""
    monkeypatch.setenv("PATH", conftest.npm_with_a_way_out(tmp_path / "bin"))
    result = succeeded(run_main(f"{QUICK} --epochs 2 --data {few_digits} --run run --visdom {url}"))
    assert result.stdout.count("Installing the scripts") == 1
    pid = kill_later(result.stdout)
    assert_whole(page, f"{url}/env/main", tmp_path / "run")
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    address = f"{port(url):04X}"
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{address}")]
    assert listening == [f"0100007F:{address}"]  # 127.0.0.1 alone

    for module in bare_visdom.rglob("*.py"):  # as an upgrade of the package would
        module.touch()
    time.sleep(2)
    assert answers(url)  # still
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not answers(url))
    monkeypatch.setenv("PATH", "/nowhere")
    again = succeeded(run_main("--resume run --epochs 3"))
    assert "Installing" not in again.stdout
    kill_later(again.stdout)
    assert_whole(page, f"{url}/env/main", tmp_path / "run")


def test_scripts_that_cannot_be_had_cost_one_line(
    unreachable, run_main, few_digits, bare_visdom, url, kill_later
):
    result = succeeded(run_main(f"{QUICK} --epochs 1 --data {few_digits} --visdom {url}"))
    kill_later(result.stdout)
    assert "blank" in result.stdout and "'npm'" in result.stdout


def test_visdoms_own_download_where_there_is_no_npm(environment, bare_visdom, monkeypatch):
    """For which a stand-in is installed."""
    files = [str(bare_visdom / "visdom" / "static" / place) for place in main.PAGE_SCRIPTS.values()]
    download = f"from pathlib import Path\ndef download_scripts():\n    for place in {files}:\n"
    download += "        Path(place).parent.mkdir(exist_ok=True)\n        Path(place).touch()\n"
    (bare_visdom / "visdom" / "server" / "build.py").write_text(download)
    (bare_visdom / "visdom" / "__init__.py").write_text("")
    (bare_visdom / "visdom" / "server" / "__init__.py").write_text("")
    monkeypatch.setenv("PATH", "/nowhere")
    main.install_page_scripts()
    assert all(Path(file).exists() for file in files)


def test_two_first_runs_start_one_server(start_main, url, kill_later):
    options = f"--epochs 1 --visdom {url}"
    runs = [start_main(f"{QUICK} {options} --run {name} --env {name}") for name in "ab"]
    output = "".join(succeeded(run.finished()).stdout for run in runs)
    kill_later(output)
    assert output.count("to stop it: kill") == 1
    assert answers(f"{url}/env/a") and answers(f"{url}/env/b")


def test_a_server_that_does_not_start(run_main, url, monkeypatch):
    monkeypatch.setattr(main, "SERVER_SCRIPT", "raise SystemExit('broken')")
    result = run_main(f"{QUICK} --epochs 1 --visdom {url}")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    (log,) = re.findall(r"see (\S+\.log)", line)
    assert Path(log).read_text() == "broken\n"


def test_the_page_is_kept_by_a_server_that_is_restarted(run_main, page, url, tmp_path):
    home = tmp_path / "home"
    with visdom_server(url, home) as server:
        result = succeeded(run_main(f"{QUICK} --epochs 2 --run run --visdom {url}"))
        assert "to stop it" not in result.stdout  # it is not ours
        server.kill()
        server.wait()
    with visdom_server(url, home):
        assert_whole(page, f"{url}/env/main", tmp_path / "run")


# ---- whatever is wrong with Visdom costs one line, and the run goes on ----
def stand_in(received: list, status: int = 200, seconds: float = 0):
    """A server that takes some seconds for a window and then answers the same to everything."""

    class StandIn(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(seconds if "win" in message else 0)
            received.append((message.get("win"), self.headers["Authorization"]))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    return StandIn


class Ssh(socketserver.BaseRequestHandler):
    """A server that speaks another language, and hangs up."""

    def handle(self):
        self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


class Silent(socketserver.BaseRequestHandler):
    """A server that listens, and says nothing for longer than anybody waits."""

    def handle(self):
        time.sleep(30)


@contextlib.contextmanager
def serve(url: str, handler):
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", port(url)), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


NOWHERE = ("localhost:1", "http://localhost:port", "http://visdom.invalid:8097", "abc", "https://")
STRANGERS = {"500": stand_in([], status=500), "ssh": Ssh, "silence": Silent}


@pytest.mark.parametrize("address", [*NOWHERE, *STRANGERS])
def test_a_wrong_address_costs_one_line(run_main, url, tmp_path, monkeypatch, address):
    monkeypatch.setenv("no_proxy", "*")
    handler = STRANGERS.get(address)
    address = address if address in NOWHERE else url
    with serve(url, handler) if handler else contextlib.nullcontext():
        result = run_main(f"{QUICK} --epochs 2 --run run --visdom {address}")
    assert result.returncode == 0 and len(metrics(tmp_path / "run")) == 2
    (line,) = result.stderr.splitlines()
    assert address.rstrip("/") in line and re.search("Error|Timeout|Invalid", line)
    assert "does not show the last epoch" in result.stdout


def test_killed_replaced_and_back(start_main, page, url, tmp_path):
    with visdom_server(url, tmp_path / "home") as server:
        process = start_main(f"{QUICK} --epochs 100000 --run run --visdom {url}")
        wait_for(process.trained)
        server.kill()
        server.wait()
    wait_for(lambda: "ConnectionError" in process.err.read_text())
    with serve(url, stand_in([], status=500)):
        time.sleep(1)  # another error of the same series is not printed
    saved = conftest.rows_in(tmp_path / "run")
    with visdom_server(url, tmp_path / "home") as server:
        page.goto(f"{url}/env/main")
        see(page, lambda: epoch_shown(page) > saved)  # the server has kept older ones
        shown = epoch_shown(page)
        see(page, lambda: epoch_shown(page) > shown)  # so a whole frame has come without an error
        server.send_signal(signal.SIGSTOP)
        wait_for(lambda: "ReadTimeout" in process.err.read_text())
        epoch = conftest.rows_in(tmp_path / "run")
        wait_for(lambda: process.trained(epoch + 3))  # it trains while Visdom hangs
        server.send_signal(signal.SIGCONT)
        process.send(signal.SIGINT)
        result = process.finished()
    *faults, _interrupted, _command = result.stderr.splitlines()
    assert len(faults) == 2 and all("The run goes on" in fault for fault in faults)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_slow_server_holds_up_nothing(start_main, url, interrupted):
    """An epoch takes a fraction of a second; a server that wants 2 s a window, 14 s for a page."""
    received = []

    def drawn() -> int:
        return len([win for win, _ in received if win])

    with serve(url, stand_in(received, seconds=2)):
        process = start_main(f"{QUICK} --epochs {1000 if interrupted else 3} --visdom {url}")
        wait_for(lambda: process.trained(3))
        assert drawn() < len(PANES)  # the page of epoch 0 is still on its way
        if interrupted:
            process.send(signal.SIGINT)
        result = process.finished()
        assert (result.returncode == 0) is not interrupted
        if interrupted:
            assert drawn() < len(PANES)  # nobody has waited for it
        else:  # it has waited ten seconds for the last page, and no longer
            assert drawn() < 2 * len(PANES)
            assert "does not show the last epoch" in result.stdout


def test_a_visdom_on_this_machine_needs_no_proxy_but_may_need_a_password(
    run_main, url, tmp_path, monkeypatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    (tmp_path / "home" / ".netrc").write_text("machine localhost login me password secret\n")
    received = []
    with serve(url, stand_in(received)):
        succeeded(run_main(f"{QUICK} --epochs 1 --visdom {url}"))
    me = base64.b64encode(b"me:secret").decode()
    assert {password for _window, password in received} == {f"Basic {me}"}


def test_an_error_in_ones_own_drawing_code(run_main, shown, monkeypatch):
    monkeypatch.setattr(main.Dashboard, "draw_kl", lambda *_: 1 / 0)
    result = run_main(f"{shown} --epochs 3")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 0 and "ZeroDivisionError" in line


def test_without_a_dashboard_and_with_it_again(run_main, shared_url, tmp_path):
    options = f"{SHORT} --epochs 1 --run run"
    assert "Dashboard" not in succeeded(run_main(options)).stdout
    assert "Dashboard" not in succeeded(run_main("--resume run --epochs 2")).stdout
    again = succeeded(run_main(f"--resume run --epochs 3 --visdom {shared_url}"))
    assert "Dashboard" in again.stdout
    assert load_checkpoint(tmp_path / "run")["options"]["visdom"] == shared_url
