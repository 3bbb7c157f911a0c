"""Runs that are interrupted, killed, continued, moved, or started twice."""

import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, SHORT, load_checkpoint, metrics, train, wait_for
from PIL import Image

import main

PICTURES = ("x.png", "x_hat.png", "samples.png", "traversal.png")


def assert_same_run(run: Path | str, reference: Path | str) -> None:
    """Compare weights, averages, optimizer, metrics (except seconds) and pictures bit for bit."""
    one, other = load_checkpoint(run), load_checkpoint(reference)
    for part in ("model", "average", "optimizer", "schedule"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    tables = [[{**row, "seconds": 0} for row in metrics(folder)] for folder in (run, reference)]
    assert tables[0] == tables[1]
    for picture in PICTURES:
        assert Path(run, picture).read_bytes() == Path(reference, picture).read_bytes()


def assert_whole(run: Path) -> int:
    """No file is cut off, and the table is at most one epoch ahead of the checkpoint. Returns the
    number of epochs that are saved.
    """
    for path in run.glob("*.png"):
        Image.open(path).load()
    if not (run / "checkpoint.pt").exists():
        return 0
    saved = len(load_checkpoint(run)["history"])
    assert saved <= len(metrics(run)) <= saved + 1
    return saved


# ---- --resume ----
def test_a_resumed_run_is_the_same_as_an_uninterrupted_one(a_run):
    train("--resume run --epochs 2")
    train("--resume run --epochs 4 --env other")
    options = load_checkpoint(a_run)["options"]
    assert (options["epochs"], options["env"], options["batch_size"]) == (4, "other", 100)
    assert options["visdom"] is None  # --no-visdom is remembered like any option
    train(f"{SHORT} --epochs 4 --run reference")
    assert_same_run(a_run, "reference")


def test_interrupted_between_two_files_of_the_last_epoch(a_run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main.utils, "save_image", interrupted)
        train("--resume run --epochs 2")
    train("--resume run --epochs 2")
    train(f"{SHORT} --epochs 2 --run reference")
    assert_same_run(a_run, "reference")


@pytest.mark.parametrize("options", ["", "--epochs 1", "--env other"])
def test_a_finished_run_is_left_as_it_is(a_run, options):
    before = {path: path.read_bytes() for path in a_run.iterdir()}
    with pytest.raises(main.RunError, match="run has 1 epochs already; raise --epochs"):
        train(f"--resume run {options}")
    assert {path: path.read_bytes() for path in a_run.iterdir()} == before


# All options but those that may change, and --run.
FIXED = "--recipe=article --latent-dim=5 --dataset=KMNIST --lr=0.003 --beta=2 --seed=7"
FIXED += " --batch-size=64"


@pytest.mark.parametrize("option", FIXED.split())
def test_options_that_would_change_the_run_are_refused(a_run, option):
    before = (a_run / "checkpoint.pt").read_bytes()
    name = option.strip("-").partition("=")[0].replace("-", "_")
    with pytest.raises(main.RunError, match=f"^{name} is .* --resume cannot change it"):
        train(f"--resume run --epochs 2 {option}")
    assert (a_run / "checkpoint.pt").read_bytes() == before


def test_every_option_is_fixed_or_may_change():
    fixed = {option.strip("-").partition("=")[0].replace("-", "_") for option in FIXED.split()}
    assert fixed | {*main.MAY_CHANGE, "run"} == set(vars(main.parser.parse_args([])))


@pytest.mark.parametrize("folder", ["nowhere", "", "data"])  # "": an unset shell variable
def test_a_folder_that_is_not_a_run(folder):
    with pytest.raises(main.RunError, match="no checkpoint.pt"):
        main.main(["--resume", folder])
    assert not Path("nowhere").exists() and not Path("runs").exists()


def test_a_checkpoint_that_could_run_code_is_refused(a_run):
    """One with more than tensors and plain values, such as a path."""
    torch.save(load_checkpoint(a_run) | {"history": [Path("here")]}, a_run / "checkpoint.pt")
    for read in (lambda: train("--resume run --epochs 2"), lambda: main.load_model(a_run)):
        with pytest.raises(pickle.UnpicklingError):
            read()


# ---- signals ----
@pytest.fixture
def process():
    """main.py as a script, which trains in the folder `run` and has printed an epoch."""
    command = [sys.executable, main.__file__, *f"{SHORT} --epochs 100000 --run run".split()]
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    try:
        wait_for(lambda: printed_epoch() or process.poll() is not None)
        yield process
    finally:
        process.kill()
        process.wait()


def printed_epoch() -> int:
    rows = re.findall(r"^ *(\d+) .*\n", Path("out.txt").read_text(), re.M)
    return int(rows[-1]) if rows else 0


def test_terminated(process):
    """By a batch system. For Ctrl-C, see test_page.py."""
    process.terminate()
    assert process.wait(PATIENCE) == -signal.SIGINT
    errors = Path("err.txt").read_text()
    assert errors.splitlines()[-1] == "main.py: interrupted" and "Traceback" not in errors
    saved = assert_whole(Path("run"))
    assert 1 <= printed_epoch() <= saved


class Signal(BaseException):
    """Raised in the midst of the code, as a signal's handler does."""


def test_interrupted_at_random_moments(fewest_digits, tmp_path):
    """Forty signals in very short epochs: every file is whole, and the run goes on as if it had
    not been interrupted.
    """

    def interrupt(*_):
        raise Signal

    moments = random.Random(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    run, options = tmp_path / "run", f"{SHORT} --data {fewest_digits} --run run"
    try:
        for _ in range(40):
            begun = (run / "checkpoint.pt").exists()
            # Every five seconds again, should it be raised where Python ignores exceptions.
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.05, 0.4), 5)
            with pytest.raises(Signal):
                train(f"{'--resume run' if begun else options} --epochs 100000")
            assert_whole(run)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    done = assert_whole(run)
    train(f"--resume run --epochs {done + 1}")
    train(f"{options}-reference --epochs {done + 1}")
    assert_same_run(run, "run-reference")


# ---- two processes ----
def test_two_processes_on_one_run(process):
    """The second is refused, and the first continues. Killing it releases the lock; the run goes on
    from its last whole epoch as if it had not been killed.
    """
    for options in ("--resume run", f"{SHORT} --run run"):
        with pytest.raises(main.RunError, match="run is in use by another process"):
            train(options + " --epochs 100001")
    refused = printed_epoch()
    wait_for(lambda: printed_epoch() > refused + 1)
    process.kill()
    process.wait()
    done = assert_whole(Path("run"))
    train(f"--resume run --epochs {done + 1}")
    train(f"{SHORT} --epochs {done + 1} --run reference")
    assert_same_run("run", "reference")
