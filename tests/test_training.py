"""The experiment told a second time, slowly: what main.py trains, measures, saves and draws.

Everything here is written out from PyTorch alone and then held against what `main.py` leaves in its
run folder: the training to the last bit, the measures against their definitions in double
precision. To learn what the training does, read `tell` from top to bottom. To change the training,
change it there, too: until both say the same, these tests fail.
"""

import copy
import csv
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import first_digits, load_checkpoint, succeeded
from PIL import Image
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F
from torchvision import datasets

import main
from vae import VAE

TRAINING_DIGITS, TEST_DIGITS = 61, 45
EPOCHS, BATCH_SIZE, LR, BETA, SEED = 3, 7, 0.003, 0.5, 11  # none is the default


def noise(epoch: int) -> None:
    """Every epoch draws its random numbers from a start of its own. So does, as epoch 0, the first
    setting of the weights, and everything that is measured or drawn.
    """
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
    """The encoder's first half of numbers is mu, its second half tells sigma."""
    code = model["encoder"](x.flatten(1))
    half = code.shape[1] // 2
    mu, second = code[:, :half], code[:, half:]
    return mu, second if recipe == "article" else second.exp()


def kl_per_unit(recipe: str, mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """From N(mu, sigma²) to N(0, 1), of each digit and unit; the article keeps its log finite."""
    if recipe == "article":
        return 0.5 * (mu**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1)
    return 0.5 * (mu**2 + sigma**2 - 1) - torch.log(sigma)


def tell(recipe: str, latent_dim: int, images: torch.Tensor, test_images: torch.Tensor):
    """The training: three epochs of nine steps, 0 to 26. `images` are bytes, [61, 1, 28, 28]."""
    torch.set_flush_denormal(True)  # numbers below 1e-38 count as 0; they would slow a CPU down
    noise(epoch=0)
    model = new_model(recipe, latent_dim)
    average = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), LR, fused=True)
    step, table = 0, []
    for epoch in (1, 2, 3):
        noise(epoch)
        if recipe != "article":  # it starts at twice the rate, which falls from epoch 5 to 20
            adam.param_groups[0]["lr"] = LR * min(2, max(1, math.sqrt(20 / epoch)))
        order = torch.randperm(len(images))  # every epoch sees each digit once, in a new order
        losses = []  # of each digit, to be averaged over the epoch
        for start in range(0, len(images), BATCH_SIZE):  # the last batch has five digits, not seven
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
            (loss / 784).backward()  # per pixel: Adam's epsilon sees the size of a gradient
            adam.step()
            losses += [loss.item()] * len(x)

            if recipe == "article":  # it has no average: what is measured are the weights
                average = model
            elif step % 10 == 0:  # at steps 0, 10 and 20; the first is the weights themselves
                share = 10 / (step / 10 + 10)
                with torch.no_grad():
                    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                        mean.copy_(mean + share * (weight - mean))
            step += 1
        measures, pictures = measure(recipe, average, test_images)
        table.append({"epoch": epoch, "train_loss": sum(losses) / len(losses), **measures})
    bound = mean_bound(recipe, average, test_images)
    return SimpleNamespace(
        model=model, average=average, adam=adam, table=table, pictures=pictures, bound=bound
    )


@torch.no_grad()
def measure(recipe: str, average: nn.ModuleDict, test_images: torch.Tensor) -> tuple[dict, dict]:
    """The measures of an epoch, and the digits of each picture, from the averaged weights."""
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
        "mse": squared_error / 784,
        "active_units": sum(mu[:, unit].var() > 0.01 for unit in range(latent_dim)),
    }
    shown_z = mu[:32] + sigma[:32] * torch.randn(32, latent_dim)
    samples_z = torch.randn(80, latent_dim)
    if latent_dim == 2:  # the plane: rows from above to below, columns from left to right
        way = Normal(0, 1).icdf(torch.linspace(0.02, 0.98, 15)).tolist()
        traversal_z = [[z1, z2] for z2 in way[::-1] for z1 in way]
    else:  # a row per unit; the others stay 0
        traversal_z = []
        for unit in range(latent_dim):
            for i in range(9):
                traversal_z.append([0.0] * latent_dim)
                traversal_z[-1][unit] = -3 + 0.75 * i
    pictures = {"x": x[:32]}
    for name, z in [
        ("x_hat", shown_z),
        ("samples", samples_z),
        ("traversal", torch.tensor(traversal_z)),
    ]:
        pictures[name] = torch.sigmoid(model["decoder"](z.double())).view(-1, 1, 28, 28)
    return {name: float(value) for name, value in measures.items()}, pictures


@torch.no_grad()
def mean_bound(recipe: str, average: nn.ModuleDict, test_images: torch.Tensor) -> float:
    """log p(x) >= log 1/k sum of p(x|z) p(z) / q(z|x) over k = 100 draws of z; twenty at a time."""
    noise(epoch=0)
    bounds = []
    for x in (test_images / 255).split(20):
        mu, sigma = encode(recipe, average, x)
        q = Normal(mu.double(), sigma.clamp(min=1e-4).double())
        z = q.loc + q.scale * torch.randn(100, *mu.shape)
        logits = copy.deepcopy(average).double()["decoder"](z)
        log_p_x = -F.binary_cross_entropy_with_logits(
            logits, x.double().flatten(1).expand_as(logits), reduction="none"
        ).sum(-1)
        log_weights = log_p_x + Normal(0, 1).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
        bounds += (log_weights.logsumexp(0) - math.log(100)).tolist()
    return sum(bounds) / len(bounds)


