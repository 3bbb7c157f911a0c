"""main.py in notebooks, and the README's programs and recipes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme_mine as mine
import torch
from conftest import MINE, PROJECT, README, SHORT, SWEEP, USE, metrics, train, wait_for
from jupyter_client.manager import start_new_kernel
from PIL import Image

import main

OPTIONS = f"{SHORT} --epochs 1"


# ---- notebooks ----
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
def test_in_a_notebook(tmp_path):
    """IPython's own kernel, with main.py and vae.py in its working folder."""
    for script in ("main.py", "vae.py"):
        shutil.copy(PROJECT / script, tmp_path)
    manager, client = start_new_kernel(startup_timeout=300, cwd=str(tmp_path))

    def execute(cell: str) -> None:
        reply = client.execute_interactive(cell, timeout=300, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]

    try:
        execute(f"%run main.py {OPTIONS} --run first")
        execute(f"import main; run = main.main('{OPTIONS} --run second'.split())")
        execute("main.load_model(run)")
        # With stop_on_error, the kernel would drop requests that are sent right after an error.
        options = f"{SHORT} --epochs 100000 --run third"
        client.execute(f"main.main('{options}'.split())", stop_on_error=False)
        wait_for(Path("third", "metrics.csv").exists)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=300)["content"]["ename"] == "KeyboardInterrupt"
        execute("done = len(main.read_checkpoint(main.Path('third'))['history'])")
        execute("main.main(['--resume', 'third', '--epochs', str(done + 1)])")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ---- the README's programs ----
def run_as_written(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_using_the_model(capsys):
    train("--epochs 1 --no-visdom --run runs/first")
    run_as_written(USE)
    assert Path("digits.png").exists()
    bound = float(re.search(r"log p\(x\) >= (-[\d.]+) nats", capsys.readouterr().out)[1])
    (row,) = metrics("runs/first")
    assert -1.5 * row["neg_elbo"] < bound < 0


def test_a_sweep(fewest_digits, monkeypatch, capsys):
    """A run that is there is not trained again, and the table has means and deviations."""
    Path("data").unlink()
    Path("data").symlink_to(fewest_digits)
    sweep = SWEEP.replace("--epochs 10", "--epochs 2").replace("== 10", "== 2")
    run_as_written(sweep)
    output = capsys.readouterr().out
    table = re.findall(r"^beta .*: -ELBO (\d+\.\d\d) ± (\d+\.\d\d)$", output, re.M)
    assert len(table) == 3 and output.count("Saved in") == 9
    run_as_written(sweep)
    output = capsys.readouterr().out
    assert output.count("has a run already") == 9 and "Saved in" not in output
    assert re.findall(r"^beta .*: -ELBO (\d+\.\d\d) ± (\d+\.\d\d)$", output, re.M) == table


@torch.no_grad()
def test_objectives_of_mine():
    """Unused bits add to the loss; more samples bring the bound closer to -log p(x)."""
    x, losses = torch.rand(20, 1, 28, 28).round(), []
    weights = main.VAE().state_dict()
    for model in (mine.IWAE(), main.VAE(), mine.FreeBits()):
        model.load_state_dict(weights)
        torch.manual_seed(0)
        losses.append(model.loss(x).item())
    assert losses == sorted(losses) and len(set(losses)) == 3


def test_mine_trains_and_resumes_own_images(few_digits, tmp_path):
    """As a script beside main.py."""
    images = main.load_images("MNIST", few_digits)
    for label in (1, 7):
        folder = tmp_path / "pictures" / f"class {label}"
        folder.mkdir(parents=True)
        for i, digit in enumerate(images.test[images.test_labels == label][:20]):
            Image.fromarray(digit[0].numpy()).resize((56, 56)).save(folder / f"{i}.png")
    for script in ("main.py", "vae.py"):
        shutil.copy(PROJECT / script, tmp_path)
    Path("mine.py").write_text(MINE)
    options = f"{SHORT} --recipe sharp --dataset own --data pictures --epochs 1 --run run"
    for command in (options, "--resume run --epochs 2"):
        subprocess.run([sys.executable, "mine.py", *command.split()], check=True)
    assert len(metrics("run")) == 2
    assert main.load_model("run").variance == 0.005


@pytest.mark.parametrize("number", [7, 40])
def test_how_own_images_are_read(tmp_path, number):
    for i in range(number):
        folder = tmp_path / "pictures" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 56), (6 * i, 6 * i, 6 * i)).save(folder / f"{i}.png")
    own = main.load_images("own", "pictures")
    assert len(own.test) == number // 6 + 1 and len(own.train) == number - len(own.test)
    assert own.classes == ["class 0", "class 1"]
    numbers = [image[0, 0, 0].item() // 6 for image in (*own.test, *own.train)]
    assert sorted(numbers) == list(range(number))
    assert own.test_labels.tolist() == [i % 2 for i in numbers[: len(own.test)]]

    picture, exif = Image.effect_noise((28, 28), 50), Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    picture.rotate(90).save("rotated.png", exif=exif)
    assert mine.read_on_white("rotated.png").tobytes() == picture.tobytes()
    Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save("transparent.png")
    assert mine.read_on_white("transparent.png").getextrema() == (255, 255)


# ---- what else the README says ----
def test_readme_names_only_options_that_exist():
    known = {option for action in main.parser._actions for option in action.option_strings}
    text = re.sub(r"pip .*", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


def test_readme_has_no_dead_links():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert Path(PROJECT, target).exists(), target
