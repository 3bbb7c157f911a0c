"""What the README shows works as written: its programs, its edits, its options."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    PROJECT,
    README,
    SHORT,
    assert_error,
    changed_copy,
    load_checkpoint,
    metrics,
    readme_changes,
    succeeded,
    wait_for,
)
from PIL import Image, ImageOps

import main

USE, OWN_DIGIT, OWN_IMAGES = re.findall(r"```python\n(.*?)```", README, re.S)


def run_as_written(block: str) -> dict:
    names = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), names)
    return names


# ---- its programs ----
def test_using_the_model(run_main, tmp_path, capsys):
    succeeded(run_main("--epochs 1 --no-visdom --run runs/first"))
    run_as_written(USE)
    assert Path("digits.png").exists()
    bound = float(re.search(r"log p\(x\) >= (-[\d.]+) nats", capsys.readouterr().out)[1])
    (row,) = metrics(tmp_path / "runs" / "first")
    assert -1.5 * row["neg_elbo"] < bound < 0


def test_own_digit(few_digits, environment):
    """Wherever and however large it is drawn, it comes out where MNIST has it. The middle of the
    drawn area instead of its centre of mass would move most digits.
    """
    by_mass, by_area = [], []
    for digit in main.load_images("MNIST", few_digits).test[:50, 0]:
        expected = digit.float() / 255
        drawn = Image.fromarray(digit.numpy()).resize((112, 112))
        page = Image.new("L", (300, 200), "white")
        page.paste(ImageOps.invert(drawn), (150, 20))
        page.save("drawing.png")
        x = run_as_written(OWN_DIGIT)["x"]
        assert x.shape == (1, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
        by_mass.append((x[0, 0] - expected).abs().mean())
        rows, columns = expected.nonzero().aminmax(dim=0)
        shift = (27 - rows - columns).div(2, rounding_mode="floor").tolist()
        by_area.append((expected.roll(shift, (0, 1)) - expected).abs().mean())
    assert sum(by_mass) < 0.5 * sum(by_area)


def test_own_images(few_digits, environment, tmp_path):
    images = main.load_images("MNIST", few_digits)
    for label in (1, 7):
        folder = tmp_path / "pictures" / f"class {label}"
        folder.mkdir(parents=True)
        for i, digit in enumerate(images.test[images.labels == label][:20]):
            Image.fromarray(digit[0].numpy()).resize((56, 56)).save(folder / f"{i}.png")
    (tmp_path / "own.py").write_text(OWN_IMAGES)
    environ = os.environ | {"PYTHONPATH": str(PROJECT)}
    options = f"{SHORT} --data pictures --batch-size 8 --epochs 100000 --run run"
    command = [sys.executable, "own.py", *options.split()]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: Path("run/metrics.csv").exists() or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGINT)
    assert "python own.py --resume run" in process.communicate()[1]
    saved = len(load_checkpoint(tmp_path / "run")["history"])
    options = f"--resume run --epochs {saved + 1}"
    subprocess.run([sys.executable, "own.py", *options.split()], env=environ, check=True)
    assert len(metrics(tmp_path / "run")) == saved + 1


def test_main_refuses_a_run_of_own_images(run_main, tmp_path, monkeypatch):
    """It would train on MNIST, and download it among the pictures."""
    pictures = tmp_path / "pictures" / "class"
    pictures.mkdir(parents=True)
    for i in range(3):
        Image.new("L", (28, 28), 80 * i).save(pictures / f"{i}.png")
    monkeypatch.setitem(main.DATASETS, "own", None)  # to be removed after the test
    options = f"{SHORT} --data pictures --epochs 1 --run run"
    monkeypatch.setattr(sys, "argv", ["own.py", *options.split()])
    run_as_written(OWN_IMAGES)
    monkeypatch.delitem(main.DATASETS, "own")
    assert_error(run_main("--resume run --epochs 2"), "own", "the script that began it")
    assert len(list((tmp_path / "pictures").rglob("*"))) == 4


@pytest.mark.parametrize("number", [3, 7, 40])
def test_how_own_images_are_read(environment, tmp_path, monkeypatch, number):
    monkeypatch.setattr(main, "main", lambda arguments: None)
    monkeypatch.setattr(main, "DATASETS", {})
    names = run_as_written(OWN_IMAGES)
    for i in range(number):
        folder = tmp_path / "pictures" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 56), (i, i, i)).save(folder / f"{i}.png")
    own = main.load_images("own", "pictures")
    test = max(1, number // 6)
    assert (len(own.train), len(own.test)) == (number - test, test)
    assert len(own.labels) == test and own.classes == ["class 0", "class 1"]
    grey = torch.cat([own.train, own.test])[:, 0, 0, 0]
    assert sorted(grey.tolist()) == list(range(number))
    assert own.labels.tolist() == [value % 2 for value in own.test[:, 0, 0, 0].tolist()]

    picture, exif = Image.effect_noise((28, 28), 50), Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    picture.rotate(90).save("rotated.png", exif=exif)
    assert names["open_upright_on_white"]("rotated.png").tobytes() == picture.tobytes()
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save("transparent.png")
    assert names["open_upright_on_white"]("transparent.png").getextrema() == (255, 255)


# ---- its edits ----
def python(folder: Path, *arguments: str) -> None:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


MODELS = [name for name, (file, *_) in readme_changes().items() if file == "vae.py"]
MODELS += [name for name in readme_changes() if "recipe" in name]


@pytest.mark.parametrize("edit", MODELS)
def test_test_model_passes_with_every_model(mnist, tmp_path, edit):
    changed_copy(tmp_path, edit)
    shutil.copytree(PROJECT / "tests", tmp_path / "tests")
    (tmp_path / "data").symlink_to(PROJECT / "data")
    python(tmp_path, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_model.py")


def test_another_schedule(environment, tmp_path, fewest_digits):
    changed_copy(tmp_path, "another schedule")
    changed = runpy.run_path("main.py")["main"]
    changed(f"{SHORT} --data {fewest_digits} --lr 0.008 --epochs 19 --run run".split())
    changed("--resume run --epochs 20".split())
    (group,) = load_checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.004)


def test_another_column(environment, tmp_path):
    """A tensor is saved as a plain number, which can be read again."""
    changed_copy(tmp_path, "another column")
    changed = runpy.run_path("main.py")["main"]
    changed(f"{SHORT} --epochs 1 --run run".split())
    changed("--resume run --epochs 2".split())
    assert all(0.5 < row["right"] < 1 for row in metrics(tmp_path / "run"))


# ---- its tables ----
def test_the_table_of_options():
    (table,) = re.findall(r"^option \| default \| meaning\n((?:.*\|.*\n)+)", README, re.M)
    shown = {}
    for options, values in re.findall(r"^(`--.*?) \| (.*?) ?\|", table, re.M):
        names = re.findall(r"`--([\w-]+)", options)
        shown |= zip(names, values.replace("`", "").split(", "), strict=True)
    defaults = vars(main.parser.parse_args([])).items()
    expected = {
        name.replace("_", "-"): "" if value is None else str(value).removesuffix(".0")
        for name, value in defaults
    }
    assert shown == expected


def test_the_terminal_is_as_shown():
    head, row = re.findall(r"^(   epoch.*)\n(.*)$", README, re.M)[0]
    assert head == main.HEAD and len(row) == len(head)


def test_readme_has_no_dead_links():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert Path(PROJECT, target).exists(), target
