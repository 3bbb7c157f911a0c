"""The page: seven windows on a real Visdom server, seen in headless Chromium; and the server that
main.py starts. What happens when a server fails is in test_server.py.
"""

import base64
import contextlib
import io
import itertools
import os
import re
import shutil
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import conftest
import fake_npm
import numpy as np
import pexpect
import pytest
import torch
import visdom
from conftest import PATIENCE, QUICK, made_up, metrics, port, train, wait_for
from PIL import Image
from playwright.sync_api import expect
from torch.distributions import Normal, kl_divergence

import main

pytestmark = pytest.mark.usefixtures("patient")
PANES, PICTURES = tuple(main.WINDOW_SIZES), ("x", "x_hat", "traversal", "samples")
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


@contextlib.contextmanager
def killed_afterwards(pid: int):
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # it may be another process's child
            os.waitpid(pid, 0)


@contextlib.contextmanager
def visdom_server(url: str, home: Path):
    """A server that keeps its pages in this home."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setenv("HOME", str(home))
        main.start_visdom(url)
    with killed_afterwards(pid_in(output.getvalue())):
        yield


@pytest.fixture(scope="session")
def shared_url(page_scripts, tmp_path_factory):
    """The URL of a server shared by the tests that do not start or stop one."""
    url = conftest.free_url()
    with visdom_server(url, tmp_path_factory.mktemp("visdom")):
        yield url


@pytest.fixture
def env(request) -> str:
    """A Visdom environment for this test alone."""
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def address(shared_url, env) -> str:
    """The page of this test on the shared server."""
    return f"{shared_url}/env/{env}"


@pytest.fixture
def shown_there(shared_url, env) -> str:
    """Options for a run on that page."""
    return f"{QUICK} --visdom {shared_url} --env {env}"


def pid_in(output: str) -> int:
    return int(re.findall(r"to stop it: kill (\d+)", output)[-1])


# ---- what the page shows ----
def wait_for_page(page, condition):
    """Wait for a condition; Playwright handles the page's events only while it waits."""
    return wait_for(lambda: page.wait_for_timeout(50) or condition())


def pane(page, win: str):
    """The pane of this window, by its title: "NAME: ...", but for `loss` and `samples`."""
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


def assert_shows(page, address: str, run: Path | str) -> None:
    """All seven panes are there and show the last epoch of this run."""
    rows = metrics(run)
    page.goto(address)
    expect(page.locator(".react-grid-item")).to_have_count(7)
    caption = pane(page, "loss").locator(".annotation-text")
    newest = f"epoch {len(rows)}: -ELBO {rows[-1]['neg_elbo']:.2f}"
    expect(caption).to_have_text(f"{newest} ({Path(run).name})")


def fits(page) -> bool:
    """Whether all panes lie below the page's bar and within the page, none overlaps another or the
    filter box of Visdom 0.3.0, and no picture, plot or caption is cut.
    """
    panes = [edges(pane(page, win)) for win in PANES]
    corner = edges(page.get_by_placeholder("Filter text"))
    apart = all(
        one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        for one, two in itertools.combinations([corner, *panes], 2)
    )
    caption = edges(pane(page, "loss").locator(".annotation-text"))
    whole = panes[PANES.index("loss")][0] <= caption[0] and caption[2] <= panes[2][2]
    for win, (left, _, right, bottom) in zip(PANES, panes, strict=True):
        content = pane(page, win).locator("img, .main-svg").first
        x, y, x_2, y_2 = edges(content)
        if win in PICTURES:  # the lowest twentieth is white, for Visdom 0.2.4 to cut it off
            y_2 -= 0.045 * (y_2 - y)
        whole = whole and x >= left - 2 and x_2 <= right + 2 and y_2 <= bottom + 2
    inside = all(0 <= x and 50 <= y and x_2 <= 1280 and y_2 <= 650 for x, y, x_2, y_2 in panes)
    return apart and whole and inside


