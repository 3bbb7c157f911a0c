"""Real MNIST for the tests, fetched once by main.py itself, and main.py run as a user runs it."""

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


def needs(what: str, there: bool):
    """Skips a test on a machine without something, and says so; never in CI."""
    return pytest.mark.skipif(not there and "CI" not in os.environ, reason=f"needs {what}")


needs_npm = needs("npm", bool(shutil.which("npm")))
needs_proc = needs("Linux's /proc", Path("/proc/net/tcp").exists())

torch.set_num_threads(1)  # as main.py does: two wait for each other while other programs run


@pytest.fixture(scope="session")
def mnist() -> Path:
    """A --data folder with all of MNIST: the project's own, which a reader has or will want."""
    main.load_images("MNIST", PROJECT / "data")
    return PROJECT / "data"


def first_digits(mnist: Path, folder: Path, train: int, test: int) -> Path:
    """A --data folder with the first training and test digits of MNIST, as many as said."""
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


@pytest.fixture
def environment(tmp_path, monkeypatch) -> dict[str, str]:
    """An empty folder to work in, and a user with an empty home on whose machine nothing is set."""
    for name in os.environ:
        if name.startswith(("VISDOM_", "OMP_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CI", "")
    monkeypatch.chdir(tmp_path)
    return dict(os.environ)


@pytest.fixture
def unreachable(environment, monkeypatch) -> dict[str, str]:
    """The environment of a machine that reaches no mirror and has no npm."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it has the proxies of its first use
    return dict(os.environ)


@pytest.fixture
def run_main(environment, capsys):
    """Runs main.main(OPTIONS) in this process and returns what a process would have."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(*options) -> subprocess.CompletedProcess:
        capsys.readouterr()
        arguments, status = [str(option) for option in options], 0
        try:
            main.main(arguments)
        except SystemExit as ended:
            status = ended.code
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        return subprocess.CompletedProcess(arguments, status or 0, *capsys.readouterr())

    return run


@pytest.fixture
def start_main(environment, tmp_path):
    """Starts `python main.py OPTIONS` as a process, does not wait, and leaves nothing behind."""
    processes = []

    def start(*options, script=PROJECT / "main.py", **settings) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, script, *map(str, options)]
        processes.append(subprocess.Popen(command, **pipes | {"env": environment} | settings))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """The result itself, of a run that has ended well and complained of nothing."""
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result


def trained(process: subprocess.Popen, epoch: int = 1) -> bool:
    """Reads a line of the process's table. Has it come to this epoch?"""
    return process.stdout.readline().split()[:1] == [str(epoch)]


def wait_for(condition, seconds: float = 300):
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


OUTSIDE = dict(os.environ)


def npm_with_a_way_out(folder: Path) -> str:
    """A PATH with the real npm in the real environment, whatever else is unreachable."""
    own = ("HOME", "PATH", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy")
    way_out = "".join(f"export {name}={shlex.quote(OUTSIDE.get(name, ''))}; " for name in own)
    return fake_npm(folder, way_out + 'exec npm "$@"')


def load_checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)


def readme_changes() -> dict[str, tuple[str, str, str]]:
    """The changes that the README shows: name -> file, the lines it has, the lines to be there."""
    (block,) = re.findall(r"```diff\n(.*?)```", README, re.S)
    changes = {}
    for file, name, hunk in re.findall(r"@@ (\S+): (.*)\n((?:[-+ ].*\n)+)", block):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
        changes[name] = file, before, after
    return changes


def changed_copy(folder: Path, name: str = "") -> None:
    """Puts main.py and vae.py there, with the README's change of that name made."""
    for script in ("main.py", "vae.py"):
        shutil.copy(PROJECT / script, folder)
    if name:
        script, before, after = readme_changes()[name]
        text = (folder / script).read_text()
        assert text.count(before) == 1
        (folder / script).write_text(text.replace(before, after))
