"""A second implementation of the training, in plain PyTorch, compared with main.py bit for bit.

These tests fail after any change of the training, the model or the noise. If that is what you
wanted, update `reference_training`, or ignore them; tests/test_model.py must still pass.
"""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, first_digits, load_checkpoint, metrics, succeeded
from PIL import Image
from torch import nn
from torch.distributions import Bernoulli, Normal
from torchvision import datasets
from torchvision.utils import make_grid

import main
from vae import ArticleVAE

PARTS = ("model", "evaluated")  # of a checkpoint: the latest weights and their average
CHANGED = "the training has changed; see the top of tests/test_training.py"
TRAINING_DIGITS, TEST_DIGITS = 605, 45
BATCH_SIZE, LR, BETA, SEED = 3, 0.003, 0.5, 11  # none is the default


def noise(epoch: int) -> None:
    """Each epoch has its own seed. Epoch 0 is for the initial weights and for all evaluations."""
    torch.manual_seed((SEED * 2654435761 + epoch) % 2**32)


def new_model(recipe: str, latent_dim: int) -> nn.ModuleDict:
    encoder = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2 * latent_dim)
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 784)
    )
    if recipe == "article":
        encoder.append(nn.ReLU())  # neither mu nor sigma can be negative
    else:
        for layer in [*encoder, *decoder]:
            if isinstance(layer, nn.Linear):  # He et al. 2015
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def encode(recipe: str, model: nn.ModuleDict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of the encoder's output is mu, the second is sigma or its logarithm."""
    code = model["encoder"](x.flatten(1))
    half = code.shape[1] // 2
    mu, second = code[:, :half], code[:, half:]
    return mu, second if recipe == "article" else second.exp()


def kl_per_unit(recipe: str, mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, sigma²) || N(0, 1)) of each digit and unit; the article's is finite at sigma = 0."""
    if recipe == "article":
        return 0.5 * (mu**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1)
    return 0.5 * (mu**2 + sigma**2 - 1) - torch.log(sigma)


def reference_training(
    recipe: str, latent_dim: int, images: torch.Tensor, test_images: torch.Tensor
) -> SimpleNamespace:
    """Three epochs of 202 steps. `images` are bytes, [605, 1, 28, 28]."""
    torch.set_flush_denormal(True)  # subnormal numbers become 0; they would slow a CPU down
    noise(epoch=0)
    model = new_model(recipe, latent_dim)
    average = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), LR, fused=True)
    updates, table = 0, []
    for epoch in (1, 2, 3):
        noise(epoch)
        if recipe != "article":  # twice the rate at first; it falls from epoch 5 to 20
            adam.param_groups[0]["lr"] = LR * min(2, max(1, math.sqrt(20 / epoch)))
        order = torch.randperm(len(images))  # every epoch sees each digit once, in a new order
        losses = []  # one for each digit
        starts = range(0, len(images), BATCH_SIZE)
        for step, start in enumerate(starts):  # the last batch has two digits, not three
            x = images[order[start : start + BATCH_SIZE]] / 255
            if recipe != "article":  # the grey values are the probabilities that a pixel is 1
                x = (torch.rand_like(x) < x).float()

            mu, sigma = encode(recipe, model, x)
            z = mu + sigma * torch.randn_like(sigma)
            logits = model["decoder"](z)
            if recipe == "article":  # squared error
                reconstruction = (torch.sigmoid(logits) - x.flatten(1)).square().sum(1)
            else:  # -log p(x|z) of Bernoulli pixels
                reconstruction = -Bernoulli(logits=logits).log_prob(x.flatten(1)).sum(1)
            kl = kl_per_unit(recipe, mu, sigma).sum(1)
            loss = reconstruction.mean() + BETA * kl.mean()  # nats per image

            adam.zero_grad()
            (loss / 784).backward()  # per pixel
            adam.step()
            losses += [loss.item()] * len(x)

            if recipe == "article":  # no average: the latest weights are evaluated
                average = model
            elif step % 2 == 0:  # about a hundred times an epoch; the first replaces the average
                share = 10 / (updates + 10)
                with torch.no_grad():
                    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                        mean.copy_(mean + share * (weight - mean))
                updates += 1
        measures, pictures = measure(recipe, average, test_images)
        table.append({"epoch": epoch, "train_loss": sum(losses) / len(losses), **measures})
    return SimpleNamespace(model=model, average=average, adam=adam, table=table, pictures=pictures)


