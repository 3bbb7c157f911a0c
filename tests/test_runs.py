"""Options, the terminal's output, the files of a run, and starts that fail."""

import contextlib
import json
import math
import pickle
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHORT, assert_error, load_checkpoint, metrics, succeeded

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
    expected = "2 {train_loss:.2f} {bce:.2f} {kl:.2f} {neg_elbo:.2f} {mse:.4f} {active_units:.0f} "
    assert table[2].split() == (expected + "{seconds:.1f}").format(**row).split()
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
    pictures = "x.png x_hat.png samples.png traversal.png".split()
    files = {path.name for path in run.iterdir()} - {".lock"}
    assert files == {"checkpoint.pt", "metrics.csv", "options.json", *pictures}
    header = "epoch,seconds,train_loss,test_loss,bce,kl,neg_elbo,mse,active_units"
    assert (run / "metrics.csv").read_text().splitlines()[0] == header
    options = json.loads((run / "options.json").read_text())
    assert options["recipe"] == "article" and options["data"] == "data"  # as it was typed


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


@pytest.mark.parametrize("blocked", ["metrics.csv", "x.png", "options.json"])
def test_a_file_that_cannot_be_replaced_does_not_end_the_run(run_main, a_run, blocked):
    """A folder of that name stands for a table that another program keeps open."""
    before = {path.name: path.read_bytes() for path in a_run.iterdir() if path.is_file()}
    (a_run / blocked).unlink()
    (a_run / blocked).mkdir()
    result = succeeded(run_main("--resume run --epochs 3"))
    lines = [line for line in result.stdout.splitlines() if "cannot be written" in line]
    assert len(lines) == 3 and all(f"run/{blocked} " in line for line in lines)
    assert all("directory" in line for line in lines)  # the reason
    assert len(load_checkpoint(a_run)["history"]) == 3
    for name in ("checkpoint.pt", "x_hat.png"):
        assert (a_run / name).read_bytes() != before[name]


@pytest.mark.parametrize("fault", ["--device abacus", "--dataset broken", "--lr -1"])
@pytest.mark.parametrize("where", ["", "--run deep/down/run", "--run empty"])
def test_a_start_that_fails_leaves_no_folder(run_main, tmp_path, monkeypatch, fault, where):
    monkeypatch.setitem(main.DATASETS, "broken", lambda folder: 1 / 0)
    (tmp_path / "empty").mkdir()
    before = set(tmp_path.iterdir())
    with contextlib.suppress(ZeroDivisionError, ValueError):
        assert run_main(f"{SHORT} {fault} {where}").returncode
    assert set(tmp_path.iterdir()) == before
    succeeded(run_main(f"{SHORT} --epochs 1 {where}"))


def test_a_flipped_bit_in_a_checkpoint_is_noticed(run_main, a_run):
    """torch.load would accept it."""
    path = a_run / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights
    path.write_bytes(content)
    assert_error(run_main("--resume run --epochs 2"), "run/checkpoint.pt is damaged")
    assert path.read_bytes() == content


def test_a_checkpoint_cannot_run_code(run_main, a_run):
    path = a_run / "checkpoint.pt"
    torch.save(load_checkpoint(a_run) | {"history": Path()}, path)
    before = path.read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        run_main("--resume run --epochs 2")
    assert path.read_bytes() == before


def test_columns_may_change_between_epochs(run_main, a_run, monkeypatch):
    """Those of the latest row are written; a measure that is new is empty in older rows."""
    evaluate = main.evaluate

    def changed(*arguments):
        evaluation = evaluate(*arguments)
        measures = {name: x for name, x in evaluation.measures.items() if name != "mse"}
        return evaluation._replace(measures=measures | {"mse": 0.5, "new_measure": 7})

    monkeypatch.setattr(main, "evaluate", changed)
    for epochs in (2, 3):  # the second run reads what the first has saved
        succeeded(run_main(f"--resume run --epochs {epochs}"))
    first, *others = [row["new_measure"] for row in metrics(a_run)]
    assert math.isnan(first) and others == [7, 7]


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(run_main, tmp_path):
    assert_error(run_main(f"{SHORT} --lr 1000 --epochs 9 --run run"), "not finite", "--lr")
    after = load_checkpoint(tmp_path / "run")
    assert all(weight.isfinite().all() for weight in after["model"].values())
