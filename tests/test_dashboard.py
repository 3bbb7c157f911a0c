"""The dashboard as a person sees it: the real Visdom server, a real headless Chromium."""

import base64
import contextlib
import csv
import http.server
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
from conftest import changed_copy, finished, npm_with_a_way_out, succeeded, trained, wait_for
from PIL import Image
from playwright.sync_api import expect
from torch.distributions import Normal, kl_divergence

import main

PANES = ("x", "x_hat", "loss", "traversal", "kl", "samples", "latent")  # how titles begin
SMALL = ("--batch-size", 100, "--run", "run")
expect.set_options(timeout=300_000)  # the patience of wait_for


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict:
    """Chromium from the PATH, else playwright's own (`playwright install chromium`)."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    return {"executable_path": chromium, "args": ["--disable-gpu"]}


@pytest.fixture(scope="session")
def browser_context_args() -> dict:
    return {"viewport": {"width": 1300, "height": 800}}


@pytest.fixture
def url() -> str:
    """Of a free port, below those that the system gives to outgoing connections."""
    while True:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.randrange(20_000, 30_000)))
            return f"http://localhost:{free.getsockname()[1]}"


def port(url: str) -> int:
    return int(url.rpartition(":")[2])


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


@pytest.fixture
def start_visdom(environment):
    """Starts Visdom's own server, as in another terminal, and returns its process."""
    processes = []
    main.install_web_files()

    def start(url: str) -> subprocess.Popen:
        code = "from visdom.server.run_server import main; main()"
        command = [sys.executable, "-c", code, "-port", str(port(url))]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen(command, env=environment, **quiet))
        wait_for(lambda: answers(url) or processes[-1].poll() is not None)
        assert processes[-1].poll() is None, "Visdom's server has ended"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(url, timeout=5).status == 200
    except OSError:
        return False


def pane(page, win: str):
    """The pane whose bar has the window's title, which begins with its name."""
    title = page.get_by_text(re.compile(rf"^{win}( from the prior|: .*)$"))
    return page.locator(".react-grid-item").filter(has=title).first


def picture(page, win: str) -> np.ndarray:
    """The image that a pane shows, decoded from the page, in [0, 1]."""
    source = pane(page, win).locator("img").get_attribute("src")
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("L")) / 255


def plotted(page, win: str, what: str = "y") -> list:
    """The y of each of a pane's curves or bars, or their x or name; none while it has no plot."""
    plot = pane(page, win).locator(".js-plotly-plot")
    return plot.evaluate(f"plot => plot.data.map(curve => curve.{what})") if plot.count() else []


def windows(url: str, env: str) -> list[dict]:
    """What the server has of an environment, by Visdom's own client."""
    client = visdom.Visdom(port=port(url), env=env, use_incoming_socket=False)
    return list(json.loads(client.get_window_data(env=env)).values())


def see(page, condition):
    """Polls the page, which lives only while Playwright waits."""
    return wait_for(lambda: page.wait_for_timeout(50) or condition())


