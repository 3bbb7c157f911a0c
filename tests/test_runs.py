"""Command-line options, terminal output and the files of a run."""

import json
import math
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PICTURES, SHORT, assert_error, load_checkpoint, metrics, succeeded

import main

BAD = "--epochs=0 --epochs=-3 --epochs=1.5 --batch-size=0 --lr=fast --latent-dim=0 --recipe=none"
BAD += " --dataset=CIFAR10 --device=abacus --speed=11 --env= --env=a+b --env=a/b --env=.."
BAD += " --resume=nowhere --resume="  # the second as from an unset shell variable
BAD += " --device=mps" if torch.cuda.is_available() else " --device=cuda"
BAD += f" --device=cuda:{torch.cuda.device_count() + 1}"


@pytest.mark.parametrize("option", BAD.split())
def test_bad_options_are_refused(run_main, fewest_digits, option):
    result = run_main(f"--data {fewest_digits} --no-visdom {option}")
    assert_error(result, option.partition("=")[2] if "resume" in option else option.split("=")[0])
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("option", "--latent-dim=1 --batch-size=3000 --beta=0 --env=a_b-c".split())
def test_unusual_options_work(run_main, fewest_digits, option):
    succeeded(run_main(f"{SHORT} --epochs 1 --data {fewest_digits} {option}"))


def test_terminal_output(run_main, tmp_path):
    result = succeeded(run_main(f"{SHORT} --epochs 2 --run run"))
    assert "x: torch.Size([100, 1, 28, 28])" in result.stdout
    table = result.stdout[result.stdout.index("   epoch") :].splitlines()
    assert max(map(len, table[:3])) <= 80
    assert table[0].split() == "epoch loss bce kl -elbo mse active seconds".split()
    row = metrics(tmp_path / "run")[-1]
    expected = "2 {train_loss:.2f} {bce:.2f} {kl:.2f} {elbo:.2f} {mse:.4f} {active_units:.0f} "
    expected = (expected + "{seconds:.1f}").format(elbo=row["bce"] + row["kl"], **row)
    assert table[2].split() == expected.split()
    assert table[3] == "Saved in run"


def test_columns_never_touch(run_main):
    """Not even with the losses of a learning rate of 1."""
    options = "--recipe article --lr 1 --epochs 1"
    *_, row, _ = succeeded(run_main(f"{SHORT} {options}")).stdout.splitlines()
    assert len(row.split()) == len(main.HEAD.split())


def test_the_best_device_learns_what_the_cpu_learns(run_main, tmp_path):
    for device in ("auto", "cpu"):
        succeeded(run_main(f"--no-visdom --epochs 1 --run {device} --device {device}"))
    best, cpu = (metrics(tmp_path / device)[0] for device in ("auto", "cpu"))
    for name in ("train_loss", "test_loss", "bce", "kl"):
        assert best[name] == pytest.approx(cpu[name], rel=0.03)  # the random numbers may differ


def test_files_of_a_run(run_main, tmp_path):
    succeeded(run_main(f"{SHORT} --recipe article --epochs 1"))
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-article-\w+", run.name)
    files = {path.name for path in run.iterdir()} - {".lock"}
    assert files == {"checkpoint.pt", "metrics.csv", "options.json", *PICTURES}
    header = "epoch,seconds,train_loss,test_loss,bce,kl,mse,active_units"
    assert (run / "metrics.csv").read_text().splitlines()[0] == header
    assert json.loads((run / "options.json").read_text())["recipe"] == "article"


def test_two_runs_in_one_second_get_two_folders(environment, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "now-")
    options = f"{SHORT} --epochs 1".split()
    assert main.main(options) != main.main(options)


def test_main_does_not_read_sys_argv(environment, monkeypatch):
    """In a notebook, these are the kernel's own arguments; argparse would refuse them."""
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    monkeypatch.setattr(main, "find_device", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_a_used_folder_is_refused(run_main, a_run):
    (a_run / "checkpoint.pt").unlink()
    files = [path for path in a_run.iterdir() if path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    assert_error(run_main(f"{SHORT} --epochs 1 --run run"), "run", "--resume")
    assert [path.read_bytes() for path in files] == before


def test_a_folder_that_cannot_be_made(run_main, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_error(run_main("--no-visdom --epochs 1 --run file/folder"), "file/folder")


@pytest.mark.parametrize("scalar", [np.float32, np.int64, torch.tensor])
def test_scalar_types_of_a_new_measure(run_main, a_run, monkeypatch, scalar):
    """A measure that is added later is empty for earlier epochs."""
    evaluate = main.evaluate

    def with_a_new_measure(*arguments):
        evaluation = evaluate(*arguments)
        evaluation.measures["new_measure"] = scalar(7)
        return evaluation

    monkeypatch.setattr(main, "evaluate", with_a_new_measure)
    for epochs in (2, 3):  # the second run reads what the first has saved
        succeeded(run_main(f"--resume run --epochs {epochs}"))
    first, *others = [row["new_measure"] for row in metrics(a_run)]
    assert math.isnan(first) and others == [7, 7]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "arbitrary object"])
def test_damaged_checkpoints_are_refused(run_main, a_run, damage):
    path = a_run / "checkpoint.pt"
    content = path.read_bytes()
    middle = len(content) // 2  # among the weights
    if damage == "truncated":
        path.write_bytes(content[:middle])
    elif damage == "flipped bit":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:  # loading it could run code
        torch.save(load_checkpoint(a_run) | {"history": Path()}, path)
    before = path.read_bytes()
    assert_error(run_main("--resume run --epochs 2"), "run/checkpoint.pt cannot be read")
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["a layer is missing", "Adam's states are of other layers"])
def test_a_model_that_does_not_fit_the_checkpoint(run_main, a_run, change):
    """Adam does not check the shapes of its states; wrong ones would crash Python."""
    checkpoint = load_checkpoint(a_run)
    if change == "a layer is missing":
        checkpoint["model"].popitem()
    else:
        states = checkpoint["optimizer"]["state"]
        states[0], states[2] = states[2], states[0]
    torch.save(checkpoint, a_run / "checkpoint.pt")
    assert_error(run_main("--resume run --epochs 2"), "vae.py has changed")


def test_another_optimizer_can_be_resumed(run_main, monkeypatch):
    """The states of other optimizers have other names."""
    momentum = {"lr": 1e-3, "momentum": 0.9}
    monkeypatch.setattr(main, "Adam", lambda x, *_, **__: torch.optim.SGD(x, **momentum))
    succeeded(run_main(f"{SHORT} --epochs 1 --run run"))
    succeeded(run_main("--resume run --epochs 2"))


def test_write_error_while_saving(run_main, a_run):
    before = (a_run / "checkpoint.pt").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))
    try:
        result = run_main("--resume run --epochs 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_error(result, "run", "File too large")
    assert (a_run / "checkpoint.pt").read_bytes() == before
    succeeded(run_main("--resume run --epochs 2"))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(run_main, tmp_path):
    assert_error(run_main(f"{SHORT} --lr 1000 --epochs 9 --run run"), "not finite", "--lr")
    after = load_checkpoint(tmp_path / "run")
    assert all(weight.isfinite().all() for weight in after["model"].values())