def test_seven_panes_fit_a_laptop_and_show_the_run(page, address, shown_there, few_digits, capsys):
    run = train(f"{shown_there} --epochs 3 --beta 0.5")  # with the name that a run gets by itself
    assert f"Dashboard: {address}\n" in capsys.readouterr().out
    assert_shows(page, address, run)
    wait_for_page(page, lambda: fits(page))
    for win in PICTURES:
        saved = np.asarray(Image.open(run / f"{win}.png").convert("L")) / 255
        assert np.abs(picture(page, win)[: len(saved)] - saved).max() < 0.02
    rows = metrics(run)
    columns = ("train_loss", "neg_elbo", "test_loss", "bce", "kl")
    curves = [[row[column] for row in rows] for column in columns]
    assert plotted(page, "loss") == [pytest.approx(ys, rel=1e-5) for ys in curves]
    assert plotted(page, "loss", "x") == [[1, 2, 3]] * 5
    assert plotted(page, "loss", "name") == ["train", "-ELBO", "test", "bce", "kl"]

    images = main.load_images("MNIST", few_digits)
    mu, sigma = main.load_model(run).encode(images.test / 255)
    kl = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).mean(0)
    (bars,), (units,) = plotted(page, "kl"), plotted(page, "kl", "x")
    assert units == list(range(1, 11)) and bars == pytest.approx(kl.tolist(), rel=1e-4)
    pair = sorted(kl.argsort(descending=True)[:2].tolist())
    for axis, unit in zip("xy", pair, strict=True):
        expect(pane(page, "latent").locator(f".{axis}title")).to_have_text(f"mu of unit {unit + 1}")
        for label, shown in enumerate(plotted(page, "latent", axis)):
            expected = mu[images.test_labels == label, unit].tolist()
            assert shown == pytest.approx(expected, abs=1e-5)
    assert plotted(page, "latent", "name") == [str(label) for label in range(10)]


def test_a_page_that_was_open_all_along(page, address, shown_there, shared_url, env, monkeypatch):
    """It has the last epoch. A new run closes the seven windows of the run before as it begins,
    and no other, whatever its name; a resumed run closes none.
    """
    client = main.Client(shared_url, env)
    client.text("first", win="loss")
    page.goto(address)
    train(f"{shown_there} --epochs 9 --run run")
    train("--resume run --epochs 10")
    wait_for_page(page, lambda: epoch_shown(page) == 10)
    # Plotly can get new data without drawing it.
    drawn = pane(page, "loss").locator(".scatterlayer .trace").first.locator(".point")
    expect(drawn).to_have_count(9)

    monkeypatch.setattr(main, "experiment", lambda *_: None)
    train("--resume run --epochs 11")
    client.text("second", win="second")
    expect(page.locator(".react-grid-item")).to_have_count(9)
    train(f"{shown_there} --epochs 2 --run another")
    expect(page.locator(".react-grid-item")).to_have_count(2)
    expect(page.locator(".react-grid-item").first).to_contain_text("first")


@pytest.fixture
def draw(few_digits, address, shown_there, page):
    """Draw a history of this many epochs and an untrained model. Returns the evaluation."""
    args = main.parser.parse_args([*shown_there.split(), "--resume", "run"])

    def draw(
        epochs, latent_dim=10, change=lambda images: images, seed=0, spread=1
    ) -> main.Evaluation:
        images, evaluation, history = made_up(few_digits, epochs, latent_dim, seed)
        evaluation = evaluation._replace(mu=spread * evaluation.mu)
        main.Dashboard(args, "run", change(images)).show(history, evaluation)
        if page.url != address:
            page.goto(address)
        wait_for_page(page, lambda: epoch_shown(page) == epochs)
        return evaluation

    return draw


@pytest.mark.parametrize("epochs", [1, 3, 100])
def test_the_loss_is_readable_at_any_epoch(draw, page, epochs):
    """The first tenth is left out, so the rest fills the plot; ticks are at whole epochs."""
    draw(epochs)
    first = epochs // 10 + 1
    assert plotted(page, "loss", "x")[0] == list(range(first, epochs + 1))
    plot = pane(page, "loss").locator(".js-plotly-plot")
    bottom, top = plot.evaluate("plot => plot._fullLayout.yaxis.range")
    assert epochs == 1 or 50 / first - 50 / epochs > 0.7 * (top - bottom)
    ticks = pane(page, "loss").locator(".xtick").all_text_contents()
    assert ticks and all(tick.isdigit() for tick in ticks)
    if epochs < 10:
        assert ticks == [str(epoch) for epoch in range(1, epochs + 1)]
        expect(plot.locator(".scatterlayer .point")).to_have_count(2 * epochs)


