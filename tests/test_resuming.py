"""Interrupting, killing and resuming runs."""

import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import conftest
import pexpect
import pytest
from conftest import (
    SHORT,
    assert_error,
    assert_same_run,
    load_checkpoint,
    metrics,
    rows_in,
    succeeded,
    wait_for,
)

import main


def test_a_resumed_run_is_the_same_as_an_uninterrupted_one(run_main, tmp_path, a_run):
    succeeded(run_main("--resume run --epochs 3 --env other"))
    options = load_checkpoint(a_run)["options"]
    assert (options["epochs"], options["env"], options["batch_size"]) == (3, "other", 100)
    assert options["visdom"] is None  # --no-visdom is remembered like any option
    succeeded(run_main(f"{SHORT} --epochs 3 --run reference"))
    assert_same_run(a_run, tmp_path / "reference")


def test_a_finished_run_is_left_as_it_is(run_main, tmp_path, a_run):
    shutil.copytree(a_run, tmp_path / "before")
    result = succeeded(run_main("--resume run"))
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


def test_resuming_from_another_folder(run_main, tmp_path, monkeypatch):
    succeeded(run_main(f"{SHORT} --epochs 1 --run run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    succeeded(run_main(f"--resume {tmp_path}/run --epochs 2"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_killed_twenty_times(run_main, start_main, tmp_path):
    """Half of the kills at random moments, half while the checkpoint is being written."""
    run, chance = tmp_path / "run", random.Random(0)
    partial = run / "checkpoint.pt.partial"
    done = 0
    for kill in range(20):
        saved = (run / "checkpoint.pt").exists()
        process = start_main("--resume run" if saved else f"{SHORT} --epochs 100000 --run run")
        wait_for(lambda: process.trained(done + 1))  # noqa: B023
        if kill % 2:
            while not partial.exists():  # until it is stopped during the write
                process.send(signal.SIGCONT)
                wait_for(partial.exists)
                process.send(signal.SIGSTOP)
        else:
            time.sleep(chance.uniform(0, 0.1))
        process.kill()
        done = len(load_checkpoint(run)["history"])
        # If it was killed after the checkpoint, the resumed run writes the missing rows.
        assert rows_in(run) <= done
    succeeded(run_main(f"--resume run --epochs {done + 1}"))
    succeeded(run_main(f"{SHORT} --epochs {done + 1} --run reference"))
    assert_same_run(run, tmp_path / "reference")


def command_to_continue(stderr: str) -> list[str]:
    *_, sentence, command = stderr.strip().splitlines()
    assert sentence.startswith("main.py: interrupted") and sentence.endswith("To continue:")
    _python, script, *options = shlex.split(command)
    assert Path(script).resolve() == Path(main.__file__)
    return options


@pytest.mark.parametrize("moment", ["epoch", "checkpoint"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(run_main, start_main, tmp_path, moment, signum):
    run = tmp_path / "run"
    process = start_main(f"{SHORT} --epochs 100000 --run run")
    wait_for(process.trained)
    if moment == "checkpoint":
        wait_for((run / "checkpoint.pt.partial").exists)
    process.send(signum)
    result = process.finished()
    assert result.returncode != 0 and "Traceback" not in result.stderr
    saved = len(load_checkpoint(run)["history"])
    printed = int(re.findall(r"^ *(\d+) ", result.stdout, re.M)[-1])
    assert printed <= saved
    assert command_to_continue(result.stderr) == "--resume run --epochs 100000".split()
    succeeded(run_main(f"--resume run --epochs {saved + 1}"))
    assert len(metrics(run)) == saved + 1


def test_interrupted_before_anything_is_saved(start_main, unreachable, tmp_path, monkeypatch):
    path = conftest.fake_npm(tmp_path / "bin", f"touch {tmp_path}/begun; exec sleep 60")
    monkeypatch.setenv("PATH", path)
    process = start_main("--no-visdom")
    wait_for((tmp_path / "begun").exists)
    process.send(signal.SIGINT)
    assert_error(process.finished(), "interrupted before the training began")


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
    options = "--resume run --epochs 1000".split()
    assert command_to_continue(f"{sentence}\n{command}") == options
    assert max(map(len, shown)) <= 80


def test_two_processes_on_one_run(start_main, run_main):
    """The second is refused, the first continues, and killing it releases the lock."""
    first = start_main(f"{SHORT} --epochs 100000 --run run")
    wait_for(first.trained)
    assert_error(run_main("--resume run"), "run", "another process")
    assert_error(run_main(f"{SHORT} --run run"), "run", "another process")
    rows = rows_in(Path("run"))
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
