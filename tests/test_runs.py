"""Options, the terminal's output, the files of a run, and starts that fail."""

import io
import json
import math
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import README, SHORT, load_checkpoint, metrics, train

import main

# ---- options ----
BAD = "--epochs=0 --epochs=-3 --epochs=1.5 --batch-size=0 --latent-dim=0 --lr=fast --recipe=none"
BAD += " --dataset=CIFAR10 --speed=11 --env= --env=a+b --env=a/b --env=.."


@pytest.mark.parametrize("option", BAD.split())
def test_bad_options_are_refused(capsys, option):
    """In a line that names the option, after the line with the usage."""
    with pytest.raises(SystemExit):
        train(f"{SHORT} {option}")
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and option.split("=")[0] in sentence
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", "--latent-dim=1 --batch-size=3000 --beta=0 --env=a_b-c".split())
def test_unusual_options_work(fewest_digits, option):
    train(f"{SHORT} --epochs 1 --data {fewest_digits} {option}")


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        train("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "in total (1000)" in text and "no dashboard --env" in text and "None" not in text


def test_numbers_and_paths_as_options(fewest_digits):
    run = main.main(["--epochs", 1, "--lr", 1e-3, "--data", fewest_digits, "--no-visdom"])
    assert load_checkpoint(run)["options"]["lr"] == 1e-3


def test_main_does_not_read_sys_argv(monkeypatch):
    """In a notebook, these are the kernel's own arguments; argparse would refuse them."""
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    monkeypatch.setattr(main, "load_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_a_script_sets_a_time_limit_for_downloads(monkeypatch):
    """Behind some firewalls, torchvision's download would wait forever."""
    limits = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(socket, "setdefaulttimeout", limits.append)
    monkeypatch.setattr(main, "main", lambda arguments: limits.append("main"))
    main.run_script()
    assert limits == [10, "main"]


@pytest.mark.parametrize("wanted", [None, "3"])
def test_one_thread_unless_the_user_wants_more(monkeypatch, wanted):
    monkeypatch.setattr(main, "experiment", lambda *_: None)
    if wanted:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    torch.set_num_threads(3)
    try:
        train(f"{SHORT} --epochs 1")
        assert torch.get_num_threads() == int(wanted or 1)
    finally:
        torch.set_num_threads(1)


# ---- the terminal ----
def test_terminal_output(capsys):
    """The table is the README's."""
    train(f"{SHORT} --epochs 2 --run run")
    output = capsys.readouterr().out
    assert "Training images: [2000, 1, 28, 28]" in output and "(encoder): Sequential(" in output
    assert "Run: run (if interrupted, --resume run continues it)" in output
    table = output[output.index("   epoch") :].splitlines()
    assert max(map(len, table[:3])) <= 80
    head, shown_row = re.findall(r"^(   epoch.*)\n(.*)$", README, re.M)[0]
    assert table[0] == head and len(table[2]) == len(shown_row)
    row = metrics("run")[-1]
    expected = "2 {train_loss:.2f} {bce:.2f} {kl:.2f} {neg_elbo:.2f} {mse:.4f} {active_units:.0f} "
    assert table[2].split() == (expected + "{seconds:.1f}").format(**row).split()
    assert table[3] == "Saved in run"


def test_a_row_reaches_a_redirected_log_at_once(monkeypatch):
    log, at_the_start = io.BytesIO(), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log))
    original = main.train

    def recorded(*arguments):
        at_the_start.append(log.getvalue().decode().splitlines()[-1])
        return original(*arguments)

    monkeypatch.setattr(main, "train", recorded)
    train(f"{SHORT} --epochs 2")
    assert at_the_start[0] == main.HEAD and at_the_start[1].startswith("       1 ")


# ---- the files of a run ----
def test_files_of_a_run():
    train(f"{SHORT} --recipe article --epochs 2")
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-article-\w+", run.name)
    pictures = "x.png x_hat.png samples.png traversal.png".split()
    files = {path.name for path in run.iterdir()} - {".lock"}
    assert files == {"checkpoint.pt", "metrics.csv", "options.json", *pictures}
    header = "epoch,seconds,train_loss,test_loss,bce,kl,neg_elbo,mse,active_units"
    table = (run / "metrics.csv").read_bytes()
    assert table.startswith(f"{header}\n1,".encode()) and b"\r" not in table
    options = json.loads((run / "options.json").read_text())
    assert options["recipe"] == "article" and options["data"] == "data"  # as it was typed
    assert options["lr"] == 0.001  # the recipe's


def test_two_runs_that_begin_in_one_second_get_two_folders(monkeypatch):
    monkeypatch.setattr(main.time, "strftime", lambda _: "now")
    monkeypatch.setattr(main, "experiment", lambda *_: None)
    assert train(SHORT) != train(SHORT)


def test_columns_may_change_between_epochs(a_run, monkeypatch):
    """Those of the latest row are written; a measure that is new is empty in older rows."""
    evaluate = main.evaluate

    def changed(*arguments):
        evaluation = evaluate(*arguments)
        del evaluation.measures["mse"]
        return evaluation._replace(measures=evaluation.measures | {"mse": 0.5, "new_measure": 7})

    monkeypatch.setattr(main, "evaluate", changed)
    train("--resume run --epochs 2")
    train("--resume run --epochs 3")  # reads what the run before has saved
    first, *others = [row["new_measure"] for row in metrics(a_run)]
    assert math.isnan(first) and others == [7, 7]


# ---- starts that fail, and losses ----
@pytest.mark.parametrize("run", ["run", "deep/down/run"])
@pytest.mark.parametrize("fault", ["--device abacus", "--dataset broken", "--device mps"])
def test_a_start_that_fails_leaves_no_folder(tmp_path, monkeypatch, fault, run):
    if fault == "--device mps" and torch.backends.mps.is_available():
        fault = "--device cuda"
    monkeypatch.setitem(main.DATASETS, "broken", lambda folder: 1 / 0)
    before = set(tmp_path.iterdir())
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        train(f"{SHORT} {fault} --run {run}")
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_has_a_run_is_refused(a_run):
    """Its lock is released even if the exception is kept alive, as in notebooks."""
    before = (a_run / "checkpoint.pt").read_bytes()
    with pytest.raises(main.RunError, match="run has a run already; --resume it") as _kept:
        train(f"{SHORT} --epochs 1 --run run")
    assert (a_run / "checkpoint.pt").read_bytes() == before
    train("--resume run --epochs 2")
    train("--resume run --epochs 3")


def test_a_folder_without_a_run_is_used():
    """For example after an interruption in the first epoch."""
    Path("run").mkdir()
    Path("run", "notes.txt").write_text("mine")
    train(f"{SHORT} --epochs 1 --run run")
    assert len(metrics("run")) == 1 and Path("run", "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("where", ["training", "testing"])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(monkeypatch, a_run, where):
    class Diverging(main.VAE):
        def loss(self, x, beta=1.0):
            diverges = where == ("training" if self.training else "testing")
            return super().loss(x, beta) + (math.inf if diverges else 0)

    recipe = main.RECIPES["elbo"]._replace(model=Diverging)
    monkeypatch.setitem(main.RECIPES, "elbo", recipe)
    with pytest.raises(main.RunError, match="not finite in epoch 2; .* --lr"):
        train("--resume run --epochs 3")
    after = load_checkpoint(a_run)
    assert len(after["history"]) == 1
    assert all(weight.isfinite().all() for weight in after["model"].values())