def edges(locator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom."""
    box = locator.bounding_box()
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def first_epoch(epochs: int) -> int:
    """The first whose loss is shown: the cube root of all leaves out a third of a log axis."""
    return next(n for n in range(epochs, 0, -1) if n**3 <= epochs)


def assert_whole(page, url: str, epochs: int, article: bool = False) -> None:
    """Seven filled panes, with room to spare on the screen, that tell their run and epoch."""
    complaints = []
    page.on("pageerror", lambda error: complaints.append(f"error {error}"))
    page.on("console", lambda said: complaints.append(f"{said.type} {said.text} {said.location}"))
    page.goto(url)
    expect(page.locator(".react-grid-item")).to_have_count(7)
    curves, shown = 3 if article else 2, epochs - first_epoch(epochs) + 1
    see(page, lambda: [len(curve) for curve in plotted(page, "loss")] == [shown] * curves)
    for win, text in {"x": "run", "x_hat": f"epoch {epochs}", "kl": f"epoch {epochs}"}.items():
        expect(pane(page, win)).to_contain_text(text)
    with open("run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    elbo = [float(row["bce"]) + float(row["kl"]) for row in rows]
    assert plotted(page, "loss")[-1] == pytest.approx(elbo[-shown:], rel=1e-6)
    expect(pane(page, "loss")).to_contain_text("-ELBO, test")
    assert len(plotted(page, "latent")) == 10

    def on_the_screen(left, top, right, bottom) -> bool:
        return 0 <= left and right <= 1288 and 50 <= top and bottom <= 788

    see(page, lambda: all(on_the_screen(*edges(pane(page, win))) for win in PANES))  # in its time
    for win in PANES:
        _left, _top, right, bottom = edges(pane(page, win))
        if win in ("loss", "kl", "latent"):
            ticks = pane(page, win).locator(".xtick").all_text_contents()
            assert win == "latent" or ticks and all(tick.isdigit() for tick in ticks)
            assert edges(pane(page, win).locator(".xtitle"))[3] <= bottom
        else:
            _, _, image_right, image_bottom = edges(pane(page, win).locator("img"))
            assert image_right <= right + 2 and image_bottom <= bottom + 2
            assert picture(page, win)[:, -4:].min() == 1  # a margin right of the last digits
            assert picture(page, win).std() > 0.1
    corner = page.get_by_placeholder("Filter text")  # in Visdom 0.3 it hangs down among the panes
    for one, other in itertools.combinations([corner, *(pane(page, win) for win in PANES)], 2):
        (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = edges(one), edges(other)
        apart = max(left - right_2, left_2 - right, top - bottom_2, top_2 - bottom)
        assert apart >= (12 if one is corner else -1), f"{one} overlaps {other}"
    # None is in the way: Visdom 0.3 has no favicon at all; the last two are for graphs of nodes.
    known = ("mathjax", "favicon.png", "saveSvgAsPng", "js/d3")
    errors = [line for line in complaints if line.startswith("error")]
    assert [line for line in errors if not any(name in line for name in known)] == []


@pytest.fixture
def bare_visdom(tmp_path) -> Path:
    """A folder for PYTHONPATH with Visdom as it is installed, without its page's scripts."""
    copy = shutil.copytree(Path(visdom.__file__).parent, tmp_path / "packages" / "visdom")
    for place in (*main.WEB_FILES.values(), "version.built"):
        (copy / "static" / place).unlink(missing_ok=True)
    return copy.parent


@conftest.needs_npm
def test_scripts_come_from_npm_where_the_cdns_are_dead(
    unreachable, start_main, few_digits, bare_visdom, page, url, kill_later, tmp_path
):
    path = npm_with_a_way_out(tmp_path / "bin")
    cut_off = unreachable | {"PYTHONPATH": str(bare_visdom), "PATH": path}
    options = ("--epochs", 3, "--data", few_digits, "--visdom", url)
    result = succeeded(finished(start_main(*SMALL, *options, env=cut_off)))
    assert result.stdout.count("Fetching the scripts") == 1
    pid = kill_later(result.stdout)
    assert_whole(page, url, 3)

    for module in bare_visdom.rglob("*.py"):  # as an upgrade of the package would
        module.touch()
    time.sleep(2)
    assert answers(url)  # still
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not answers(url))
    cut_off["PATH"] = "/nowhere"
    again = succeeded(finished(start_main("--resume", "run", "--epochs", 4, env=cut_off)))
    kill_later(again.stdout)
    assert "Fetching" not in again.stdout  # it happens once
    assert_whole(page, url, 4)


def test_scripts_that_cannot_be_had_cost_one_line(
    unreachable, start_main, few_digits, bare_visdom, url, kill_later
):
    cut_off = unreachable | {"PYTHONPATH": str(bare_visdom)}
    options = ("--epochs", 1, "--data", few_digits, "--visdom", url)
    result = finished(start_main(*SMALL, *options, env=cut_off))
    assert result.returncode == 0
    kill_later(result.stdout)
    (line,) = result.stderr.splitlines()
    assert "blank" in line and "npm" in line


