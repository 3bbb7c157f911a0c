"""For all tests: a clean home, a few MNIST digits, and `train(OPTIONS)`, which runs main.py."""

import contextlib
import csv
import functools
import itertools
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from filelock import FileLock

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text()
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402

QUICK = "--device cpu --batch-size 100"
SHORT = f"{QUICK} --no-visdom"
PATIENCE = 300  # seconds; how long a condition may take on a busy machine

torch.set_num_threads(1)  # as main.py does
# A shell's background processes ignore Ctrl-C, and processes started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- MNIST's digits, in folders for --data ----
@pytest.fixture(scope="session")
def mnist() -> Path:
    """All of MNIST: the project's own folder, downloaded if needed."""
    main.load_images("MNIST", PROJECT / "data")
    return PROJECT / "data"


def first_digits(mnist: Path, folder: Path, train: int, test: int) -> Path:
    """A folder with the first `train` training and `test` test digits, in MNIST's file format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in main.MNIST_FILES:
        content = (mnist / "MNIST" / "raw" / name).read_bytes()
        count = train if name.startswith("train") else test
        header, size = (16, 784) if "images" in name else (8, 1)
        few = content[:4] + struct.pack(">I", count) + content[8 : header + count * size]
        (raw / name).write_bytes(few)
    return folder


@pytest.fixture(scope="session")
def few_digits(mnist, tmp_path_factory) -> Path:
    return first_digits(mnist, tmp_path_factory.mktemp("few_digits"), train=2000, test=500)


@pytest.fixture(scope="session")
def fewest_digits(mnist, tmp_path_factory) -> Path:
    """For tests of many epochs."""
    return first_digits(mnist, tmp_path_factory.mktemp("fewest_digits"), train=100, test=50)


# ---- the machine that main.py sees ----
@pytest.fixture(autouse=True)
def environment(few_digits, tmp_path, monkeypatch) -> None:
    """A clean home and working folder, with a few digits in `data`."""
    for name in os.environ:
        if name.startswith(("VISDOM_", "OMP_", "MPL", "PYTHONUNBUFFERED")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "data").symlink_to(few_digits)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unreachable(environment, monkeypatch):
    """No data, no network and no npm."""
    os.unlink("data")
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        proxy = "" if name == "no_proxy" else "http://127.0.0.1:9"
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.upper(), proxy)
    monkeypatch.setenv("PATH", "/nowhere")
    urllib.request.install_opener(None)  # the one that is installed remembers the proxies
    yield
    urllib.request.install_opener(None)


# ---- running main.py ----
def train(options: str) -> Path:
    return main.main(options.split())


@pytest.fixture(scope="session")
def one_epoch(few_digits, tmp_path_factory) -> Path:
    """The folder of a finished run of one epoch."""
    run = tmp_path_factory.mktemp("one_epoch") / "run"
    return train(f"{SHORT} --epochs 1 --data {few_digits} --run {run}")


@pytest.fixture
def a_run(one_epoch, tmp_path) -> Path:
    """A copy of `one_epoch` in the working folder: `--resume run`."""
    return shutil.copytree(one_epoch, tmp_path / "run")


# ---- servers ----
# Other workers, and other suites on this machine, have other process ids. Outgoing connections
# have ports from 32,768 on.
PORTS = itertools.count(20_000 + 50 * (os.getpid() % 250))


def free_url() -> str:
    """A URL with a port that no other test uses."""
    for number in PORTS:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", number))
            return f"http://localhost:{number}"


def port(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.fixture(scope="session")
def page_scripts() -> None:
    """Those of Visdom's page, installed once, not by each worker."""
    with FileLock(Path(tempfile.gettempdir(), "visdom-scripts.lock")):
        main.install_page_scripts()


@pytest.fixture
def url(page_scripts) -> str:
    """A local URL without a server."""
    return free_url()


@pytest.fixture
def patient(monkeypatch) -> None:
    """Wait longer than three seconds for an answer of Visdom, as this machine may be busy."""
    monkeypatch.setattr(main, "Client", functools.partial(main.Client, time_limit=PATIENCE))


def made_up(data: Path, epochs: int, latent_dim: int = 10, seed: int = 0) -> tuple:
    """What a dashboard draws: images, the evaluation of an untrained model, falling losses."""
    images = main.load_images("MNIST", data)
    torch.manual_seed(seed)
    evaluation = main.evaluate(main.VAE(latent_dim), images.test, beta=1.0, seed=0)
    history = []
    for n in range(1, epochs + 1):
        losses = dict.fromkeys(("train_loss", "test_loss", "neg_elbo"), 50 + 50 / n)
        history.append({"epoch": n, "bce": 30 + 50 / n, "kl": 20, **losses})
    return images, evaluation, history


# ---- what a run has done ----
def wait_for(condition):
    """Poll until `condition()` is true and return its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return value


def load_checkpoint(run: Path | str) -> dict:
    return torch.load(Path(run, "checkpoint.pt"), map_location="cpu", weights_only=True)


def metrics(run: Path | str) -> list[dict[str, float]]:
    """The rows of metrics.csv. A missing value is nan."""
    with open(Path(run, "metrics.csv")) as file:
        return [
            {name: float(x or "nan") for name, x in row.items()} for row in csv.DictReader(file)
        ]
