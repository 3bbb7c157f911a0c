"""For all tests: a clean home, a few MNIST digits, and two ways to run main.py.

`run_main(OPTIONS)` calls `main.main` in this process and returns its status and output.
`start_main(OPTIONS)` runs main.py as a script in another process, which can be interrupted.
"""

import contextlib
import csv
import itertools
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import requests
import torch

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
    for name in main.MNIST_MD5:
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
@pytest.fixture
def environment(few_digits, tmp_path, monkeypatch) -> dict[str, str]:
    """A clean home and working folder, with a few digits in `data`."""
    for name in os.environ:
        if name.startswith(("VISDOM_", "OMP_", "MPL", "PYTHONUNBUFFERED")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "data").symlink_to(few_digits)
    monkeypatch.chdir(tmp_path)
    return dict(os.environ)


@pytest.fixture
def unreachable(environment, monkeypatch) -> None:
    """No data, no network and no npm."""
    os.unlink("data")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it caches the proxies


# ---- running main.py ----
@pytest.fixture
def run_main(environment, capsys):
    def run(options: str) -> subprocess.CompletedProcess:
        capsys.readouterr()
        status = 0
        try:
            main.main(options.split())
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        if isinstance(status, str):  # a message; Python would print it and end with status 1
            status, err = 1, f"{err}{status}\n"
        return subprocess.CompletedProcess(options, status, out, err)

    return run


class Process:
    """main.py as a script, in a forked process, which need not import PyTorch again."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main"])

    def __init__(self, folder: Path, options: str, target):
        self.out = folder / "out.txt"
        self.err = folder / "err.txt"
        where = os.getcwd(), dict(os.environ), self.out, self.err
        self.process = self.context.Process(target=target, args=(options, *where))
        self.process.start()

    def trained(self, epoch: int = 1) -> bool:
        """Whether it has printed this epoch."""
        alive = self.process.is_alive()
        rows = re.findall(r"^ *(\d+) .*\n", self.out.read_text() if self.out.exists() else "", re.M)
        printed = bool(rows) and int(rows[-1]) >= epoch
        assert alive or printed, self.err.read_text()
        return printed

    def send(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def finished(self) -> subprocess.CompletedProcess:
        self.process.join(PATIENCE)
        assert not self.process.is_alive(), "still running"
        output = self.out.read_text(), self.err.read_text()
        return subprocess.CompletedProcess("main.py", self.process.exitcode, *output)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_script(options: str, folder: str, environ: dict[str, str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.argv = [main.__file__, *options.split()]
    runpy.run_path(main.__file__, run_name="__main__")


@pytest.fixture
def start_main(environment, tmp_path_factory, monkeypatch):
    """Start main.py, or `target`, in another process, which is killed after the test."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # where the fork server finds main.py
    processes = []

    def start(options: str, target=run_script) -> Process:
        processes.append(Process(tmp_path_factory.mktemp("output"), options, target))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def one_epoch(few_digits, tmp_path_factory) -> Path:
    """The folder of a finished run of one epoch."""
    run = tmp_path_factory.mktemp("one_epoch") / "run"
    return main.main(f"{SHORT} --epochs 1 --data {few_digits} --run {run}".split())


@pytest.fixture
def a_run(one_epoch, environment, tmp_path) -> Path:
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


POST = requests.Session.post


def patient_post(*arguments, timeout, **keywords):
    """Wait longer than three seconds for an answer of Visdom, as this machine may be busy."""
    return POST(*arguments, timeout=PATIENCE, **keywords)


@pytest.fixture
def patient(monkeypatch) -> None:
    monkeypatch.setattr(requests.Session, "post", patient_post)


def port(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.fixture
def url() -> str:
    """A local URL without a server."""
    return free_url()


# ---- what a run has done ----
def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """Check that the status is 0 and stderr is empty; return the result."""
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result


def assert_error(result: subprocess.CompletedProcess, *words) -> None:
    """Check for a non-zero status and one sentence with these words, without a traceback."""
    assert result.returncode not in (0, None), result.stdout
    sentence = result.stderr.removeprefix("usage: main.py [options]\n")
    assert len(sentence.splitlines()) == 1 and sentence.startswith("main.py: "), result.stderr
    for word in words:
        assert str(word) in sentence


def wait_for(condition):
    """Poll until `condition()` is true and return its value."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
    return value


def load_checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv. A missing value is nan."""
    with open(run / "metrics.csv") as file:
        return [
            {name: float(x or "nan") for name, x in row.items()} for row in csv.DictReader(file)
        ]


# ---- the README's edits ----
def readme_changes() -> dict[str, tuple[str, str, str]]:
    """Name -> file, lines before, lines after."""
    (block,) = re.findall(r"```diff\n(.*?)```", README, re.S)
    changes = {}
    for file, name, hunk in re.findall(r"@@ (\S+): (.*)\n((?:[-+ ].*\n|\+?\n)+)", block):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
        changes[name] = file, before, after
    return changes


def changed_copy(folder: Path, name: str) -> None:
    """Copy the project's scripts to a folder and make the edit whose name begins like this."""
    for path in ("main.py", "vae.py", "README.md"):
        shutil.copy(PROJECT / path, folder)
    changes = readme_changes().items()
    ((script, before, after),) = (change for full, change in changes if full.startswith(name))
    text = (folder / script).read_text()
    assert text.count(before) == 1
    (folder / script).write_text(text.replace(before, after))