@pytest.mark.parametrize("latent_dim", [1, 2, 20])
def test_any_number_of_units_fits_the_page(draw, page, latent_dim):
    draw(3, latent_dim)
    if latent_dim > 1:  # Visdom cannot draw a single bar
        wait_for_page(page, lambda: fits(page))
        assert [len(bars) for bars in plotted(page, "kl")] == [latent_dim]
    title = "unit 1 across, unit 2 up" if latent_dim == 2 else f"units 1 to {latent_dim}, "
    expect(pane(page, "traversal")).to_contain_text(title)
    rows, columns = (15, 15) if latent_dim == 2 else (latent_dim, 9)
    height, width = 30 * rows + 2, 30 * columns + 2
    assert picture(page, "traversal").shape == (height + height // 20, width)  # and some white
    if latent_dim == 2:  # as in the traversal
        expect(pane(page, "latent").locator(".xtitle")).to_have_text("mu of unit 1")
        expect(pane(page, "latent").locator(".ytitle")).to_have_text("mu of unit 2")


def test_the_axes_of_latent_follow_its_units(draw, page):
    shown = set()
    for seed in range(4):  # each model has other units of highest KL
        kl = draw(seed + 1, seed=seed).kl_per_unit
        units = sorted((1 + kl.argsort(descending=True)[:2]).tolist())
        for axis, unit in zip("xy", units, strict=True):
            title = pane(page, "latent").locator(f".{axis}title")
            expect(title).to_have_text(f"mu of unit {unit}")
        shown.add(tuple(units))
    assert len(shown) > 1


@pytest.mark.parametrize("spread", [1, 100])
def test_latent_shows_all_points_at_one_scale(draw, page, spread):
    """At least from -4 to 4, so that the size of the cloud can be compared with the prior's."""
    draw(1, spread=spread)
    scales, plot = [], pane(page, "latent").locator(".js-plotly-plot")
    for axis in "xy":
        low, high = plot.evaluate(f"plot => plot._fullLayout.{axis}axis.range")
        points = [point for label in plotted(page, "latent", axis) for point in label]
        assert low <= min(-4, *points) and max(4, *points) <= high
        scales.append((high - low) / plot.evaluate(f"plot => plot._fullLayout.{axis}axis._length"))
    assert scales[0] == pytest.approx(scales[1]) and (max(points) > 4) == (spread == 100)


def test_labels_of_twelve_classes(draw, page):
    """The last class is not among them, nor are most others."""

    def relabelled(images):
        labels = torch.full((500,), 2).index_fill(0, torch.arange(200), 10)
        return images._replace(test_labels=labels, classes=[f"class {i}" for i in range(12)])

    draw(3, change=relabelled)
    wait_for_page(page, lambda: plotted(page, "latent", "name") == ["class 2", "class 10"])
    assert [len(points) for points in plotted(page, "latent")] == [300, 200]


def test_a_curve_stays_visible_after_a_click_on_the_legend(draw, page):
    def visible() -> list:
        plot = pane(page, "loss").locator(".js-plotly-plot")
        return plot.evaluate("plot => plot._fullData.map(curve => curve.visible)")

    draw(3)
    assert visible() == [True] * 2 + ["legendonly"] * 3
    pane(page, "loss").locator(".legendtoggle").nth(2).click()
    wait_for_page(page, lambda: visible()[2] is True)
    draw(4)
    assert visible() == [True] * 3 + ["legendonly"] * 2


def test_two_runs_compared(page, shown_there, shared_url):
    train(f"{shown_there} --epochs 3 --env first")
    train(f"{shown_there} --recipe article --epochs 2 --env second")
    page.goto(f"{shared_url}/compare/first+second")
    wait_for_page(page, lambda: [len(ys) for ys in plotted(page, "loss")] == [3] * 5 + [2] * 5)


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
    unreachable, few_digits, bare_visdom, page, url, tmp_path, monkeypatch, capsys
):
    """It installs scripts from npm, once, listens on localhost only, does not import PyTorch, and
    survives the run and package upgrades.
    """
    monkeypatch.setenv("PATH", fake_npm.with_network(tmp_path / "bin"))
    train(f"{QUICK} --epochs 2 --data {few_digits} --run run --visdom {url}")
    output = capsys.readouterr().out
    with killed_afterwards(pid_in(output)):
        assert output.count("Installing the scripts") == 1
        assert_shows(page, f"{url}/env/main", "run")
        maps = Path(f"/proc/{pid_in(output)}/maps")  # Linux only
        assert not maps.exists() or "libtorch" not in maps.read_text()
        with pytest.raises(OSError):  # it listens at 127.0.0.1 only
            socket.create_connection(("127.0.0.2", port(url)), timeout=3)

        monkeypatch.setenv("PATH", "/nowhere")
        for module in bare_visdom.rglob("*.py"):  # as in a package upgrade
            module.touch()
        train("--resume run --epochs 12")
        output = capsys.readouterr().out
        assert "to stop it" not in output and "Installing" not in output
        assert_shows(page, f"{url}/env/main", "run")


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_ctrl_c_in_a_terminal_of_80_columns(mnist, url, shell):
    """It ends the run with one line, which is not mixed with tqdm's bar, and the shell's loop, but
    not the server, although a terminal sends it to all processes of its foreground group.
    """
    python = f"{sys.executable} {main.__file__} --data {mnist} --visdom {url}"
    loop = f"for seed in 0 1; do {python} --seed $seed; done; echo went on"
    terminal = pexpect.spawn(
        shell, ["-c", loop], timeout=PATIENCE, dimensions=(24, 80), encoding="utf-8"
    )
    terminal.expect(r"to stop it: kill \d+")
    with killed_afterwards(pid_in(terminal.after)):
        terminal.expect(r" [1-9]\d*/1875")  # in the middle of an epoch
        terminal.sendintr()
        *shown, sentence = re.split(r"[\r\n]+", terminal.read().strip())
        assert sentence == "main.py: interrupted" and max(map(len, shown)) <= 80
        assert "Traceback" not in "".join(shown) and main.is_listening(port(url))


