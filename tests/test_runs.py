"""Options, and what a run leaves in its folder."""

import json
import os
import pickle
import random
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    SHORT,
    assert_same_run,
    assert_told,
    load_checkpoint,
    metrics,
    succeeded,
)
from PIL import Image

import main

BAD = "--epochs=0 --epochs=-3 --epochs=1.5 --batch-size=0 --lr=fast --latent-dim=0 --recipe=none"
BAD += " --dataset=CIFAR10 --device=abacus --resume=nowhere --speed=11 --env= --env=a+b --env=a?"
BAD += " --env=a/b --env=a#1 --env=a&b --env=a.b --env=.. --env=<b> --env='q' --env=a\\x"
BAD += " --resume="  # from a shell's unset variable
BAD += " --device=mps" if torch.cuda.is_available() else " --device=cuda"
BAD += f" --device=cuda:{torch.cuda.device_count() + 1}"


@pytest.mark.parametrize("option", BAD.split())
def test_bad_options_are_refused(run_main, fewest_digits, option):
    result = run_main(f"--data {fewest_digits} --no-visdom {option}")
    assert_told(result, option.partition("=")[2] if "resume" in option else option.split("=")[0])
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("option", "--latent-dim=1 --batch-size=3000 --beta=0 --env=a_b-c".split())
def test_unusual_options_work(run_main, fewest_digits, option):
    succeeded(run_main(f"{SHORT} --epochs 1 --data {fewest_digits} {option}"))


def test_what_the_terminal_gets(run_main, tmp_path):
    result = succeeded(run_main(f"{SHORT} --epochs 2 --run run"))
    assert "x: torch.Size([100, 1, 28, 28])" in result.stdout
    assert "Linear(in_features=784, out_features=256, bias=True)" in result.stdout
    table = result.stdout[result.stdout.index("   epoch") :].splitlines()
    assert max(map(len, table[:3])) <= 80
    row = dict(zip(table[0].split(), map(float, table[2].split()), strict=True))
    last = metrics(tmp_path / "run")[-1]
    expected = {
        "epoch": 2,
        "loss": last["train_loss"],
        "bce": last["bce"],
        "kl": last["kl"],
        "-elbo": last["bce"] + last["kl"],
        "mse": last["mse"],
        "active": last["active_units"],
        "seconds": last["seconds"],
    }
    for name, value in expected.items():
        tolerance = {"mse": 5e-5, "seconds": 0.05}.get(name, 5e-3)
        assert row[name] == pytest.approx(value, abs=1.01 * tolerance), name
    assert table[-1] == "Saved in run"


def test_columns_never_touch(run_main):
    """Not even with the losses of a learning rate of 1."""
    options = "--recipe article --lr 1 --epochs 1"
    *_, row, _ = succeeded(run_main(f"{SHORT} {options}")).stdout.splitlines()
    assert len(row.split()) == len(main.HEAD.split())


def test_same_seed_same_run(run_main, tmp_path):
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        succeeded(run_main(f"{SHORT} --epochs 2 --seed {seed} --run {name}"))
    assert_same_run(tmp_path / "one", tmp_path / "same")
    one, other = (load_checkpoint(tmp_path / name)["average"] for name in ("one", "other"))
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_the_best_device_learns_what_the_cpu_learns(run_main, tmp_path):
    """To the bit where the best is the CPU itself; elsewhere the noise is another."""
    for device in ("auto", "cpu"):
        succeeded(run_main(f"--no-visdom --epochs 1 --run {device} --device {device}"))
    if torch.accelerator.is_available():
        best, cpu = (metrics(tmp_path / device)[0] for device in ("auto", "cpu"))
        for name in ("train_loss", "test_loss", "bce", "kl"):
            assert best[name] == pytest.approx(cpu[name], rel=0.03)
    else:
        assert_same_run(tmp_path / "auto", tmp_path / "cpu")


@pytest.mark.parametrize("recipe", main.RECIPES)
def test_a_runs_folder(run_main, few_digits, tmp_path, recipe):
    options = f"--recipe {recipe} --epochs 1"
    succeeded(run_main(f"{SHORT} {options}"))
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{recipe}-\w+", run.name)
    files = {path.name for path in run.iterdir()} - {".lock"}
    assert files == {"checkpoint.pt", "metrics.csv", "options.json", *PICTURES}
    header = "epoch,seconds,train_loss,test_loss,bce,kl,mse,active_units"
    assert (run / "metrics.csv").read_text().splitlines()[0] == header
    assert json.loads((run / "options.json").read_text())["recipe"] == recipe
    with Image.open(run / "x.png") as picture:
        first = torch.tensor(np.asarray(picture.convert("L").crop((4, 4, 32, 32))))
    assert torch.equal(first, main.load_images("MNIST", few_digits).test[0, 0])