def test_another_server_without_scripts_is_told(
    run_main, environment, few_digits, bare_visdom, url
):
    """One that was started by hand, say, where they could not be fetched."""
    main.install_web_files()  # so this machine has them, but not that server
    code = "from visdom.server.run_server import main; main()"
    command = [sys.executable, "-c", code, "-port", str(port(url))]
    settings = {"env": environment | {"PYTHONPATH": str(bare_visdom)}}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **settings, **quiet) as bare:
        wait_for(lambda: answers(url))
        result = run_main(*SMALL, "--epochs", 1, "--data", few_digits, "--visdom", url)
        bare.kill()
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert url in line and "blank" in line and "stop it" in line


def test_seven_panes_of_a_finished_run_and_then_those_of_the_next(
    run_main, start_main, few_digits, mnist, page, url, kill_later
):
    options = ("--recipe", "article", "--data", few_digits, "--epochs", 5, "--no-visdom")
    succeeded(run_main(*SMALL, *options))
    result = succeeded(run_main("--resume", "run", "--visdom", url))
    assert "Nothing is left to train" in result.stdout
    kill_later(result.stdout)
    assert_whole(page, url, 5, article=True)
    _, test_images, labels, _ = main.load_images("MNIST", few_digits)
    groups = [len(group) for group in plotted(page, "latent")]
    assert groups == labels[:1000].bincount().tolist()  # all digits, by label
    assert min(map(min, plotted(page, "latent"))) == 0  # the article's mu is never negative
    expect(pane(page, "x")).to_contain_text("run, batch_size 100, recipe article")
    first = picture(page, "x")[4:32, 4:32]
    assert np.abs(first - test_images[0, 0].numpy() / 255).max() < 0.01
    start_main("--data", mnist, "--batch-size", 1, "--run", "second", "--visdom", url)
    expect(pane(page, "x")).to_contain_text("second, batch_size 1")
    expect(pane(page, "x_hat")).to_contain_text("epoch 0")
    see(page, lambda: plotted(page, "loss") == [[], []])


def test_the_page_is_live(start_main, start_visdom, few_digits, page, url):
    start_visdom(url)
    process = start_main("--batch-size", 3, "--data", few_digits, "--visdom", url)
    wait_for(lambda: trained(process))
    page.goto(url)
    page.wait_for_selector(".react-grid-item img")
    see(page, lambda: plotted(page, "loss"))
    digits, before, drawn = picture(page, "x"), picture(page, "x_hat"), plotted(page, "loss")
    see(page, lambda: len(plotted(page, "loss")[0]) > len(drawn[0]))
    see(page, lambda: (picture(page, "x_hat") != before).any())
    assert (picture(page, "x") == digits).all()


def test_other_environments_and_latent_dims(start_main, few_digits, page, url, kill_later):
    options = ("--env", "a/b c", "--latent-dim", 1, "--epochs", 2, "--visdom", url)
    process = start_main(*SMALL, *options, "--data", few_digits)
    line = wait_for(lambda: next(filter(re.compile("Dashboard: ").match, process.stdout), None))
    address = line.split()[1]
    assert answers(address)  # from the moment it is printed
    kill_later(line)
    assert finished(process).stderr == ""
    page.goto(address)
    expect(page.locator(".react-grid-item")).to_have_count(7)
    see(page, lambda: plotted(page, "kl"))
    assert [len(bars) for bars in plotted(page, "kl")] == [1]
    assert len(plotted(page, "latent")) == 10


def test_two_runs_compared_and_the_plane_of_two_units(
    run_main, few_digits, page, url, kill_later, tmp_path
):
    options = ("--batch-size", 100, "--data", few_digits, "--visdom", url)
    result = succeeded(run_main(*options, "--epochs", 3, "--latent-dim", 2, "--env", "first"))
    kill_later(result.stdout)
    succeeded(run_main(*options, "--epochs", 5, "--recipe", "article", "--env", "second"))
    page.goto(f"{url}/env/first")
    see(page, lambda: plotted(page, "loss"))
    assert picture(page, "traversal").shape == (15 * 32 + 4, 15 * 32 + 4)
    assert pane(page, "kl").locator(".xtick").all_text_contents() == ["1", "2"]
    (run,) = (tmp_path / "runs").glob("*-elbo-*")
    assert Image.open(run / "traversal.png").size == (484, 484)
    page.goto(f"{url}/compare/first+second")
    see(page, lambda: [len(curve) for curve in plotted(page, "loss")] == [3, 3, 5, 5, 5])
    see(page, lambda: [len(bars) for bars in plotted(page, "kl")] == [2, 10])
    titles = {
        env: next(win["title"] for win in windows(url, env) if win["id"] == "latent")
        for env in ("first", "second")
    }
    # Clouds of points are laid over each other only if they are of the same two units.
    same = titles["first"] == titles["second"]
    assert page.get_by_text(re.compile("^latent: ")).count() == (1 if same else 0)
    legend = pane(page, "loss").locator("g.legend")
    assert edges(legend)[3] <= edges(pane(page, "loss").locator(".xy .gridlayer"))[1] + 12


