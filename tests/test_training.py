"""A second implementation of the training, in plain PyTorch, compared with main.py bit for bit; the
learning rate, the average and the precision.

These tests fail after any change of the training or the noise. If that is what you wanted, update
`reference_training`, or ignore them; tests/test_model.py must still pass. The model's own formulas
have test_mathematics.py.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHORT, first_digits, load_checkpoint, metrics, train
from PIL import Image
from torch import nn
from torch.distributions import Normal
from torchvision import datasets
from torchvision.utils import make_grid

import main

CHANGED = "the training has changed; see the top of tests/test_training.py"
TRAINING_DIGITS, TEST_DIGITS = 605, 45
BATCH_SIZE, LR, BETA, SEED = 3, 0.003, 0.5, 11  # none is the default


def noise(epoch: int) -> None:
    """Each epoch has its own seed. Epoch 0 is for the initial weights and for all evaluations."""
    torch.manual_seed(1_000_000 * SEED + epoch)


def reference_training(
    recipe: str, latent_dim: int, images: torch.Tensor, test_images: torch.Tensor
) -> SimpleNamespace:
    """Three epochs of 202 steps. `images` are bytes, [605, 1, 28, 28]."""
    torch.set_flush_denormal(True)  # subnormal numbers become 0; they would slow a CPU down
    noise(epoch=0)
    model = main.RECIPES[recipe].model(latent_dim)
    average = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), LR, fused=True)
    updates, table = 0, []
    for epoch in (1, 2, 3):
        noise(epoch)
        if recipe != "article":  # the rate falls linearly, to half of it after 20 epochs
            adam.param_groups[0]["lr"] = LR * (1 - 0.5 * (epoch - 1) / 20)
        order = torch.randperm(len(images))  # every epoch sees each digit once, in a new order
        losses = []  # one for each digit
        starts = range(0, len(images), BATCH_SIZE)
        for step, start in enumerate(starts, 1):  # the last batch has two digits, not three
            x = images[order[start : start + BATCH_SIZE]] / 255
            if recipe != "article":  # the grey values are the probabilities that a pixel is 1
                x = (torch.rand_like(x) < x).float()

            mu, sigma = model.encode(x)
            logits = model.decoder(mu + sigma * torch.randn_like(sigma))
            reconstruction = model.reconstruction_loss(logits, x)
            loss = reconstruction.mean() + BETA * model.kl(mu, sigma).sum(1).mean()

            adam.zero_grad()
            (loss / 784).backward()  # per pixel
            adam.step()
            losses += [loss.item()] * len(x)

            if recipe == "article":  # no average: the latest weights are evaluated
                average = model
            elif step % 2 == 0:  # about a hundred times an epoch, the last step among them
                share = 10 / (updates + 10)  # the first replaces the average
                with torch.no_grad():
                    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                        mean.copy_(mean + share * (weight - mean))
                updates += 1
        measures, pictures = measure(recipe, average, test_images)
        table.append({"epoch": epoch, "train_loss": sum(losses) / len(losses), **measures})
    return SimpleNamespace(model=model, average=average, adam=adam, table=table, pictures=pictures)


@torch.no_grad()
def measure(recipe: str, average: main.VAE, test_images: torch.Tensor) -> tuple[dict, dict]:
    """The measures of an epoch and the digits of each picture, in double precision."""
    model, x = copy.deepcopy(average).double(), test_images.double() / 255
    noise(epoch=0)
    mu, sigma = model.encode(x)
    latent_dim = mu.shape[1]
    x_hat = torch.sigmoid(model.decoder(mu + sigma * torch.randn(len(x), latent_dim)))
    bce = -(x * x_hat.log() + (1 - x) * (1 - x_hat).log()).sum() / len(x)
    squared_error = (x_hat - x).square().sum() / len(x)
    kl = model.kl(mu, sigma).sum(1).mean()
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
        rows = [[-3 + 0.75 * i, unit] for unit in range(latent_dim) for i in range(9)]
        traversal_z = [[value * (unit == j) for j in range(latent_dim)] for value, unit in rows]
    shown = {"x_hat": shown_z, "samples": samples_z, "traversal": torch.tensor(traversal_z)}
    pictures = {"x": x[:32]}
    for name, z in shown.items():
        pictures[name] = torch.sigmoid(model.decoder(z.double()))
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
    return reference, run


def with_advice(message: str) -> str:
    return f"{CHANGED}\n{message}"


def test_weights_averages_and_optimizer(reference_and_run):
    reference, run = reference_and_run
    checkpoint = load_checkpoint(run)
    weights = reference.model.state_dict()
    torch.testing.assert_close(checkpoint["model"], weights, rtol=0, atol=0, msg=with_advice)
    adam, expected = checkpoint["optimizer"]["state"], reference.adam.state_dict()["state"]
    torch.testing.assert_close(adam, expected, rtol=0, atol=0, msg=with_advice)
    # The averages are equal up to rounding, as PyTorch divides in single precision.
    for name, average in reference.average.state_dict().items():
        found = checkpoint["average"][f"module.{name}"]
        torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7, msg=with_advice)


def test_every_column_of_the_table(reference_and_run):
    reference, run = reference_and_run
    rows = metrics(run)
    assert all(0 < row.pop("seconds") < 300 for row in rows)
    assert rows == [pytest.approx(row, rel=2e-6) for row in reference.table], CHANGED


def test_every_picture(reference_and_run):
    reference, run = reference_and_run
    assert {f"{name}.png" for name in reference.pictures} == {
        path.name for path in run.glob("*.png")
    }
    plane = len(reference.pictures["traversal"]) == 225
    columns = {"x": 8, "x_hat": 8, "samples": 8, "traversal": 15 if plane else 9}
    for name, digits in reference.pictures.items():
        expected = make_grid(digits.float(), columns[name])[0].numpy()
        picture = np.asarray(Image.open(run / f"{name}.png").convert("L")) / 255
        assert picture.shape == expected.shape, CHANGED
        assert np.abs(picture - expected).max() < 0.51 / 255, f"{name}.png: {CHANGED}"  # rounded


RATES = {
    "--recipe elbo": (2e-3, 1e-3),
    "--recipe article": (1e-3, 1e-3),
    "--lr 0.004": (4e-3, 2e-3),
}


@pytest.mark.parametrize("option", RATES)
def test_the_learning_rate_falls_linearly_over_20_epochs(fewest_digits, monkeypatch, option):
    original, rates = main.train, []

    def recorded(*arguments):
        (optimizer,) = (x for x in arguments if isinstance(x, torch.optim.Optimizer))
        rates.append(optimizer.param_groups[0]["lr"])
        return original(*arguments)

    monkeypatch.setattr(main, "train", recorded)
    train(f"{SHORT} {option} --epochs 7 --data {fewest_digits} --run run")
    train("--resume run --epochs 23")
    first, last = RATES[option]
    expected = [first + (last - first) * min(epoch - 1, 20) / 20 for epoch in range(1, 24)]
    assert rates == pytest.approx(expected)


# ---- the average ----
class WithBuffers(main.VAE):
    """A BatchNorm layer, spectral norm, a counter of training steps and a mask."""

    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        self.encoder.insert(2, nn.BatchNorm1d(256))
        nn.utils.parametrizations.spectral_norm(self.encoder[4])
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.arange(latent_dim) > 0)

    def loss(self, x, beta=1.0):
        self.steps += self.training
        return super().loss(x, beta)


def test_buffers(monkeypatch, few_digits):
    """They are copied, not averaged: spectral norm's remain unit vectors. Only BatchNorm's are
    computed anew, by passing the last epoch's grey digits through the averaged weights.
    """
    monkeypatch.setitem(main.RECIPES, "elbo", main.RECIPES["elbo"]._replace(model=WithBuffers))
    run = train(f"{SHORT} --epochs 2")
    checkpoint, loaded = load_checkpoint(run), main.load_model(run)
    average = loaded.state_dict()
    for name, value in (("steps", torch.tensor(40)), ("mask", torch.arange(10) > 0)):
        assert torch.equal(checkpoint["model"][name], value) and torch.equal(average[name], value)
    for name in ("_u", "_v"):
        vector = average[f"encoder.4.parametrizations.weight.0.{name}"]
        assert vector.norm() == pytest.approx(1, abs=1e-5)

    x = main.load_images("MNIST", few_digits).train / 255  # twenty batches, all of them used
    mean = loaded.encoder[:2](x).mean(0)
    torch.testing.assert_close(average["encoder.2.running_mean"], mean, rtol=1e-4, atol=1e-5)


def test_training_is_in_training_mode(few_digits):
    """Whatever the model was used for before."""
    model = WithBuffers(10).eval()
    average = torch.optim.swa_utils.AveragedModel(model)
    images = main.load_images("MNIST", few_digits).train
    args = main.parser.parse_args(SHORT.split())
    main.train(args, model, average, torch.optim.Adam(model.parameters()), images, epoch=1)
    assert model.steps == 20


class Tied(main.VAE):
    """Whose decoder's last layer has the weights of the encoder's first."""

    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        first = self.encoder[1]
        self.decoder[-2].forward = lambda hidden: hidden @ first.weight


def test_a_lambda_that_refers_to_the_models_layers(monkeypatch, few_digits):
    """In a copy of the model, it would still refer to those of the original."""
    monkeypatch.setitem(main.RECIPES, "elbo", main.RECIPES["elbo"]._replace(model=Tied))
    run = train(f"{SHORT} --epochs 2")
    model, hidden = main.load_model(run), torch.rand(3, 256)
    torch.testing.assert_close(model.decoder[-2](hidden), hidden @ model.encoder[1].weight)
    test_images = main.load_images("MNIST", few_digits).test
    measures = main.evaluate(model, test_images, beta=1.0, seed=0).measures
    assert measures["neg_elbo"] == pytest.approx(metrics(run)[-1]["neg_elbo"], rel=1e-5)


# ---- in another precision, and on all of MNIST ----
def test_double_precision():
    torch.set_default_dtype(torch.float64)
    try:
        run = train(f"{SHORT} --epochs 1")
    finally:
        torch.set_default_dtype(torch.float32)
    assert load_checkpoint(run)["model"]["encoder.1.weight"].dtype == torch.float64


@pytest.mark.parametrize("latent_dim, neg_elbo, active", [(10, 119, 10), (100, 140, 5)])
def test_an_epoch_on_all_of_mnist(mnist, latent_dim, neg_elbo, active):
    (row,) = metrics(train(f"--epochs 1 --latent-dim {latent_dim} --no-visdom --data {mnist}"))
    assert row["neg_elbo"] < neg_elbo and row["active_units"] >= active, CHANGED
