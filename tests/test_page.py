"""The dashboard in a real browser, headless Chromium, with a real Visdom server."""

import base64
import contextlib
import http.server
import io
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import socketserver
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import conftest
import numpy as np
import pytest
import requests
import torch
import visdom
from conftest import QUICK, load_checkpoint, metrics, succeeded, wait_for
from filelock import FileLock
from PIL import Image
from playwright.sync_api import expect
from torch.distributions import Normal, kl_divergence

import main

PANES = ("x", "x_hat", "loss", "traversal", "kl", "samples", "latent")  # how titles begin
expect.set_options(timeout=300_000)  # as wait_for


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict:
    """Chromium from the PATH, else playwright's own (`playwright install chromium`)."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    return {"executable_path": chromium, "args": ["--disable-gpu"]}


@pytest.fixture(scope="session")
def browser_context_args() -> dict:
    """Slightly less than a laptop of 1366 x 768 pixels shows."""
    return {"viewport": {"width": 1280, "height": 650}}


@pytest.fixture
def page(page):
    page.set_default_timeout(300_000)
    return page


def free_url() -> str:
    """A URL with a free port, outside the range of outgoing connections."""
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
    with FileLock(Path(tempfile.gettempdir(), "visdom-scripts.lock")):  # other workers wait
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
    """The URL of a server shared by the tests that do not start or stop one."""
    url = free_url()
    with visdom_server(url, tmp_path_factory.mktemp("visdom")):
        yield url


@pytest.fixture
def address(shared_url, env) -> str:
    """The page of this test on the shared server."""
    return f"{shared_url}/env/{env}"


@pytest.fixture
def patient(monkeypatch) -> None:
    """The client waits longer than three seconds for a server, as this machine may be slow."""
    post = requests.Session.post

    def patient_post(*arguments, timeout, **keywords):
        return post(*arguments, timeout=300, **keywords)

    monkeypatch.setattr(requests.Session, "post", patient_post)


@pytest.fixture
def dashboard(shared_url, env, patient) -> str:
    """Options for a run that is shown there."""
    return f"{QUICK} --visdom {shared_url} --env {env}"


@pytest.fixture
def url() -> str:
    """A local URL without a server."""
    return free_url()


@pytest.fixture
def env(request) -> str:
    """A Visdom environment for this test alone."""
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def kill_later():
    """Read a server's pid from the output of main.py; kill it after the test."""
    pids = []

    def remember(output: str) -> int:
        pids.append(int(re.findall(r"to stop it: kill (\d+)", output)[-1]))
        return pids[-1]

    yield remember
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_page(page, condition):
    """Wait for a condition; Playwright handles the page's events only while it waits."""
    return wait_for(lambda: page.wait_for_timeout(50) or condition())


def pane(page, win: str):
    """The pane whose title begins with the name of this window."""
    title = page.get_by_text(re.compile(rf"^{win}( from the prior$| by epoch: |: )"))
    return page.locator(".react-grid-item").filter(has=title).first


def picture(page, win: str) -> np.ndarray:
    """The image in a pane, as grey values in [0, 1]."""
    source = pane(page, win).locator("img").get_attribute("src")
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("L")) / 255


def plotted(page, win: str, what: str = "y") -> list:
    """A property of each curve in a pane; [] while it has no plot."""
    plot = pane(page, win).locator(".js-plotly-plot")
    return plot.evaluate(f"plot => plot.data.map(curve => curve.{what})") if plot.count() else []


def epoch_shown(page) -> int:
    caption = pane(page, "loss").locator(".annotation-text")
    return int(re.findall(r"\d+", caption.text_content())[0]) if caption.count() else -1


