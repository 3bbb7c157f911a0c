"""What must be true of every VAE. Run this file after you have changed something.

It passes with other layers, likelihoods, priors, objectives (`losses`), recipes, data sets and
image sizes. The formulas of the two models that are here have a file of their own,
test_mathematics.py; the exact weights have test_training.py.
"""

import math

import pytest
import torch
from conftest import SHORT, metrics, succeeded

import main

every_recipe = pytest.mark.parametrize("recipe", main.RECIPES)


def new_model(recipe: str, latent_dim: int = 10) -> main.VAE:
    return main.RECIPES[recipe].model(latent_dim)


def images_for(model: main.VAE, batch: int) -> torch.Tensor:
    """Random black and white images of the size that the model decodes to."""
    size = model.eval().decode(torch.zeros(1, model.latent_dim)).shape[1:]
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, *size, generator=generator).round()


@every_recipe
@torch.no_grad()
def test_shapes_and_ranges(recipe):
    model = new_model(recipe, latent_dim=7)
    x = images_for(model, 5)
    mu, sigma = model.encode(x)
    assert mu.shape == sigma.shape == model.kl(mu, sigma).shape == (5, 7)
    assert (sigma >= 0).all()
    z = model.reparameterize(mu, sigma)
    logits = model.logits(z)
    assert z.shape == (5, 7) and logits.shape == x.flatten(1).shape
    assert model.reconstruction(logits, x).shape == (5,)
    x_hat, kld = model(x)
    assert x_hat.shape == model.decode(z).shape == x.shape
    assert 0 <= x_hat.min() and x_hat.max() <= 1
    assert kld.shape == () and all(loss.shape == () for loss in model.losses(x))


@every_recipe
@torch.no_grad()
def test_decoded_pixels_are_the_sigmoid_of_the_logits(recipe):
    model = new_model(recipe).eval()
    z = torch.randn(5, 10)
    torch.testing.assert_close(model.decode(z).flatten(1), model.logits(z).sigmoid())


@every_recipe
@torch.no_grad()
def test_binarized_images_are_in_range_and_right_on_average(recipe):
    torch.manual_seed(0)
    model = new_model(recipe)
    x = images_for(model, 1)
    grey = torch.linspace(0, 1, x.numel()).view(x.shape)
    pixels = model.binarize(grey.expand(10_000, *x.shape[1:]))
    assert 0 <= pixels.min() and pixels.max() <= 1
    assert (pixels.mean(0) - grey[0]).abs().max() < 0.025  # five standard errors


@every_recipe
def test_losses_are_connected_to_every_parameter(recipe):
    model = new_model(recipe)
    x = images_for(model, 20)
    sum(model.train().losses(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_recipe
def test_gradients_pass_from_the_decoder_to_mu_and_sigma(recipe):
    torch.manual_seed(1)
    model = new_model(recipe).eval()
    posterior = torch.randn(4, 10, requires_grad=True), torch.rand(4, 10, requires_grad=True)
    logits = model.logits(model.reparameterize(*posterior))
    gradients = torch.autograd.grad(logits.square().sum(), posterior)
    assert all(gradient.any() for gradient in gradients)


@every_recipe
@torch.no_grad()
def test_what_is_trained_is_what_test_loss_measures(recipe):
    model = new_model(recipe).eval()
    x = images_for(model, 8)
    measures = main.evaluate(model, (255 * x).byte(), beta=0.5, seed=3).measures
    main.seed_noise(3)
    reconstruction, kl = model.losses(x)
    assert measures["test_loss"] == pytest.approx((reconstruction + 0.5 * kl).item(), rel=1e-5)
    assert measures["neg_elbo"] == pytest.approx(measures["bce"] + measures["kl"], rel=1e-5)


@every_recipe
def test_trained_saved_and_loaded(run_main, few_digits, tmp_path, recipe):
    succeeded(run_main(f"{SHORT} --recipe {recipe} --latent-dim 3 --epochs 2 --run run"))
    first, last = metrics(tmp_path / "run")
    assert last["train_loss"] < first["train_loss"] and math.isfinite(last["test_loss"])
    model = main.load_model(tmp_path / "run")
    assert type(model) is main.RECIPES[recipe].model and not model.training
    test_images = main.load_images("MNIST", few_digits).test
    measures = main.evaluate(model, test_images, beta=1.0, seed=0).measures
    assert measures == {name: pytest.approx(last[name], rel=1e-5) for name in measures}


@every_recipe
def test_resumed_as_if_never_stopped(run_main, tmp_path, recipe):
    succeeded(run_main(f"{SHORT} --recipe {recipe} --epochs 1 --run run"))
    succeeded(run_main("--resume run --epochs 2"))
    succeeded(run_main(f"{SHORT} --recipe {recipe} --epochs 2 --run reference"))
    rows, expected = (metrics(tmp_path / name) for name in ("run", "reference"))
    for row in rows + expected:
        del row["seconds"]
    assert rows == expected