def test_two_runs_in_one_environment(start_main, run_main, start_visdom, few_digits, url):
    """The second says so; one that comes after them does not."""
    start_visdom(url)
    options = ("--batch-size", 100, "--data", few_digits, "--visdom", url)
    first = start_main(*options)
    wait_for(lambda: trained(first))
    second = run_main(*options, "--epochs", 1)
    (line,) = second.stderr.splitlines()
    assert second.returncode == 0 and f"{url}/env/main" in line and "--env" in line
    succeeded(run_main(*options, "--epochs", 1, "--env", "second"))
    first.kill()
    first.wait()
    third = succeeded(run_main(*options, "--epochs", 1))
    assert f"Dashboard: {url}/env/main (this Visdom was there already)" in third.stdout


def test_other_files_of_the_folder(start_main, few_digits, url, kill_later, tmp_path):
    """Python would look for modules there first, were it not told otherwise."""
    for name in ("random", "socket", "visdom"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not what is meant')")
    options = ("--epochs", 1, "--data", few_digits, "--visdom", url)
    kill_later(succeeded(finished(start_main(*SMALL, *options))).stdout)


def test_no_file_of_the_folder_is_run_for_the_scripts(unreachable, tmp_path, monkeypatch):
    """Visdom's own download, for which a stand-in is installed."""
    package = tmp_path / "packages" / "visdom"
    (package / "server").mkdir(parents=True)
    for folder in (package, package / "server"):
        (folder / "__init__.py").touch()
    places = [str(package / "static" / place) for place in main.WEB_FILES.values()]
    download = "from pathlib import Path\ndef download_scripts():\n"
    download += f"    for place in map(Path, {places}):\n"
    download += "        place.parent.mkdir(parents=True, exist_ok=True)\n        place.touch()\n"
    (package / "server" / "build.py").write_text(download)
    (tmp_path / "visdom.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(visdom, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(main.requests, "head", lambda *_, **__: None)  # the network is there
    main.install_web_files()
    assert not (tmp_path / "run").exists()


def test_no_thread_to_draw_with(run_main, start_visdom, few_digits, url, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    start_visdom(url)
    monkeypatch.setattr(main.Dashboard, "draw", lambda *_: None)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = run_main(*SMALL, "--epochs", 2, "--data", few_digits, "--visdom", url)
    assert result.returncode == 0 and "can't start new thread" in result.stderr


def test_a_thousand_epochs_are_readable(run_main, few_digits, page, url, kill_later, tmp_path):
    """What happens after the first third of a logarithmic axis fills the plot's height."""
    succeeded(run_main(*SMALL, "--epochs", 1, "--data", few_digits, "--no-visdom"))
    checkpoint = conftest.load_checkpoint(Path("run"))
    (row,) = checkpoint["history"]
    elbo = row["bce"] + row["kl"]
    falling = {"train_loss": elbo, "test_loss": elbo, "bce": row["bce"], "kl": row["kl"]}
    checkpoint["history"] = [
        row | {"epoch": n} | {name: value * (1 + 1 / n) for name, value in falling.items()}
        for n in range(1, 1001)
    ]
    torch.save(checkpoint, "run/checkpoint.pt")
    result = succeeded(run_main("--resume", "run", "--epochs", 1000, "--visdom", url))
    kill_later(result.stdout)
    page.goto(url)
    see(page, lambda: [len(curve) for curve in plotted(page, "loss")] == [991, 991])
    plot = pane(page, "loss").locator(".js-plotly-plot")
    bottom, top = plot.evaluate("plot => plot._fullLayout.yaxis.range")
    assert 0.1 * elbo / (top - bottom) > 0.8  # from 1.1 times the last value, and not from twice
    ticks = pane(page, "loss").locator(".xtick").all_text_contents()
    assert ticks == ["10", "30", "100", "300", "1000"]


def test_an_eighth_window_as_the_readme_says(
    start_main, few_digits, page, url, kill_later, tmp_path
):
    changed_copy(tmp_path, "an eighth window")
    options = ("--epochs", 2, "--data", few_digits, "--visdom", url)
    result = succeeded(finished(start_main(*SMALL, *options, script="main.py")))
    kill_later(result.stdout)
    page.goto(url)
    expect(page.locator(".react-grid-item")).to_have_count(8)


@conftest.needs_proc
def test_started_server_is_private_outlives_the_run_and_remembers_it(
    run_main, few_digits, start_visdom, page, url, kill_later, tmp_path
):
    (tmp_path / "home" / ".visdom").mkdir(parents=True)
    (tmp_path / "home" / ".visdom" / "main.json").write_text('{"jsons": {"x')  # by a full disk
    result = succeeded(run_main(*SMALL, "--epochs", 2, "--data", few_digits, "--visdom", url))
    pid = kill_later(result.stdout)
    assert answers(url)
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    address = f"{port(url):04X}"
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{address}")]
    assert listening == [f"0100007F:{address}"]  # 127.0.0.1 alone
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not answers(url))
    start_visdom(url)
    assert_whole(page, url, 2)


def test_every_number_on_the_page(run_main, few_digits, page, url, kill_later):
    options = ("--epochs", 3, "--latent-dim", 5, "--beta", 0.5, "--data", few_digits)
    kill_later(succeeded(run_main(*SMALL, *options, "--visdom", url)).stdout)
    page.goto(url)
    see(page, lambda: len(plotted(page, "latent")) == 10)
    with open("run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows]
    elbos = [float(row["bce"]) + float(row["kl"]) for row in rows]
    test_losses = [float(row["test_loss"]) for row in rows]
    assert plotted(page, "loss") == [pytest.approx(ys) for ys in (losses, test_losses, elbos)]
    assert plotted(page, "loss", "name") == ["training loss", "test loss", "-ELBO, test"]
    assert plotted(page, "loss", "x") == [[1, 2, 3]] * 3

    _, test_images, labels, _ = main.load_images("MNIST", few_digits)
    model = main.load_model("run")
    with torch.no_grad():
        mu, sigma = model.encode(test_images / 255)
    kl = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).mean(0)
    (bars,), (units,) = plotted(page, "kl"), plotted(page, "kl", "x")
    assert list(map(int, units)) == [1, 2, 3, 4, 5] and bars == pytest.approx(kl.tolist(), rel=1e-4)

    first, second = sorted(kl.argsort(descending=True)[:2].tolist())
    assert pane(page, "latent").locator(".xtitle").text_content() == f"mu of unit {first + 1}"
    assert pane(page, "latent").locator(".ytitle").text_content() == f"mu of unit {second + 1}"
    for axis, unit in (("x", first), ("y", second)):
        for label, shown in enumerate(plotted(page, "latent", axis)):
            assert shown == pytest.approx(mu[labels == label, unit].tolist(), abs=1e-5)
    assert plotted(page, "latent", "name") == [str(label) for label in range(10)]
    dots = pane(page, "latent").locator(".scatterlayer .trace .points")
    colours = [
        dots.nth(i).locator("path").first.evaluate("dot => dot.style.fill") for i in range(10)
    ]
    assert len(set(colours)) == 10


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_slow_server_holds_up_nothing(start_main, few_digits, url, interrupted):
    """An epoch takes a fraction of a second; a server that wants 2 s a window, 14 s for a page."""
    windows = []

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "win" in message:
                time.sleep(2)
                windows.append(message["win"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"false")  # so far, as Visdom says of any window

        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serve(url, Slow) as server:
        options = ("--epochs", 1000 if interrupted else 3, "--data", few_digits, "--visdom", url)
        process = start_main(*SMALL, *options)
        wait_for(lambda: trained(process))
        assert len(windows) < len(PANES)  # the page of epoch 0 is still on its way
        if interrupted:
            process.send_signal(signal.SIGINT)
            assert finished(process).returncode == 130
            assert len(windows) < len(PANES)
        else:
            result = finished(process)  # which waits ten seconds for the last page, and no longer
            assert result.returncode == 0 and len(windows) < 2 * len(PANES)
            (line,) = result.stderr.splitlines()
            assert f"{url} is slow, and has not got the last epoch" in line
        server.shutdown()


class Grumpy(http.server.BaseHTTPRequestHandler):
    """A server that answers 500 to everything."""

    def do_POST(self):
        self.send_error(500)

    def log_message(self, *_):
        pass


class Yes(http.server.BaseHTTPRequestHandler):
    """A server that answers 200 to everything."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


class Ssh(socketserver.BaseRequestHandler):
    """A server that speaks another language, and hangs up."""

    def handle(self):
        self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def serve(url: str, handler) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port(url)), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_killed_replaced_and_back(start_main, start_visdom, few_digits, page, url):
    server = start_visdom(url)
    process = start_main(*SMALL, "--epochs", 120, "--data", few_digits, "--visdom", url)
    wait_for(lambda: trained(process))
    server.kill()
    server.wait()
    assert f"Visdom at {url} fails (ConnectionError); the run goes on" in process.stderr.readline()
    with serve(url, Grumpy) as grumpy:
        assert f"Visdom at {url} fails (HTTPError); the run goes on" in process.stderr.readline()
        grumpy.shutdown()
    assert "fails (ConnectionError)" in process.stderr.readline()
    start_visdom(url)
    result = finished(process)
    assert result.returncode == 0 and result.stderr.count("is back (reload the page)") == 1
    assert "to stop it" not in result.stdout  # it is not ours
    assert_whole(page, url, 120)


def test_a_stopped_server_stops_nothing(start_main, start_visdom, few_digits, url):
    server = start_visdom(url)
    process = start_main(*SMALL, "--epochs", 10, "--data", few_digits, "--visdom", url)
    wait_for(lambda: trained(process))
    server.send_signal(signal.SIGSTOP)
    result = finished(process)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert "fails (ReadTimeout)" in line
    assert result.stdout.splitlines()[-1] == (
        f"Dashboard: {url}/env/main fails (ReadTimeout) (this Visdom was there already)"
    )
    server.send_signal(signal.SIGCONT)
    wait_for(lambda: answers(url))


def test_an_absent_remote_server_costs_one_line(run_main, few_digits, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    remote = "http://visdom.invalid:8097"  # a name that nobody can have
    result = run_main(*SMALL, "--epochs", 3, "--data", few_digits, "--visdom", remote)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert "fails (ConnectionError)" in line and remote in line


@pytest.mark.parametrize(
    "what", ["web server", "500", "200", "ssh", "silence", "wrong path", "https"]
)
def test_something_else_at_the_address(run_main, start_visdom, few_digits, url, tmp_path, what):
    options = (*SMALL, "--epochs", 1, "--data", few_digits, "--visdom")
    if what == "wrong path":
        start_visdom(url)
        result = run_main(*options, f"{url}/elsewhere")
    elif what == "https":
        url = url.replace("http:", "https:")
        result = run_main(*options, url)
        assert "http://" in result.stderr
    elif what == "web server":
        with serve(url, http.server.SimpleHTTPRequestHandler) as server:
            result = run_main(*options, url)
            server.shutdown()
    elif what in ("500", "200"):
        with serve(url, Grumpy if what == "500" else Yes) as server:
            result = run_main(*options, url)
            server.shutdown()
    elif what == "ssh":
        with socketserver.ThreadingTCPServer(("127.0.0.1", port(url)), Ssh) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            result = run_main(*options, url)
            server.shutdown()
    else:
        with socket.create_server(("127.0.0.1", port(url))):
            result = run_main(*options, url)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()[-1:]
    assert url in line and "--visdom" in line
    assert not (tmp_path / "run").exists()


def test_a_password_is_not_printed(run_main):
    result = run_main("--visdom", "http://user:secret@localhost:1")
    assert result.returncode == 2 and "netrc" in result.stderr and "secret" not in result.stderr