@torch.no_grad()
def measure(recipe: str, average: nn.ModuleDict, test_images: torch.Tensor) -> tuple[dict, dict]:
    """The measures of an epoch and the digits of each picture, in double precision."""
    model, x = copy.deepcopy(average).double(), test_images.double() / 255
    noise(epoch=0)
    mu, sigma = encode(recipe, model, x)
    latent_dim = mu.shape[1]
    x_hat = torch.sigmoid(model["decoder"](mu + sigma * torch.randn(len(x), latent_dim)))
    bce = -(x.flatten(1) * x_hat.log() + (1 - x.flatten(1)) * (1 - x_hat).log()).sum(1).mean()
    squared_error = (x_hat - x.flatten(1)).square().sum(1).mean()
    kl = kl_per_unit(recipe, mu, sigma).sum(1).mean()
    measures = {
        "test_loss": (squared_error if recipe == "article" else bce) + BETA * kl,
        "bce": bce,
        "kl": kl,
        "neg_elbo": bce + kl,
        "mse": squared_error / 784,
        "active_units": sum(mu[:, unit].var(correction=0) > 0.01 for unit in range(latent_dim)),
    }
    shown_z = mu[:32] + sigma[:32] * torch.randn(32, latent_dim)
    samples_z = torch.randn(80, latent_dim)
    if latent_dim == 2:  # the plane: rows from top to bottom, columns from left to right
        quantiles = Normal(0, 1).icdf(torch.linspace(0.02, 0.98, 15)).tolist()
        traversal_z = [[z1, z2] for z2 in quantiles[::-1] for z1 in quantiles]
    else:  # a row per unit; the others stay 0
        traversal_z = []
        for unit in range(latent_dim):
            for i in range(9):
                traversal_z.append([0.0] * latent_dim)
                traversal_z[-1][unit] = -3 + 0.75 * i
    shown = {"x_hat": shown_z, "samples": samples_z, "traversal": torch.tensor(traversal_z)}
    pictures = {"x": x[:32]}
    for name, z in shown.items():
        pictures[name] = torch.sigmoid(model["decoder"](z.double())).view(-1, 1, 28, 28)
    return {name: float(value) for name, value in measures.items()}, pictures


@pytest.fixture(scope="module", params=[("elbo", 3), ("article", 3), ("elbo", 2)], ids=str)
def reference_and_run(request, mnist, tmp_path_factory) -> tuple[SimpleNamespace, Path]:
    """The result of the reference and the folder of the same run by main.py."""
    recipe, latent_dim = request.param
    folder = tmp_path_factory.mktemp("reference")
    data = first_digits(mnist, folder / "digits", TRAINING_DIGITS, TEST_DIGITS)
    options = f"--recipe {recipe} --latent-dim {latent_dim} --epochs 3 --seed {SEED}"
    options += f" --batch-size {BATCH_SIZE} --lr {LR} --beta {BETA} --device cpu"
    options += f" --data {data} --run {folder}/run --no-visdom"
    run = main.main(options.split())
    images = (datasets.MNIST(data, train=part).data.unsqueeze(1) for part in (True, False))
    reference = reference_training(recipe, latent_dim, *images)
    torch.set_flush_denormal(False)
    return reference, run


def with_advice(message: str) -> str:
    return f"{CHANGED}\n{message}"


def test_weights_and_optimizer_are_bit_identical(reference_and_run):
    reference, run = reference_and_run
    checkpoint = load_checkpoint(run)
    weights = reference.model.state_dict()
    torch.testing.assert_close(checkpoint["model"], weights, rtol=0, atol=0, msg=with_advice)
    adam, expected = checkpoint["optimizer"], reference.adam.state_dict()
    torch.testing.assert_close(adam["state"], expected["state"], rtol=0, atol=0, msg=with_advice)
    assert adam["param_groups"][0]["lr"] == expected["param_groups"][0]["lr"], CHANGED


def test_averages(reference_and_run):
    """Up to rounding: PyTorch divides in single precision."""
    reference, run = reference_and_run
    averages = reference.average.state_dict()
    evaluated = load_checkpoint(run)["evaluated"]
    torch.testing.assert_close(evaluated, averages, rtol=1e-5, atol=1e-7, msg=with_advice)


def test_every_column_of_the_table(reference_and_run):
    reference, run = reference_and_run
    rows = metrics(run)
    assert all(0 < row.pop("seconds") < 300 for row in rows)
    assert rows == [pytest.approx(row, rel=2e-6) for row in reference.table], CHANGED


def test_every_picture(reference_and_run):
    reference, run = reference_and_run
    plane = len(reference.pictures["traversal"]) == 225
    columns = {"x": 8, "x_hat": 8, "samples": 8, "traversal": 15 if plane else 9}
    for name, digits in reference.pictures.items():
        expected = make_grid(digits.float(), columns[name], padding=4, pad_value=0.7)[0].numpy()
        picture = np.asarray(Image.open(run / f"{name}.png").convert("L")) / 255
        assert picture.shape == expected.shape, CHANGED
        assert np.abs(picture - expected).max() < 0.51 / 255, f"{name}.png: {CHANGED}"  # rounded