def edges(locator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom."""
    expect(locator).to_be_visible()
    box = locator.bounding_box()
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def assert_shows(page, address: str, run: Path) -> None:
    """All seven panes are there and show the last epoch of this run."""
    rows = metrics(run)
    elbo = rows[-1]["bce"] + rows[-1]["kl"]
    page.goto(address)
    expect(page.locator(".react-grid-item")).to_have_count(7)
    caption = pane(page, "loss").locator(".annotation-text")
    expect(caption).to_have_text(f"epoch {len(rows)}: -ELBO {elbo:.2f} ({run.name})")
    expect(pane(page, "kl")).to_contain_text(f"epoch {len(rows)}")


def test_seven_panes_fit_a_laptop(run_main, page, address, dashboard, tmp_path):
    result = succeeded(run_main(f"{dashboard} --epochs 3 --run run"))
    assert f"Dashboard: {address}\n" in result.stdout
    assert_shows(page, address, tmp_path / "run")
    wait_for_page(page, lambda: all(edges(pane(page, win))[3] <= 650 for win in PANES))
    for win in PANES:
        left, top, right, bottom = edges(pane(page, win))
        assert 0 <= left and right <= 1280 and top >= 50
        if win in ("loss", "kl", "latent"):
            expect(pane(page, win).locator(".xtick")).not_to_have_count(0)
        else:
            image_left, image_top, image_right, image_bottom = edges(pane(page, win).locator("img"))
            assert picture(page, win).std() > 0.1
            title_bar = 15
            for margin in (image_top - top - title_bar, bottom - image_bottom):
                assert -4 <= margin <= 14  # Visdom 0.2.4 cuts off four black pixels
            assert abs(image_left - left) < 2 and abs(image_right - right) < 2
    corner = page.get_by_placeholder("Filter text")  # in Visdom 0.3 it could overlap the panes
    for one, other in itertools.combinations([corner, *(pane(page, win) for win in PANES)], 2):
        (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = edges(one), edges(other)
        assert max(left - right_2, left_2 - right, top - bottom_2, top_2 - bottom) >= -1
    # They are in order from left to right and from top to bottom.
    corners = [edges(pane(page, win))[1::-1] for win in PANES]
    assert corners == sorted(corners)


def test_every_number_on_the_page(run_main, few_digits, page, address, dashboard):
    succeeded(run_main(f"{dashboard} --epochs 3 --latent-dim 5 --beta 0.5 --run run"))
    page.goto(address)
    wait_for_page(page, lambda: len(plotted(page, "latent")) == 10)
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


def test_a_page_that_was_open_all_along_has_the_last_epoch(
    run_main, page, shared_url, env, address, dashboard
):
    main.Client(shared_url, env)
    page.goto(address)
    succeeded(run_main(f"{dashboard} --epochs 10"))
    wait_for_page(page, lambda: epoch_shown(page) == 10)
    # Plotly can get new data without drawing it.
    drawn = pane(page, "loss").locator(".scatterlayer .trace").first.locator(".point")
    expect(drawn).to_have_count(9)
    # A new run replaces the old curves.
    succeeded(run_main(f"{dashboard} --epochs 2"))
    wait_for_page(page, lambda: [len(ys) for ys in plotted(page, "loss")] == [2] * 4)
    expect(drawn).to_have_count(2)


def history_of(epochs: int) -> list[dict]:
    """A made-up history in which the losses fall."""
    rows = [
        {"epoch": n, "train_loss": 50 + 50 / n, "bce": 30 + 50 / n} for n in range(1, epochs + 1)
    ]
    return [row | {"test_loss": row["train_loss"], "kl": 20} for row in rows]


@pytest.fixture
def draw(environment, few_digits, address, dashboard):
    """Draw a history and the evaluation of an untrained model."""

    def draw(history: list[dict], latent_dim: int = 10, letters: bool = False) -> str:
        images = main.load_images("MNIST", few_digits)
        if letters:  # as EMNIST has them
            labels = torch.arange(len(images.labels)) % 26
            images = images._replace(labels=labels, classes=list(string.ascii_lowercase))
        evaluation = main.evaluate(main.VAE(latent_dim), images.test, beta=1.0, seed=0)
        args = main.parser.parse_args(dashboard.split())
        main.Dashboard(args, "run", images).draw(history, evaluation)
        return address

    return draw


@pytest.mark.parametrize("epochs", [0, 1, 3, 10, 50, 1000])
def test_the_loss_is_readable_at_any_epoch(draw, page, epochs):
    """The first tenth is left out, so the rest fills the plot."""
    page.goto(draw(history_of(epochs)))
    wait_for_page(page, lambda: epoch_shown(page) == epochs)
    first = epochs // 10 + 1
    assert plotted(page, "loss", "x")[0] == list(range(first, epochs + 1))
    if epochs:
        plot = pane(page, "loss").locator(".js-plotly-plot")
        bottom, top = plot.evaluate("plot => plot._fullLayout.yaxis.range")
        assert epochs == 1 or 50 / first - 50 / epochs > 0.7 * (top - bottom)
        ticks = pane(page, "loss").locator(".xtick").all_text_contents()
        assert ticks and all(tick.isdigit() for tick in ticks)


@pytest.mark.parametrize("latent_dim", [1, 2, 10, 50])
def test_any_number_of_units_fits_the_page(draw, page, latent_dim):
    page.goto(draw(history_of(3), latent_dim))
    wait_for_page(page, lambda: epoch_shown(page) == 3)
    wait_for_page(page, lambda: all(edges(pane(page, win))[3] <= 650 for win in PANES))
    assert [len(bars) for bars in plotted(page, "kl")] == [latent_dim]
    title = "unit 1 across, unit 2 up" if latent_dim == 2 else f"row = unit 1 to {latent_dim}, "
    expect(pane(page, "traversal")).to_contain_text(title)
    rows, columns = (15, 15) if latent_dim == 2 else (latent_dim, 9)
    assert picture(page, "traversal").shape == (rows * 32 - 4, columns * 32 + 4)


def test_every_label_is_drawn(draw, page):
    page.goto(draw(history_of(3), letters=True))
    wait_for_page(page, lambda: len(plotted(page, "latent")) == 26)
    assert sum(map(len, plotted(page, "latent"))) == 500
    look = "plot => plot._fullData.map(d => d.marker.color + d.marker.symbol)"
    assert len(set(pane(page, "latent").locator(".js-plotly-plot").evaluate(look))) == 26


def test_a_curve_stays_visible_after_a_click_on_the_legend(draw, page):
    def visible() -> list:
        plot = pane(page, "loss").locator(".js-plotly-plot")
        return plot.evaluate("plot => plot._fullData.map(curve => curve.visible)")

    page.goto(draw(history_of(3)))
    wait_for_page(page, lambda: epoch_shown(page) == 3)
    assert visible() == [True, True, "legendonly", "legendonly"]
    pane(page, "loss").locator(".legendtoggle").nth(2).click()
    wait_for_page(page, lambda: visible() == [True, True, True, "legendonly"])
    draw(history_of(4))
    wait_for_page(page, lambda: epoch_shown(page) == 4)
    assert visible() == [True, True, True, "legendonly"]


def test_two_runs_compared(run_main, page, dashboard, shared_url):
    succeeded(run_main(f"{dashboard} --epochs 3 --env first"))
    succeeded(run_main(f"{dashboard} --recipe article --epochs 2 --env second"))
    page.goto(f"{shared_url}/compare/first+second")
    # The article's test loss is another quantity than -ELBO.
    wait_for_page(page, lambda: [len(ys) for ys in plotted(page, "loss")] == [3] * 4 + [2] * 5)
    wait_for_page(page, lambda: [len(bars) for bars in plotted(page, "kl")] == [10, 10])


def test_an_eighth_window(environment, page, address, dashboard, tmp_path):
    conftest.changed_copy(tmp_path, "an eighth window")
    runpy.run_path("main.py")["main"](f"{dashboard} --epochs 1".split())
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
def test_main_starts_a_server(
    unreachable, run_main, few_digits, bare_visdom, page, url, kill_later, tmp_path, monkeypatch
):
    """It installs scripts from npm, once, listens on localhost only, does not import PyTorch, and
    survives the run and package upgrades.
    """
    monkeypatch.setenv("PATH", conftest.npm_with_network(tmp_path / "bin"))
    result = run_main(f"{QUICK} --epochs 2 --data {few_digits} --run run --visdom {url}")
    pid = kill_later(result.stdout)
    assert succeeded(result).stdout.count("Installing the scripts") == 1
    assert_shows(page, f"{url}/env/main", tmp_path / "run")
    maps = Path(f"/proc/{pid}/maps")  # Linux only
    assert not maps.exists() or "libtorch" not in maps.read_text()
    with pytest.raises(OSError):  # it listens at 127.0.0.1 only
        socket.create_connection(("127.0.0.2", port(url)), timeout=3)

    for module in bare_visdom.rglob("*.py"):  # as in a package upgrade
        module.touch()
    time.sleep(2)
    wait_for(lambda: answers(url))
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not answers(url))
    monkeypatch.setenv("PATH", "/nowhere")
    again = run_main("--resume run --epochs 3")
    kill_later(again.stdout)
    assert "Installing" not in succeeded(again).stdout
    assert_shows(page, f"{url}/env/main", tmp_path / "run")


@pytest.mark.usefixtures("bare_visdom")
def test_missing_page_scripts_are_reported(unreachable, run_main, few_digits, url, kill_later):
    result = run_main(f"{QUICK} --epochs 1 --data {few_digits} --visdom {url}")
    kill_later(result.stdout)
    (line,) = [line for line in succeeded(result).stdout.splitlines() if "blank" in line]
    assert "'npm'" in line


def test_page_scripts_without_npm(environment, bare_visdom, monkeypatch):
    """Visdom's own download is replaced by a stub."""
    files = [str(bare_visdom / "visdom" / "static" / place) for place in main.PAGE_SCRIPTS.values()]
    download = f"from pathlib import Path\ndef download_scripts():\n    for place in {files}:\n"
    download += "        Path(place).parent.mkdir(exist_ok=True)\n        Path(place).touch()\n"
    build = bare_visdom / "visdom" / "server" / "build.py"
    assert "def download_scripts(" in build.read_text()
    build.write_text(download)
    (bare_visdom / "visdom" / "__init__.py").write_text("")
    (bare_visdom / "visdom" / "server" / "__init__.py").write_text("")
    monkeypatch.setenv("PATH", "/nowhere")
    main.install_page_scripts()
    assert all(Path(file).exists() for file in files)


def test_two_first_runs_start_one_server(start_main, url, kill_later):
    options = f"--epochs 1 --visdom {url}"
    runs = [start_main(f"{QUICK} {options} --run {name} --env {name}") for name in "ab"]
    results = [run.finished() for run in runs]
    output = "".join(result.stdout for result in results)
    kill_later(output)
    assert [result.returncode for result in results] == [0, 0]
    assert output.count("to stop it: kill") == 1


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
        assert_shows(page, f"{url}/env/main", tmp_path / "run")


# ---- an error of Visdom prints one line and does not stop the run ----
def stand_in(received: list, status: int = 200, seconds: float = 0):
    """A server that answers everything with `status`, and windows after some seconds."""

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


class Silent(socketserver.BaseRequestHandler):
    """A server that accepts connections but never answers."""

    def handle(self):
        time.sleep(30)


@contextlib.contextmanager
def serve(url: str, handler):
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", port(url)), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


BAD_URLS = ("http://localhost:port", "http://visdom.invalid:8097", "abc")
BAD_SERVERS = {"500": stand_in([], status=500), "silence": Silent}


@pytest.mark.parametrize("bad", [*BAD_URLS, *BAD_SERVERS])
def test_a_bad_server_prints_one_error(run_main, url, tmp_path, monkeypatch, bad):
    monkeypatch.setenv("no_proxy", "*")
    handler = BAD_SERVERS.get(bad)
    bad_url = url if handler else bad
    with serve(url, handler) if handler else contextlib.nullcontext():
        result = run_main(f"{QUICK} --epochs 2 --run run --visdom {bad_url}")
    assert result.returncode == 0 and len(metrics(tmp_path / "run")) == 2
    (line,) = result.stderr.splitlines()
    assert bad_url in line and re.search("Error|Timeout|Invalid", line)
    assert "does not show the last epoch" in result.stdout


def test_the_dashboard_recovers_when_the_server_returns(start_main, page, url, tmp_path):
    with visdom_server(url, tmp_path / "home") as server:
        process = start_main(f"{QUICK} --epochs 100000 --run run --visdom {url}")
        wait_for(process.trained)
        server.kill()
        server.wait()
    wait_for(lambda: "Error" in process.err.read_text())
    received = []
    with serve(url, stand_in(received, status=500)):
        wait_for(lambda: len(received) > 3)  # another error of the same series is not printed
    saved = conftest.rows_in(tmp_path / "run")
    with visdom_server(url, tmp_path / "home"):
        page.goto(f"{url}/env/main")
        wait_for_page(page, lambda: epoch_shown(page) > saved)  # the server has kept older ones
        process.send(signal.SIGINT)
        result = process.finished()
    assert "The run goes on" in result.stderr and "HTTPError" not in result.stderr


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_slow_server_does_not_delay_training(start_main, url, interrupted):
    """Each window takes 2 s, so a page takes 14 s; an epoch takes far less."""
    received = []

    def drawn() -> int:
        return len([win for win, _ in received if win])

    with serve(url, stand_in(received, seconds=2)):
        process = start_main(f"{QUICK} --epochs {100000 if interrupted else 3} --visdom {url}")
        wait_for(lambda: process.trained(3))
        assert drawn() < len(PANES)  # epoch 0 is still being drawn
        if interrupted:
            process.send(signal.SIGINT)
        result = process.finished()
        assert (result.returncode == 0) is not interrupted
        if interrupted:
            assert drawn() < len(PANES)  # an interrupted run does not wait
        else:  # it has waited ten seconds for the last page, and no longer
            assert drawn() < 2 * len(PANES)
            assert "does not show the last epoch" in result.stdout


def test_a_local_server_ignores_proxies_and_uses_netrc(run_main, url, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    (tmp_path / "home" / ".netrc").write_text("machine localhost login me password secret\n")
    received = []
    with serve(url, stand_in(received)):
        succeeded(run_main(f"{QUICK} --epochs 1 --visdom {url}"))
    me = base64.b64encode(b"me:secret").decode()
    assert {password for _window, password in received} == {f"Basic {me}"}


def test_a_drawing_error_does_not_stop_training(run_main, dashboard, monkeypatch):
    monkeypatch.setattr(main.Dashboard, "draw_kl", lambda *_: 1 / 0)
    result = run_main(f"{dashboard} --epochs 3")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 0 and "ZeroDivisionError" in line


@pytest.mark.usefixtures("patient")
def test_no_visdom_and_resuming_with_a_dashboard(run_main, a_run, shared_url):
    assert "Dashboard" not in succeeded(run_main("--resume run --epochs 2")).stdout
    again = succeeded(run_main(f"--resume run --epochs 3 --visdom {shared_url}"))
    assert "Dashboard" in again.stdout
    assert load_checkpoint(a_run)["options"]["visdom"] == shared_url
