"""main.py in notebooks; the README's programs; recipes.py."""

import itertools
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
import torch
from conftest import PROJECT, README, SHORT, metrics, train, wait_for
from jupyter_client.manager import start_new_kernel
from PIL import Image
from torchvision import datasets

import main

USE, RECIPE, SWEEP = re.findall(r"```python\n(.*?)```", README, re.S)
BASH = re.findall(r"```bash\n(.*?)```", README, re.S)
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
        wait_for(Path("third", "checkpoint.pt").exists)
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=300)["content"]["ename"] == "KeyboardInterrupt"
        execute("done = len(main.read_checkpoint(main.Path('third'))['history'])")
        execute("main.main(['--resume', 'third', '--epochs', str(done + 1)])")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ---- the README's programs ----
def run_as_written(program: str) -> None:
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})


def test_using_the_model(capsys):
    run = train("--epochs 1 --no-visdom --run runs/first")
    run_as_written(USE)
    assert Path("digits.png").exists()
    pattern = r"-ELBO ([\d.]+) nats per image\nlog p\(b\) >= (-[\d.]+) nats per image"
    neg_elbo, bound = map(float, re.search(pattern, capsys.readouterr().out).groups())
    (row,) = metrics(run)
    assert 0.9 * row["neg_elbo"] < neg_elbo < row["neg_elbo"] and -neg_elbo < bound < 0


def test_the_recipe_as_a_requeued_job(fewest_digits, tmp_path):
    """As a script beside main.py, run twice by the README's line of bash."""
    for script in ("main.py", "vae.py"):
        shutil.copy(PROJECT / script, tmp_path)
    Path("mine.py").write_text(RECIPE)
    line = BASH[-1].strip().replace("python main.py", f"{sys.executable} mine.py")
    line = line.replace("--epochs 50", "")
    for epochs in (1, 2):
        options = f"{SHORT} --recipe freebits --data {fewest_digits} --epochs {epochs}"
        subprocess.run(["bash", "-c", f"{line} {options}"], check=True)
    assert len(metrics("runs/a")) == 2


def test_a_sweep(fewest_digits, monkeypatch, capsys):
    """A run that was interrupted is continued, one that is finished is not trained again, and all
    are counted.
    """
    Path("data").unlink()
    Path("data").symlink_to(fewest_digits)
    monkeypatch.setitem(sys.modules, "mine", recipes)
    monkeypatch.setitem(main.DATASETS, "validation", main.DATASETS["MNIST"])
    sweep = SWEEP.replace('"--epochs", 10', '"--epochs", 2').replace("== 10", "== 2")
    assert '"--epochs", 2]' in sweep and "== 2]" in sweep

    original, calls = main.train, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 3:  # in the second epoch of the second run
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main, "train", interrupted)
        run_as_written(sweep)
    capsys.readouterr()
    run_as_written(sweep)
    output = capsys.readouterr().out
    tables = re.findall(r"^beta (\S+), (\d) runs\n((?:\w+ \S+ ± \S+\n){3})", output, re.M)
    assert [table[:2] for table in tables] == [("0.5", "3"), ("1", "3"), ("2", "3")]
    assert output.count("Saved in") == 8 and output.count("already") == 1
    values = [metrics(f"runs/sweep/beta1-seed{seed}")[-1]["kl"] for seed in (0, 1, 2)]
    kl = f"kl {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}\n"
    assert kl in tables[1][2]
    run_as_written(sweep)
    assert capsys.readouterr().out.count("already") == 9


# ---- recipes.py ----
@torch.no_grad()
def test_objectives():
    """Unused bits add to the loss; more samples bring the bound closer to -log p(x)."""
    x, losses = torch.rand(20, 1, 28, 28).round(), []
    weights = main.VAE().state_dict()
    for model in (recipes.IWAE(), main.VAE(), recipes.FreeBits()):
        model.load_state_dict(weights)
        torch.manual_seed(0)
        losses.append(model.loss(x).item())
    assert losses == sorted(losses) and len(set(losses)) == 3


@torch.no_grad()
def test_warm_up():
    """The weight of the KL grows with the training steps, and only with them."""
    model, x = recipes.WarmUp(), torch.rand(20, 1, 28, 28)
    mu, sigma = model.encode(x)
    kl = model.kl(mu, sigma).sum(1).mean()
    for steps, expected in ((0, 0), (5_000, 0.5), (20_000, 2), (50_000, 2)):
        model.steps.fill_(steps)
        losses = []
        for beta in (0, 2):
            torch.manual_seed(0)
            losses.append(model.eval().loss(x, beta))
        torch.testing.assert_close(losses[1] - losses[0], expected * kl, rtol=1e-3, atol=1e-3)
        model.train().loss(x)
        assert model.steps == steps + 1


def test_gaussian_pixels():
    """With the constant, so that likelihoods of different scales can be compared."""
    x, logits = torch.rand(2, 5, 1, 28, 28)
    for recipe, scale in (("gaussian", 0.1), ("sharp", 0.07)):
        squared_error = (logits.sigmoid() - x).square().sum((1, 2, 3))
        expected = squared_error / (2 * scale**2) + 784 * math.log(scale * math.sqrt(2 * math.pi))
        found = main.RECIPES[recipe].model(10).reconstruction_loss(logits, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_validation_digits(mnist):
    """The last 10,000 training digits, with their labels, and no test digit."""
    split, images = (main.load_images(name, mnist) for name in ("validation", "MNIST"))
    assert torch.equal(torch.cat([split.train, split.test]), images.train)
    labels = datasets.MNIST(mnist).targets
    assert len(split.test) == 10_000 and torch.equal(split.test_labels, labels[-10_000:])


@pytest.mark.parametrize("number", [7, 40])
def test_own_images(tmp_path, number):
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


def test_pictures_of_any_kind(tmp_path):
    picture, exif = Image.effect_noise((28, 28), 50), Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right
    picture.rotate(90).save("rotated.png", exif=exif)
    assert recipes.read_image("rotated.png").tobytes() == picture.tobytes()
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        Image.new(mode, (28, 28), color).save("transparent.png")
        assert recipes.read_image("transparent.png").getextrema() == (255, 255)
    Image.linear_gradient("L").crop((0, 0, 128, 256)).save("narrow.png")  # is not stretched
    assert not any(recipes.read_image("narrow.png").crop((0, 0, 7, 28)).tobytes())
    for mode in ("1", "P", "CMYK"):
        Image.effect_noise((28, 28), 50).convert(mode).save("picture.tiff")
        assert recipes.read_image("picture.tiff").size == (28, 28)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, mode):
    Path("pictures", "a").mkdir(parents=True)
    Image.new(mode, (28, 28)).save("pictures/a/deep.tiff")
    with pytest.raises(main.RunError, match="deep.tiff has more than 8 bits"):
        main.load_images("own", "pictures")


def test_a_folder_without_pictures():
    with pytest.raises(main.RunError, match="nowhere"):
        main.load_images("own", "nowhere")


# ---- what else the README says ----
def test_readme_names_only_options_that_exist():
    known = {option for action in main.parser._actions for option in action.option_strings}
    text = re.sub(r"pip .*", "", README)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


def test_readme_has_no_dead_links():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert Path(PROJECT, target).exists(), target