def test_training_and_evaluation_mode(run_main, fewest_digits, monkeypatch):
    """Layers like dropout depend on it. This recipe evaluates the model that it trains."""
    modes = []

    class Recorder(ArticleVAE):
        def encode(self, x):
            modes.append(self.training)
            return super().encode(x)

    recipe = main.RECIPES["article"]._replace(model=Recorder)
    monkeypatch.setitem(main.RECIPES, "article", recipe)
    succeeded(run_main(f"{SHORT} --recipe article --epochs 2 --data {fewest_digits}"))
    assert [mode for mode, _ in itertools.groupby(modes)] == [False, True, False, True, False]


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of every epoch that is trained."""
    train, rates = main.train, []

    def recorded(args, model, average, optimizer, images, epoch):
        rates.append(optimizer.param_groups[-1]["lr"])
        return train(args, model, average, optimizer, images, epoch)

    monkeypatch.setattr(main, "train", recorded)
    return rates


def test_the_learning_rate_starts_at_twice_lr_and_falls_to_it(run_main, fewest_digits, rates):
    succeeded(run_main(f"{SHORT} --lr 0.003 --epochs 7 --data {fewest_digits} --run run"))
    succeeded(run_main("--resume run --epochs 21"))
    falling = {epoch: 0.003 * (20 / epoch) ** 0.5 for epoch in (6, 8, 19)}
    expected = {1: 0.006, 5: 0.006} | falling | {20: 0.003, 21: 0.003}
    assert {epoch: rates[epoch - 1] for epoch in expected} == pytest.approx(expected)


def test_a_second_parameter_group_and_another_optimizer(
    run_main, fewest_digits, rates, monkeypatch
):
    """The schedule reaches every group; SGD's momentum is saved and restored."""

    def sgd(parameters, lr, **_):
        first, *others = parameters
        return torch.optim.SGD([{"params": others}, {"params": [first], "lr": 10 * lr}], lr, 0.9)

    monkeypatch.setattr(main, "Adam", sgd)
    options = f"{SHORT} --lr 1e-6 --data {fewest_digits}"
    succeeded(run_main(f"{options} --run run --epochs 8"))
    succeeded(run_main("--resume run --epochs 10"))
    succeeded(run_main(f"{options} --run reference --epochs 10"))
    assert rates[:10] == rates[10:]
    assert rates[9] == pytest.approx(1e-5 * (20 / 10) ** 0.5)
    model, reference = (load_checkpoint(Path(run))["model"] for run in ("run", "reference"))
    torch.testing.assert_close(model, reference, rtol=0, atol=0)


def test_averages_include_buffers(run_main, few_digits, monkeypatch):
    """The running mean of a BatchNorm layer is averaged like the weights."""

    class Normalized(main.VAE):
        def __init__(self, latent_dim):
            super().__init__(latent_dim)
            self.encoder.insert(1, nn.BatchNorm1d(256))

    monkeypatch.setitem(main.RECIPES, "elbo", main.RECIPES["elbo"]._replace(model=Normalized))
    succeeded(run_main(f"{SHORT} --epochs 1 --run run"))
    checkpoint = load_checkpoint(Path("run"))
    latest, average = (checkpoint[part]["encoder.1.running_mean"] for part in PARTS)
    assert not torch.equal(latest, average) and (latest - average).abs().max() < latest.abs().max()
    (row,) = metrics(Path("run"))
    test_images = main.load_images("MNIST", few_digits).test
    measures = main.evaluate(main.load_model("run"), test_images, 1.0, 0).measures
    assert measures["neg_elbo"] == pytest.approx(row["neg_elbo"], rel=1e-5)


def test_the_articles_recipe_collapses(run_main, tmp_path):
    """Most units have mu = 0 on every digit, with a sigma near 1 and almost no KL."""
    succeeded(run_main("--recipe article --epochs 10 --no-visdom --device cpu --run run"))
    assert metrics(tmp_path / "run")[-1]["active_units"] < 5
    model = main.load_model(tmp_path / "run")
    with torch.no_grad():
        mu, sigma = model.encode(main.load_images("MNIST", "data").test / 255)
    dead = (mu == 0).all(0)
    assert dead.sum() >= 5
    assert sigma[:, dead].mean() > 0.5 and model.kl(mu, sigma)[:, dead].mean() < 0.5


def test_an_epoch_on_all_of_mnist(run_main, mnist, tmp_path):
    succeeded(run_main(f"--epochs 1 --no-visdom --data {mnist} --run run"))
    (row,) = metrics(tmp_path / "run")
    assert row["neg_elbo"] < 119 and row["active_units"] == 10, CHANGED
