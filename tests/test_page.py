"""The page: seven windows on a real Visdom server, seen in headless Chromium; and the server that
main.py starts. What happens when a server fails is in test_server.py.
"""

import base64
import contextlib
import io
import itertools
import os
import re
import runpy
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import conftest
import fake_npm
import numpy as np
import pexpect
import pytest
import torch
import visdom
from conftest import PATIENCE, QUICK, metrics, port, succeeded, wait_for
from filelock import FileLock
from PIL import Image
from playwright.sync_api import expect
from torch.distributions import Normal, kl_divergence

import main

PANES = ("x", "x_hat", "loss", "traversal", "kl", "samples", "latent")  # how titles begin
expect.set_options(timeout=1000 * PATIENCE)


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
    page.set_default_timeout(1000 * PATIENCE)
    return page


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
    url = conftest.free_url()
    with visdom_server(url, tmp_path_factory.mktemp("visdom")):
        yield url


@pytest.fixture
def address(shared_url, env) -> str:
    """The page of this test on the shared server."""
    return f"{shared_url}/env/{env}"


@pytest.fixture
def dashboard(shared_url, env, patient) -> str:
    """Options for a run that is shown there."""
    return f"{QUICK} --visdom {shared_url} --env {env}"


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
    page.goto(address)
    expect(page.locator(".react-grid-item")).to_have_count(7)
    caption = pane(page, "loss").locator(".annotation-text")
    expect(caption).to_have_text(
        f"epoch {len(rows)}: -ELBO {rows[-1]['neg_elbo']:.2f} ({run.name})"
    )
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
    columns = ("train_loss", "test_loss", "neg_elbo", "bce", "kl")
    curves = [[row[column] for row in rows] for column in columns]
    assert plotted(page, "loss") == [pytest.approx(ys) for ys in curves]
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
    rows = [{"epoch": n, "bce": 30 + 50 / n, "kl": 20} for n in range(1, epochs + 1)]
    losses = ("train_loss", "test_loss", "neg_elbo")
    return [row | dict.fromkeys(losses, row["bce"] + row["kl"]) for row in rows]


@pytest.fixture
def draw(environment, few_digits, address, dashboard):
    """Draw a history and the evaluation of an untrained model."""

    def draw(history, latent_dim=10, letters=False, few_white=False) -> str:
        images = main.load_images("MNIST", few_digits)
        if few_white:
            images = images._replace(test=255 - images.test[:10] // 9)
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
    if epochs == 1:
        (tick,) = pane(page, "loss").locator(".xtick text").all()
        point = pane(page, "loss").locator(".scatterlayer .point").first
        (left, _, right, _), (point_left, _, point_right, _) = edges(tick), edges(point)
        assert tick.text_content() == "1" and abs(left + right - point_left - point_right) < 4


def test_before_the_first_epoch_there_is_no_empty_grid(draw, page):
    page.goto(draw(history_of(0)))
    expect(pane(page, "loss")).to_contain_text("epoch 0 (run)")
    expect(pane(page, "loss").locator(".gridlayer path")).to_have_count(0)


def test_few_and_white_images(draw, page):
    """The panes stay where they are, and the images have edges."""
    page.goto(draw(history_of(3)))
    wait_for_page(page, lambda: epoch_shown(page) == 3)
    places = {win: edges(pane(page, win)) for win in PANES}
    draw(history_of(4), few_white=True)
    wait_for_page(page, lambda: epoch_shown(page) == 4)
    row = picture(page, "x")[14]
    assert row[5] > 0.99 and row[1] < 0.8 and row[33] < 0.8  # an image, and beside it
    page.reload()
    wait_for_page(page, lambda: epoch_shown(page) == 4)
    wait_for_page(page, lambda: {win: edges(pane(page, win)) for win in PANES} == places)


@pytest.mark.parametrize("latent_dim", [1, 2, 10, 50])
def test_any_number_of_units_fits_the_page(draw, page, latent_dim):
    page.goto(draw(history_of(3), latent_dim))
    wait_for_page(page, lambda: epoch_shown(page) == 3)
    wait_for_page(page, lambda: all(edges(pane(page, win))[3] <= 650 for win in PANES))
    assert [len(bars) for bars in plotted(page, "kl")] == [latent_dim]
    title = "unit 1 across, unit 2 up" if latent_dim == 2 else f"row = unit 1 to {latent_dim}, "
    expect(pane(page, "traversal")).to_contain_text(title)
    rows, columns = (15, 15) if latent_dim == 2 else (latent_dim, 9)
    height = max(rows, 4) * 32 - 4
    assert picture(page, "traversal").shape == (height, columns * 32 + 4)


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


@fake_npm.needs_npm
def test_main_starts_a_server(
    unreachable, run_main, few_digits, bare_visdom, page, url, kill_later, tmp_path, monkeypatch
):
    """It installs scripts from npm, once, listens on localhost only, does not import PyTorch, and
    survives the run and package upgrades.
    """
    monkeypatch.setenv("PATH", fake_npm.with_network(tmp_path / "bin"))
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
    again = succeeded(run_main("--resume run --epochs 12"))
    assert "to stop it" not in again.stdout
    assert_shows(page, f"{url}/env/main", tmp_path / "run")

    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not answers(url))
    monkeypatch.setenv("PATH", "/nowhere")
    again = run_main("--resume run --epochs 13")
    kill_later(again.stdout)
    assert "Installing" not in succeeded(again).stdout
    assert_shows(page, f"{url}/env/main", tmp_path / "run")


