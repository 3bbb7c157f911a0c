"""Real MNIST for the tests, fetched once by main.py itself, and main.py run as a user runs it."""

import os
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def mnist() -> Path:
    """A --data folder with all of MNIST: the project's own, which a reader has or will want."""
    main.load_images("MNIST", PROJECT / "data")
    return PROJECT / "data"


@pytest.fixture(scope="session")
def few_digits(mnist, tmp_path_factory) -> Path:
    """A --data folder with the first 2,000 training and 500 test digits of MNIST."""
    folder = tmp_path_factory.mktemp("few_digits")
    write_digits(mnist, folder, 2000, 500)
    return folder


def write_digits(source: Path, folder: Path, train: int, test: int) -> Path:
    """Copy the first digits of a --data folder into another, as idx files. Returns theirs."""
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for name in main.IDX_FILES:
        content = (source / "MNIST" / "raw" / name).read_bytes()
        count = train if name.startswith("train") else test
        header, size = (16, 784) if "images" in name else (8, 1)
        few = content[:4] + struct.pack(">I", count) + content[8 : header + count * size]
        (folder / "MNIST" / "raw" / name).write_bytes(few)
    return folder / "MNIST" / "raw"


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """The environment of a user with an empty home, on whose machine nothing is set up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VISDOM_")}
    return kept | {"HOME": str(tmp_path / "home"), "CI": ""}


@pytest.fixture
def unreachable(environment):
    """The environment of a machine that reaches no mirror and has no npm."""
    dead = "http://127.0.0.1:9"
    proxies = {"http_proxy": dead, "https_proxy": dead, "no_proxy": "", "NO_PROXY": ""}
    return environment | proxies | {"PATH": "/nowhere"}


@pytest.fixture
def run_main(environment, tmp_path):
    """Runs `python main.py OPTIONS` in an empty folder and returns the finished process."""

    def run(*options, **settings) -> subprocess.CompletedProcess:
        settings = {"cwd": tmp_path, "env": environment, "timeout": 600} | settings
        command = [sys.executable, PROJECT / "main.py", *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, **settings)

    return run


@pytest.fixture
def start_main(environment, tmp_path):
    """Starts main.py as `run_main` does, does not wait, and leaves nothing behind."""
    processes = []

    def start(*options, **settings) -> subprocess.Popen:
        settings = {"cwd": tmp_path, "env": environment, "text": True} | settings
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
        command = [sys.executable, PROJECT / "main.py", *map(str, options)]
        processes.append(subprocess.Popen(command, **settings))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition, seconds: float = 60):
    """Polls until the condition holds, and returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (held := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.005)
    return held


def fake_npm(folder: Path, script: str) -> str:
    """A PATH with an npm that does what `script` says."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def npm_with_a_way_out(folder: Path) -> str:
    """A PATH with the real npm in the real environment, whatever else is unreachable."""
    own = ("HOME", "PATH", "http_proxy", "https_proxy", "no_proxy", "NO_PROXY")
    way_out = "".join(f"export {name}={shlex.quote(os.environ.get(name, ''))}; " for name in own)
    return fake_npm(folder, way_out + 'exec npm "$@"')


def load_checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)