def test_two_runs_in_one_second_get_two_folders(environment, monkeypatch):
    """In two containers, too, where every process has the number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(time, "strftime", lambda *_: "now-")
    options = f"{SHORT} --epochs 1".split()
    assert main.main(options) != main.main(options)


def test_main_without_arguments_ignores_those_of_the_process(environment, monkeypatch):
    """As in a notebook, whose own arguments are no options of main.py."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    monkeypatch.setattr(main, "load_images", lambda *_: None)
    monkeypatch.setattr(main, "Dashboard", lambda *_: main.nullcontext())
    monkeypatch.setattr(main, "experiment", lambda args, *_: seen.append(args.epochs))
    main.main()
    assert seen == [1000]


@pytest.mark.parametrize("what", ["a run", "other files"])
def test_a_used_folder_is_refused(run_main, a_run, what):
    if what == "other files":
        (a_run / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in a_run.iterdir()}
    result = run_main(f"{SHORT} --epochs 1 --run run")
    assert_told(result, "run", "--resume")
    after = {path: path.read_bytes() for path in a_run.iterdir() if path.name != ".lock"}
    assert after == {path: content for path, content in before.items() if path.name != ".lock"}


def test_a_folder_that_cannot_be_made(run_main, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_told(run_main("--no-visdom --epochs 1 --run file/folder"), "file/folder")


@pytest.mark.parametrize("scalar", [np.float32, np.int64, torch.tensor])
def test_a_measure_that_is_no_plain_number(run_main, a_run, monkeypatch, scalar):
    """A reader's own; it has no value in the epochs before."""
    evaluate = main.evaluate

    def with_a_new_measure(*arguments):
        evaluation = evaluate(*arguments)
        evaluation.measures["newcomer"] = scalar(7)
        return evaluation

    monkeypatch.setattr(main, "evaluate", with_a_new_measure)
    for epochs in (2, 3):  # the second can read what the first has saved
        succeeded(run_main(f"--resume run --epochs {epochs}"))
    assert [row["newcomer"] for row in metrics(a_run)][1:] == [7, 7]


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("damage", "truncated empty random bit evil pickle".split())
def test_damaged_checkpoints_are_refused(run_main, a_run, tmp_path, damage):
    path, canary = a_run / "checkpoint.pt", tmp_path / "code-was-run"
    content, checkpoint = path.read_bytes(), load_checkpoint(a_run)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "random":
        path.write_bytes(random.Random(0).randbytes(10_000))
    elif damage == "bit":
        middle = len(content) // 2  # among the weights
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "evil":
        torch.save(checkpoint | {"history": Evil(canary)}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Evil(canary)))
    before = path.read_bytes()
    assert_told(run_main("--resume run --epochs 2"), "run/checkpoint.pt cannot be read")
    assert path.read_bytes() == before
    assert not canary.exists()


@pytest.mark.parametrize("change", ["a layer is missing", "Adam's states are of other layers"])
def test_a_model_that_does_not_fit_the_checkpoint(run_main, a_run, change):
    """With the states of other layers, Adam would write past their end and crash Python."""
    checkpoint = load_checkpoint(a_run)
    if change == "a layer is missing":
        checkpoint["model"].popitem()
    else:
        states = checkpoint["optimizer"]["state"]
        states[0], states[2] = states[2], states[0]
    torch.save(checkpoint, a_run / "checkpoint.pt")
    assert_told(run_main("--resume run --epochs 2"), "vae.py has changed")


def test_another_optimizer_can_be_resumed(run_main, tmp_path, monkeypatch):
    """A reader's: its states have other names than Adam's."""
    momentum = {"lr": 1e-3, "momentum": 0.9}
    monkeypatch.setattr(
        main, "Adam", lambda weights, *_, **__: torch.optim.SGD(weights, **momentum)
    )
    succeeded(run_main(f"{SHORT} --epochs 1 --run run"))
    succeeded(run_main("--resume run --epochs 2"))
    succeeded(run_main(f"{SHORT} --epochs 2 --run reference"))
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_full_disk_while_saving(run_main, a_run):
    before = (a_run / "checkpoint.pt").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))
    try:
        result = run_main("--resume run --epochs 2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_told(result, "run", "File too large")
    assert (a_run / "checkpoint.pt").read_bytes() == before
    succeeded(run_main("--resume run --epochs 2"))
    assert not list(a_run.glob("*.partial"))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(run_main, tmp_path):
    assert_told(run_main(f"{SHORT} --lr 1000 --epochs 9 --run run"), "not finite", "--lr")
    after = load_checkpoint(tmp_path / "run")
    assert all(weight.isfinite().all() for weight in after["model"].values())
