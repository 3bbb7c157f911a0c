"""What the README shows works as written: its programs, its changes, its options."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    CHANGES,
    PROJECT,
    README,
    SHORT,
    changed_copy,
    metrics,
    rows_in,
    succeeded,
    wait_for,
)
from PIL import Image, ImageOps

import main

USE, OWN_DRAWING, OWN_IMAGES = re.findall(r"```python\n(.*?)```", README, re.S)


def run_as_written(block: str) -> dict:
    names = {"__name__": "__main__"}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_using_the_model(run_main, tmp_path, capsys):
    succeeded(run_main("--epochs 1 --no-visdom --run runs/first"))
    run_as_written(USE)
    assert Path("digits.png").exists()
    bound = float(re.search(r"log p\(x\) >= (-[\d.]+) nats", capsys.readouterr().out)[1])
    (row,) = metrics(tmp_path / "runs" / "first")
    assert -1.5 * (row["bce"] + row["kl"]) < bound < 0


def test_own_drawing(few_digits, environment):
    digit = main.load_images("MNIST", few_digits).test[0, 0]
    black_on_white = ImageOps.invert(Image.fromarray(digit.numpy()))
    black_on_white.convert("RGBA").save("drawing.png")
    torch.testing.assert_close(run_as_written(OWN_DRAWING)["x"], digit[None, None] / 255)


def test_own_images(few_digits, environment, monkeypatch, tmp_path):
    """An interrupted run prints a command with own.py: main.py would train on MNIST."""
    images = main.load_images("MNIST", few_digits)
    for label in (1, 7):
        folder = tmp_path / "pictures" / f"class {label}"
        folder.mkdir(parents=True)
        for i, digit in enumerate(images.test[images.labels == label][:20]):
            Image.fromarray(digit[0].numpy()).resize((56, 56)).save(folder / f"{i}.png")
    monkeypatch.setattr(main, "load_images", main.load_images)  # to be restored
    options = f"{SHORT} --data pictures --batch-size 8 --epochs 2 --run run"
    monkeypatch.setattr(sys, "argv", ["own.py", *options.split()])
    names = run_as_written(OWN_IMAGES)
    assert len(metrics(tmp_path / "run")) == 2
    own = names["load_images"]("", "pictures")
    assert own.train.shape == (34, 1, 28, 28) and own.test.shape == (6, 1, 28, 28)
    assert own.train.dtype == torch.uint8 and own.classes == ["class 1", "class 7"]

    picture, exif = Image.fromarray(images.test[0, 0].numpy()), Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    picture.rotate(90).save("rotated.png", exif=exif)
    assert names["open_upright_on_white"]("rotated.png").tobytes() == picture.tobytes()
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save("transparent.png")
    assert names["open_upright_on_white"]("transparent.png").getextrema() == (255, 255)

    (tmp_path / "own.py").write_text(OWN_IMAGES)
    command = [sys.executable, "own.py", *"--resume run --epochs 100000".split()]
    environ = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: rows_in(tmp_path / "run") > 2)
    finally:
        process.terminate()
    assert "python own.py --resume run" in process.communicate()[1]


@pytest.mark.parametrize("name", [name for name in CHANGES if "window" not in name])
def test_a_changed_model_passes_test_model(mnist, tmp_path, name):
    changed_copy(tmp_path, name)
    shutil.copytree(PROJECT / "tests", tmp_path / "tests")
    (tmp_path / "data").symlink_to(PROJECT / "data")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_model.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


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