@pytest.mark.parametrize("visdom_can", [True, False, "not be asked"])
def test_page_scripts_without_npm(
    unreachable, few_digits, bare_visdom, url, tmp_path, monkeypatch, capsys, visdom_can
):
    """Visdom's own download, replaced by a stub, as its hosts may be out of reach. Where it fails,
    which it does without an exception, no server is started: its page would be blank. Where its
    host cannot be reached at all, it is not called: it would wait for each of twenty files.
    """

    def download_scripts():
        assert visdom_can != "not be asked"
        places = list(main.PAGE_SCRIPTS.values())
        for place in places if visdom_can else places[1:]:
            (bare_visdom / "visdom" / "static" / place).parent.mkdir(exist_ok=True)
            (bare_visdom / "visdom" / "static" / place).touch()

    stub = SimpleNamespace(download_scripts=download_scripts)
    monkeypatch.setitem(sys.modules, "visdom.server.build", stub)
    if visdom_can != "not be asked":
        monkeypatch.setattr(main.requests, "head", lambda *_, **__: None)
    npm = "echo 'npm error code E404' >&2; echo 'npm error 404' >&2; exit 1"
    monkeypatch.setenv("PATH", fake_npm.running(tmp_path / "bin", npm))
    train(f"{QUICK} --epochs 1 --data {few_digits} --visdom {url}")
    output, errors = capsys.readouterr()
    if visdom_can is True:
        with killed_afterwards(pid_in(output)):
            assert "Dashboard" in output
    else:
        (line,) = [line for line in errors.splitlines() if "E404" in line]
        assert "scripts" in line and "npm error 404" in line and line.endswith("The run goes on.")
        assert "to stop it" not in output


def test_two_first_runs_start_one_server(url, capsys):
    with ThreadPoolExecutor() as pool:
        list(pool.map(main.start_visdom, [url, url]))
    output = capsys.readouterr().out
    with killed_afterwards(pid_in(output)):
        assert output.count("to stop it") == 1


def test_a_server_that_ends_and_comes_back(page, url, tmp_path, few_digits, capsys):
    """The page is whole again, by the last epoch where the new server has not kept it."""
    images, evaluation, history = made_up(few_digits, epochs=10)

    def epoch_on_a_whole_page() -> int:
        page.goto(f"{url}/env/main")
        expect(page.locator(".react-grid-item")).to_have_count(7)
        return epoch_shown(page)

    with visdom_server(url, tmp_path / "home"):
        args = main.parser.parse_args(["--visdom", url, "--epochs", "10"])
        dashboard = main.Dashboard(args, "run", images)
        dashboard.show(history[:1], evaluation)
    for epoch in range(2, 10):
        dashboard.show(history[:epoch], evaluation)
    assert capsys.readouterr().err.count("The run goes on") == 1
    with visdom_server(url, tmp_path / "home"):
        wait_for_page(page, lambda: epoch_on_a_whole_page() == 1)
    with visdom_server(url, tmp_path / "another home"):
        dashboard.show(history, evaluation)
        wait_for_page(page, lambda: epoch_on_a_whole_page() == 10)