@pytest.fixture
def told(request, run_main, mnist, tmp_path) -> tuple[SimpleNamespace, Path, str]:
    """The same experiment twice: what `tell` has, the run folder of main.py, and its output."""
    recipe, latent_dim = request.param
    data = first_digits(mnist, tmp_path / "digits", TRAINING_DIGITS, TEST_DIGITS)
    options = ["--recipe", recipe, "--latent-dim", latent_dim, "--epochs", EPOCHS, "--seed", SEED]
    options += ["--batch-size", BATCH_SIZE, "--lr", LR, "--beta", BETA, "--device", "cpu"]
    start = time.perf_counter()
    result = succeeded(run_main(*options, "--data", data, "--run", "run", "--no-visdom"))
    took = time.perf_counter() - start
    images = (datasets.MNIST(data, train=part).data.unsqueeze(1) for part in (True, False))
    reference = tell(recipe, latent_dim, *images)
    reference.took = took
    return reference, tmp_path / "run", result.stdout


every_recipe = pytest.mark.parametrize(
    "told", [("elbo", 3), ("article", 3), ("elbo", 2)], indirect=True, ids=str
)


@every_recipe
def test_weights_averages_and_adam_to_the_last_bit(told):
    reference, run, _ = told
    checkpoint = load_checkpoint(run)
    for name in ("model", "average"):
        expected = getattr(reference, name).state_dict()
        torch.testing.assert_close(checkpoint[name], expected, rtol=0, atol=0)
    adam, expected = checkpoint["optimizer"], reference.adam.state_dict()
    torch.testing.assert_close(adam["state"], expected["state"], rtol=0, atol=0)
    assert adam["param_groups"][0]["lr"] == expected["param_groups"][0]["lr"]
    assert adam["state"][0]["step"] == 27


@every_recipe
def test_every_column_of_the_table_and_the_bound(told):
    reference, run, output = told
    with open(run / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    seconds = [row.pop("seconds") for row in rows]
    assert min(seconds) > 0 and sum(seconds) < reference.took
    assert rows == [pytest.approx(row, rel=2e-6) for row in reference.table]
    bound = re.search(
        r"log p\(x\) >= (\S+) nats per image \(importance-weighted, k = 100\)", output
    )
    assert float(bound[1]) == pytest.approx(reference.bound, abs=0.006)


def digits_in(path: Path, columns: int) -> torch.Tensor:
    """The digits of a picture, row by row, [n, 1, 28, 28]; around each are four white pixels."""
    with Image.open(path) as image:
        grey = torch.tensor(np.asarray(image.convert("L"))) / 255
    rows = (grey.shape[0] - 4) // 32
    assert grey.shape == (32 * rows + 4, 32 * columns + 4)
    assert grey[:4].min() == grey[:, :4].min() == 1
    cells = grey[4:, 4:].unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 1, 32, 32)
    assert cells[:, :, 28:].min() == cells[:, :, :, 28:].min() == 1
    return cells[:, :, :28, :28]


@every_recipe
def test_every_digit_of_every_picture(told):
    reference, run, _ = told
    traversal_columns = 15 if len(reference.pictures["traversal"]) == 225 else 9
    for name, expected in reference.pictures.items():
        columns = traversal_columns if name == "traversal" else 8
        drawn = digits_in(run / f"{name}.png", columns)
        assert len(drawn) == len(expected)
        assert (drawn - expected).abs().max() < 0.51 / 255, name  # rounded to bytes, no more


def test_a_unit_is_active_from_a_variance_of_a_hundredth_on():
    """Burda et al. 2016, section 5.2, on units whose mu is a known multiple of one another's."""
    torch.manual_seed(0)
    model, x = VAE(latent_dim=4), torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8)
    last = model.encoder[-1]
    with torch.no_grad():
        last.weight[1:4] = last.weight[0]
        spread = model.encode(x / 255)[0][:, 0].std()
        for unit, variance in enumerate([0.0101, 0.0099, 0, 4]):
            last.weight[unit] *= variance**0.5 / spread
    assert main.evaluate(model, x, 1.0, 0).measures["active_units"] == 2


def test_layers_like_dropout_know_when_they_train(run_main, mnist, tmp_path, monkeypatch):
    modes = []

    class Listening(VAE):
        def losses(self, x):
            modes.append(("step", self.training))
            return super().losses(x)

        def encode(self, x):
            modes.append(("encode", self.training, torch.is_grad_enabled()))
            return super().encode(x)

    recipe = main.RECIPES["elbo"]._replace(model=Listening)
    monkeypatch.setitem(main.RECIPES, "elbo", recipe)
    data = first_digits(mnist, tmp_path / "digits", 20, 20)
    succeeded(run_main("--epochs", 2, "--data", data, "--no-visdom", "--device", "cpu"))
    measured, step = ("encode", False, False), [("step", True), ("encode", True, True)]
    # Before the training, in two epochs, and for the bound; each twice, but once for the bound.
    assert modes == [measured] * 2 + (step + [measured] * 2) * 2 + [measured]
