"""Runs that are interrupted, killed, continued, moved, or started twice."""

import functools
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import conftest
import fake_npm
import pexpect
import pytest
import torch
from conftest import SHORT, assert_error, load_checkpoint, metrics, succeeded, wait_for
from PIL import Image

import main

PICTURES = ("x.png", "x_hat.png", "samples.png", "traversal.png")


def assert_same_run(run: Path, reference: Path) -> None:
    """Compare weights, averages, optimizer, metrics (except seconds) and pictures bit for bit."""
    one, other = load_checkpoint(run), load_checkpoint(reference)
    for part in ("model", "evaluated", "optimizer", "schedule", "average"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    tables = [[{**row, "seconds": 0} for row in metrics(folder)] for folder in (run, reference)]
    assert tables[0] == tables[1]
    for picture in PICTURES:
        assert (run / picture).read_bytes() == (reference / picture).read_bytes()


def assert_whole(run: Path) -> None:
    """No file is cut off, and the table is at most one epoch behind the checkpoint."""
    for path in run.glob("*.png"):
        Image.open(path).load()
    saved = len(load_checkpoint(run)["history"])
    if saved > 1 or (run / "metrics.csv").exists():
        assert saved - 1 <= len(metrics(run)) <= saved


# ---- --resume ----
def test_a_resumed_run_is_the_same_as_an_uninterrupted_one(run_main, tmp_path, a_run):
    succeeded(run_main("--resume run --epochs 3 --env other"))
    options = load_checkpoint(a_run)["options"]
    assert (options["epochs"], options["env"], options["batch_size"]) == (3, "other", 100)
    assert options["visdom"] is None  # --no-visdom is remembered like any option
    succeeded(run_main(f"{SHORT} --epochs 3 --run reference"))
    assert_same_run(a_run, tmp_path / "reference")


def test_a_finished_run_is_left_as_it_is(run_main, tmp_path, a_run):
    shutil.copytree(a_run, tmp_path / "before")
    result = succeeded(run_main("--resume run/checkpoint.pt"))  # the file is accepted, too
    assert result.stdout.splitlines()[-2].split()[0] == "1"  # the last row of the table
    assert_same_run(a_run, tmp_path / "before")


FIXED = "--recipe=article --latent-dim=5 --dataset=KMNIST --lr=0.002 --beta=2 --seed=7"
FIXED += " --batch-size=64 --run=elsewhere"


@pytest.mark.parametrize("option", FIXED.split())
def test_options_that_would_change_the_run_are_refused(run_main, a_run, option):
    before = (a_run / "checkpoint.pt").read_bytes()
    name = option.strip("-").partition("=")[0].replace("-", "_")
    assert_error(run_main(f"--resume run {option}"), name)
    assert (a_run / "checkpoint.pt").read_bytes() == before


def test_a_project_that_was_moved(run_main, tmp_path, monkeypatch):
    """A relative --data is looked up where main.py is started now."""
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    shutil.copytree(tmp_path / "data", "digits")
    succeeded(run_main(f"{SHORT} --epochs 1 --data digits --run runs/first"))
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    result = succeeded(run_main("--resume runs/first --epochs 2"))
    assert "Downloading" not in result.stdout and not (tmp_path / "old").exists()


# ---- signals ----
def with_a_signal(nth: int, signum: int, *script) -> None:
    """Run main.py; while it writes its nth file, its process gets this signal."""
    fsync, files = os.fsync, itertools.count(1)

    def interrupted_fsync(descriptor: int) -> None:
        if next(files) == nth:
            os.kill(os.getpid(), signum)
        fsync(descriptor)

    os.fsync = interrupted_fsync
    conftest.run_script(*script)


def command_to_continue(stderr: str) -> list[str]:
    *_, sentence, command = stderr.strip().splitlines()
    assert sentence.startswith("main.py: interrupted") and sentence.endswith("To continue:")
    _python, script, *options = shlex.split(command)
    assert Path(script).resolve() == Path(main.__file__)
    return options


# Epoch 0 writes six files, the others seven, as they have a table.
MOMENTS = {"training": None, "checkpoint": 6 + 7 + 1, "table": 6 + 7 + 3, "picture": 6 + 7 + 5}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(run_main, start_main, tmp_path, moment, signum):
    run, nth = tmp_path / "run", MOMENTS[moment]
    target = functools.partial(with_a_signal, nth, signum) if nth else conftest.run_script
    process = start_main(f"{SHORT} --epochs 100000 --run run", target)
    if not nth:
        wait_for(process.trained)
        process.send(signum)
    result = process.finished()
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert_whole(run)
    saved = len(load_checkpoint(run)["history"])
    printed = int(re.findall(r"^ *(\d+) ", result.stdout, re.M)[-1])
    assert printed <= saved
    assert command_to_continue(result.stderr) == "--resume run".split()
    succeeded(run_main(f"--resume run --epochs {saved + 1}"))
    assert len(metrics(run)) == saved + 1


def test_killed_at_every_file(run_main, start_main, tmp_path):
    """The run goes on from the last whole checkpoint, as if it had not been killed."""
    run = tmp_path / "run"
    succeeded(run_main(f"{SHORT} --epochs 1 --run run"))
    for nth in range(1, 15):  # the files of epoch 0, or of the last one again, and of the next
        killed = functools.partial(with_a_signal, nth, signal.SIGKILL)
        process = start_main("--resume run --epochs 100000", killed)
        assert process.finished().returncode == -signal.SIGKILL
        assert_whole(run)
    done = len(load_checkpoint(run)["history"])
    assert done > 1
    succeeded(run_main(f"--resume run --epochs {done + 1}"))
    succeeded(run_main(f"{SHORT} --epochs {done + 1} --run reference"))
    assert_same_run(run, tmp_path / "reference")


def test_interrupted_before_anything_is_saved(start_main, unreachable, tmp_path, monkeypatch):
    path = fake_npm.running(tmp_path / "bin", f"touch {tmp_path}/begun; exec sleep 60")
    monkeypatch.setenv("PATH", path)
    process = start_main("--no-visdom")
    wait_for((tmp_path / "begun").exists)
    process.send(signal.SIGINT)
    assert_error(process.finished(), "interrupted before the training began")
    assert not (tmp_path / "runs").exists()


def test_interrupted_in_a_terminal_of_80_columns(environment, mnist):
    """The message and the command are the last two lines, not mixed with tqdm's bar."""
    command = f"{main.__file__} --no-visdom --data {mnist} --run run".split()
    terminal = pexpect.spawn(
        sys.executable, command, timeout=300, dimensions=(24, 80), encoding="utf-8"
    )
    terminal.expect(r" [1-9]\d*/1875")  # in the middle of an epoch
    terminal.sendintr()
    *shown, sentence, command = re.split(r"[\r\n]+", terminal.read().strip())
    terminal.wait()
    assert terminal.exitstatus != 0 and "Traceback" not in "".join(shown)
    assert command_to_continue(f"{sentence}\n{command}") == "--resume run".split()
    assert max(map(len, shown)) <= 80


# ---- two processes ----
def test_two_processes_on_one_run(start_main, run_main):
    """The second is refused, the first continues, and killing it releases the lock."""
    first = start_main(f"{SHORT} --epochs 100000 --run run")
    wait_for(first.trained)
    assert_error(run_main("--resume run"), "run", "another process")
    assert_error(run_main(f"{SHORT} --run run"), "run", "another process")
    rows = len(load_checkpoint(Path("run"))["history"])
    wait_for(lambda: first.trained(rows + 2))
    first.kill()
    done = len(load_checkpoint(Path("run"))["history"])
    succeeded(run_main(f"--resume run --epochs {done + 1}"))


def test_folder_is_locked_before_the_data_is_loaded(run_main, monkeypatch):
    """Otherwise, two processes that wait for their data could start in the same folder."""

    def load_images(*_):
        with main.locked(Path("run"), resume=False):
            raise AssertionError("not locked")

    monkeypatch.setattr(main, "load_images", load_images)
    assert_error(run_main(f"{SHORT} --run run"), "run", "another process")