def test_ctrl_c_in_a_terminal_does_not_end_the_server(environment, url, kill_later):
    """A terminal sends it to all processes of its foreground group."""
    command = f"{main.__file__} {QUICK} --visdom {url}".split()
    terminal = pexpect.spawn(sys.executable, command, timeout=PATIENCE, encoding="utf-8")
    terminal.expect(r"to stop it: kill \d+")
    kill_later(terminal.after)
    terminal.expect(r"\r +1 +\d+\.")  # the first row
    terminal.sendintr()
    assert "To continue" in terminal.read()
    terminal.wait()
    wait_for(lambda: answers(url))


@pytest.mark.parametrize("visdom_can", [True, False])
def test_page_scripts_without_npm(
    unreachable, run_main, few_digits, bare_visdom, url, kill_later, monkeypatch, visdom_can
):
    """Visdom's own download, replaced by a stub. It fails without an exception."""
    files = [bare_visdom / "visdom" / "static" / place for place in main.PAGE_SCRIPTS.values()]

    def download_scripts():
        for file in files if visdom_can else files[1:]:
            file.parent.mkdir(exist_ok=True)
            file.touch()

    stub = SimpleNamespace(download_scripts=download_scripts)
    monkeypatch.setitem(sys.modules, "visdom.server.build", stub)
    result = run_main(f"{QUICK} --epochs 1 --data {few_digits} --visdom {url}")
    if visdom_can:
        kill_later(succeeded(result).stdout)
        assert all(file.exists() for file in files)
    else:
        (line,) = result.stderr.splitlines()
        assert result.returncode == 0 and "scripts" in line and "to stop it" not in result.stdout


def test_two_first_runs_start_one_server(start_main, url, kill_later):
    options = f"--epochs 1 --visdom {url}"
    runs = [start_main(f"{QUICK} {options} --run {name} --env {name}") for name in "ab"]
    results = [run.finished() for run in runs]
    output = "".join(result.stdout for result in results)
    kill_later(output)
    assert [result.returncode for result in results] == [0, 0]
    assert output.count("to stop it: kill") == 1


def test_the_page_is_kept_by_a_server_that_is_restarted(run_main, page, url, tmp_path):
    home = tmp_path / "home"
    with visdom_server(url, home) as server:
        result = succeeded(run_main(f"{QUICK} --epochs 2 --run run --visdom {url}"))
        assert "to stop it" not in result.stdout  # it is not ours
        server.kill()
        server.wait()
    with visdom_server(url, home):
        assert_shows(page, f"{url}/env/main", tmp_path / "run")


def test_the_page_comes_back_with_its_server(start_main, page, url, tmp_path):
    """Also where the new server has not kept it."""
    with visdom_server(url, tmp_path / "home") as server:
        process = start_main(f"{QUICK} --epochs 100000 --run run --visdom {url}")
        wait_for(process.trained)
        server.kill()
        server.wait()
    wait_for(lambda: "Error" in process.err.read_text())
    saved = len(metrics(tmp_path / "run"))
    with visdom_server(url, tmp_path / "another home"):
        wait_for(lambda: answers(f"{url}/env/main"))
        page.goto(f"{url}/env/main")
        wait_for_page(page, lambda: epoch_shown(page) > saved)
