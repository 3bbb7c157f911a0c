"""The dashboard as a person sees it: the real Visdom server, a real headless Chromium.

Chromium is taken from the PATH, else playwright's own (`playwright install chromium`).
"""

import base64
import http.server
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import visdom
from conftest import npm_with_a_way_out, wait_for
from PIL import Image
from playwright.sync_api import Error, sync_playwright

import main

PANES = {"x", "x_hat", "samples", "traversal", "loss", "kl"}
SMALL = ("--batch-size", 100, "--run", "run")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync".split()
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        except Error:
            pytest.skip("no Chromium: install it, or run `playwright install chromium`")
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """An empty tab of 1300 x 800; `page.complaints` is what its console has said in red."""
    page = browser.new_page(viewport={"width": 1300, "height": 800})
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            message.type == "error"
            and page.complaints.append(f"{message.text} {message.location['url']}")
        ),
    )
    yield page
    page.close()


@pytest.fixture
def url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://localhost:{free.getsockname()[1]}"


@pytest.fixture
def kill_later():
    """Ends by their pid the servers that main.py has left running."""
    pids = []

    def remember(output: str) -> int:
        pids.append(int(re.findall(r"to stop it: kill (\d+)", output)[-1]))
        return pids[-1]

    yield remember
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.fixture
def start_visdom(environment):
    """Starts Visdom's own server, as in another terminal, and returns its process."""
    processes = []
    main.install_web_files()

    def start(url: str, *options: str, **variables: str) -> subprocess.Popen:
        port = url.rpartition(":")[2]
        code = "from visdom.server.run_server import main; main()"
        command = [sys.executable, "-c", code, "-port", port, *options]
        processes.append(
            subprocess.Popen(
                command,
                env=environment | variables,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        wait_for(lambda: answers(url))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def pane(page, title: str):
    return page.locator(".react-grid-item").filter(has=page.get_by_text(title, exact=True)).first


def picture(page, title: str) -> np.ndarray:
    """The image that a pane shows, decoded from the page, in [0, 1]."""
    source = pane(page, title).locator("img").get_attribute("src")
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("L")) / 255


def tiles(grid: np.ndarray, columns: int) -> np.ndarray:
    """Visdom's grid of 28 x 28 images, taken apart."""
    rows = [row[3:31] for row in np.split(grid, len(grid) // 32)]
    return np.stack([row[:, 32 * i + 3 : 32 * i + 31] for row in rows for i in range(columns)])


def points(page, title: str) -> int:
    """How many points of its curves, or bars, a pane has drawn."""
    return pane(page, title).locator(".scatterlayer .point, .barlayer .point").count()


def left(box: dict) -> float:
    return box["x"]


def right(box: dict) -> float:
    return box["x"] + box["width"]


def top(box: dict) -> float:
    return box["y"]


def bottom(box: dict) -> float:
    return box["y"] + box["height"]


def assert_whole(page, url: str, epochs: int) -> None:
    """Six filled panes that fit the screen side by side, with a point per epoch and curve."""
    page.goto(url)
    wait_for(lambda: page.wait_for_timeout(50) or page.locator(".react-grid-item").count() == 6)
    wait_for(lambda: page.wait_for_timeout(50) or points(page, "loss") == 2 * epochs)
    wait_for(lambda: page.wait_for_timeout(50) or points(page, "kl") == 10)
    boxes = []
    for title in PANES:
        box = pane(page, title).bounding_box()
        assert left(box) >= 0 and right(box) <= 1300 and top(box) >= 50 and bottom(box) <= 800
        for other in boxes:
            apart_x = max(left(box) - right(other), left(other) - right(box))
            apart_y = max(top(box) - bottom(other), top(other) - bottom(box))
            assert max(apart_x, apart_y) >= 0, f"{title} overlaps another pane"
        boxes.append(box)
        if title not in ("loss", "kl"):
            assert picture(page, title).std() > 0.1
            image = pane(page, title).locator("img").bounding_box()
            assert bottom(image) <= bottom(box) + 2, f"{title} is cut"
    filter_box = page.get_by_placeholder("Filter text").bounding_box()
    for box in boxes:  # Visdom 0.3 lets its filter hang down among the panes
        assert right(box) <= left(filter_box) + 1 or top(box) >= bottom(filter_box)
    known = ("mathjax", "favicon.png")  # neither is in the way; Visdom 0.3 has no favicon at all
    assert [line for line in page.complaints if not any(name in line for name in known)] == []


# -------------------------------------------------------------------- the first time, anywhere


@pytest.fixture
def bare_visdom(tmp_path) -> Path:
    """A folder for PYTHONPATH with Visdom as it is installed, without its page's scripts."""
    package = Path(visdom.__file__).parent
    copy = shutil.copytree(package, tmp_path / "packages" / "visdom")
    for place in main.WEB_FILES.values():
        (copy / "static" / place).unlink(missing_ok=True)
    (copy / "static" / "version.built").unlink(missing_ok=True)
    return copy.parent


def test_scripts_come_from_npm_where_the_cdns_are_dead(
    run_main, unreachable, few_digits, bare_visdom, page, url, kill_later, tmp_path
):
    path = npm_with_a_way_out(tmp_path / "bin")
    cut_off = unreachable | {"PYTHONPATH": str(bare_visdom), "PATH": path}
    options = ("--epochs", 3, "--data", few_digits, "--visdom", url)
    result = run_main(*SMALL, *options, env=cut_off)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.count("Fetching the scripts") == 1
    pid = kill_later(result.stdout)
    assert f"Dashboard: {url}" in result.stdout
    assert_whole(page, url, 3)

    for module in bare_visdom.rglob("*.py"):  # as an upgrade of the package would
        module.touch()
    time.sleep(2)
    os.kill(pid, signal.SIGTERM)  # is still there to be ended
    wait_for(lambda: not answers(url))
    again = run_main("--resume", "run", "--epochs", 4, env=cut_off | {"PATH": "/nowhere"})
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert "Fetching" not in again.stdout  # it happens once
    kill_later(again.stdout)
    assert_whole(page, url, 4)


@pytest.mark.parametrize("hindrance", ["no npm", "read-only package"])
def test_scripts_that_cannot_be_had_cost_one_line(
    run_main, unreachable, few_digits, bare_visdom, url, kill_later, tmp_path, hindrance
):
    cut_off = unreachable | {"PYTHONPATH": str(bare_visdom)}
    if hindrance == "read-only package":  # a file in the way stops root, too
        cut_off["PATH"] = npm_with_a_way_out(tmp_path / "bin")
        shutil.rmtree(bare_visdom / "visdom" / "static" / "fonts", ignore_errors=True)
        (bare_visdom / "visdom" / "static" / "fonts").write_text("in the way")
    options = ("--epochs", 1, "--data", few_digits, "--visdom", url)
    result = run_main(*SMALL, *options, env=cut_off)
    assert result.returncode == 0
    kill_later(result.stdout)
    (line,) = result.stderr.splitlines()
    assert "blank" in line and "npm" in line


# ---------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("recipe", ["elbo", "article"])
def test_six_panes(run_main, few_digits, page, url, kill_later, recipe):
    options = ("--recipe", recipe, "--epochs", 5, "--data", few_digits, "--visdom", url)
    result = run_main(*SMALL, *options)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    kill_later(result.stdout)
    assert_whole(page, url, 5)
    shown = tiles(picture(page, "x"), 8)
    _, test_images = main.load_images("MNIST", few_digits)
    assert np.abs(shown - test_images[:32, 0].numpy() / 255).max() < 0.01
    assert np.abs(tiles(picture(page, "x_hat"), 8) - shown).mean() < 0.2
    text = page.locator("body").inner_text()
    for label in ("epoch", "latent unit", "train", "test", "nats per image"):
        assert label in text


def test_the_page_is_live(start_main, start_visdom, few_digits, page, url):
    start_visdom(url)
    # Epochs slow enough for a browser to see the first 30, while curves still have their points.
    options = ("--batch-size", 3, "--data", few_digits, "--visdom", url)
    process = start_main(*SMALL, *options)
    wait_for(lambda: process.stdout.readline().startswith("epoch 1/"))
    page.goto(url)
    page.wait_for_selector(".react-grid-item img")
    wait_for(lambda: page.wait_for_timeout(50) or points(page, "loss") >= 2)
    digits, before, drawn = picture(page, "x"), picture(page, "x_hat"), points(page, "loss")
    wait_for(lambda: page.wait_for_timeout(50) or points(page, "loss") > drawn)
    wait_for(lambda: page.wait_for_timeout(50) or (picture(page, "x_hat") != before).any())
    assert (picture(page, "x") == digits).all()


def test_other_environments_paths_and_latent_dims(run_main, few_digits, page, url, kill_later):
    options = ("--env", "a/b c", "--latent-dim", 1, "--epochs", 2, "--visdom", f"{url}/vis")
    result = run_main(*SMALL, *options, "--data", few_digits)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    kill_later(result.stdout)
    (address,) = re.findall(r"Dashboard: (\S+)", result.stdout)
    page.goto(address)
    wait_for(lambda: page.wait_for_timeout(50) or page.locator(".react-grid-item").count() == 6)


# -------------------------------------------------------------- servers: ours and other people's


def test_started_server_is_private_outlives_the_run_and_remembers_it(
    run_main, few_digits, start_visdom, page, url, kill_later
):
    result = run_main(*SMALL, "--epochs", 2, "--data", few_digits, "--visdom", url)
    assert result.returncode == 0
    pid = kill_later(result.stdout)
    assert answers(url)
    port = f"{int(url.rpartition(':')[2]):04X}"
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port}")]
    assert listening == [f"0100007F:{port}"]  # 127.0.0.1 alone
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not answers(url))
    start_visdom(url)
    assert_whole(page, url, 2)


def test_a_server_already_there_is_used(run_main, start_visdom, few_digits, page, url):
    start_visdom(url)
    result = run_main(*SMALL, "--epochs", 2, "--data", few_digits, "--visdom", url)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "to stop it" not in result.stdout
    assert_whole(page, url, 2)


def test_login(run_main, start_visdom, environment, few_digits, url, tmp_path):
    login = {"VISDOM_USERNAME": "ada", "VISDOM_PASSWORD": "secret"}
    secrets = {"VISDOM_USE_ENV_CREDENTIALS": "1", "VISDOM_COOKIE": "cookie"}
    (Path(environment["HOME"]) / ".visdom").mkdir(parents=True)
    start_visdom(url, "-enable_login", **login, **secrets)
    options = ("--epochs", 1, "--data", few_digits, "--visdom", url)
    for wrong in ({}, login | {"VISDOM_PASSWORD": "guess"}):
        result = run_main(*SMALL, *options, env=environment | wrong)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert "VISDOM_USERNAME and VISDOM_PASSWORD" in line
        assert not (tmp_path / "run").exists()
    result = run_main(*SMALL, *options, env=environment | login)
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_killed_and_back(start_main, start_visdom, few_digits, page, url):
    server = start_visdom(url)
    process = start_main(*SMALL, "--epochs", 80, "--data", few_digits, "--visdom", url)
    wait_for(lambda: process.stdout.readline().startswith("epoch 1/"))
    server.kill()
    server.wait()
    wait_for(lambda: process.stdout.readline().startswith("epoch 3/"))
    start_visdom(url)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0
    (line,) = err.splitlines()
    assert "cannot be reached" in line and url in line
    assert out.count("is back") == 1
    page.goto(url)
    wait_for(lambda: page.wait_for_timeout(50) or page.locator(".js-plotly-plot").count() == 2)
    lengths = (
        pane(page, "loss")
        .locator(".js-plotly-plot")
        .evaluate("plot => plot.data.map(curve => curve.x.length)")
    )
    assert lengths == [80, 80]
    assert page.locator(".react-grid-item img").count() == 4


def test_stopped_server_stops_nothing(start_main, start_visdom, few_digits, page, url):
    server = start_visdom(url)
    process = start_main(*SMALL, "--epochs", 60, "--data", few_digits, "--visdom", url)
    wait_for(lambda: process.stdout.readline().startswith("epoch 1/"))
    server.send_signal(signal.SIGSTOP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    (line,) = err.splitlines()
    assert "does not answer" in line
    server.send_signal(signal.SIGCONT)
    wait_for(lambda: answers(url))


class Grumpy(http.server.BaseHTTPRequestHandler):
    """A server that answers 500 to everything."""

    def do_POST(self):
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def serve(url: str, handler) -> http.server.ThreadingHTTPServer:
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    server = http.server.ThreadingHTTPServer(address, handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_server_that_answers_500_costs_one_line(run_main, few_digits, url):
    with serve(url, Grumpy) as server:
        result = run_main(*SMALL, "--epochs", 5, "--data", few_digits, "--visdom", url)
        server.shutdown()
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert "answers 500" in line


def test_an_absent_remote_server_costs_one_line(run_main, few_digits, url):
    remote = url.replace("localhost", "127.0.0.2")  # nobody starts a server there
    result = run_main(*SMALL, "--epochs", 3, "--data", few_digits, "--visdom", remote)
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert "cannot be reached" in line and remote in line


@pytest.mark.parametrize("what", ["web server", "something else"])
def test_a_port_taken_by_something_else(run_main, few_digits, url, tmp_path, what):
    if what == "web server":
        server = serve(url, http.server.SimpleHTTPRequestHandler)
    else:
        server = socket.create_server(("127.0.0.1", int(url.rpartition(":")[2])))
        threading.Thread(target=greet, args=(server,), daemon=True).start()
    with server:
        result = run_main(*SMALL, "--epochs", 1, "--data", few_digits, "--visdom", url)
        if what == "web server":
            server.shutdown()
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert url in line and "not Visdom" in line and "--visdom" in line
    assert not (tmp_path / "run").exists()


def greet(server: socket.socket) -> None:
    """Like a mail or ssh server: speaks first, and not HTTP."""
    try:
        while True:
            connection, _ = server.accept()
            connection.sendall(b"220 hello\r\n")
            connection.close()
    except OSError:
        pass


def test_no_visdom_opens_no_socket(environment, few_digits, tmp_path):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    options = ("--no-visdom", *SMALL, "--epochs", 1, "--data", few_digits)
    command = shlex.join([sys.executable, main.__file__, *map(str, options)])
    traced = subprocess.run(
        f"strace -f -qq -e trace=socket,connect -o trace {command}",
        shell=True,
        cwd=tmp_path,
        # As in a login shell. Without it PyTorch has libc ask a local daemon for the name.
        env=environment | {"USER": "reader"},
    )
    assert traced.returncode == 0
    assert "socket(" not in (tmp_path / "trace").read_text()
    pictures = ("x.png", "x_hat.png", "samples.png", "traversal.png")
    assert all((tmp_path / "run" / name).exists() for name in pictures)
