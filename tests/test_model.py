"""What must be true of every recipe. Run this file after you have changed something.

It checks the recipes of main.py, of tests/recipes.py and of your mine.py beside main.py. They may
have any layers, likelihood and `loss`. What they need: images of 28 x 28 pixels; a diagonal
Gaussian q(z|x) with one KL per unit; a `decode` that is the sigmoid of the decoder; training that
lowers the loss from the first epoch to the second, and gives `loss` the same beta as evaluation.

The formulas of the two models in vae.py have a file of their own, test_mathematics.py; the exact
weights have test_training.py.
"""

import math

import pytest
import recipes  # noqa: F401, because it adds recipes
import torch
from conftest import PROJECT, SHORT, metrics, train

import main

if (PROJECT / "mine.py").exists():
    import mine  # noqa: F401
every_recipe = pytest.mark.parametrize("recipe", main.RECIPES)


def new_model(recipe: str, latent_dim: int = 10) -> main.VAE:
    return main.RECIPES[recipe].model(latent_dim)


def images(batch: int) -> torch.Tensor:
    """Random black and white images."""
    return torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()


@every_recipe
@torch.no_grad()
def test_shapes_and_ranges(recipe):
    model, x = new_model(recipe, latent_dim=7).eval(), images(5)
    mu, sigma = model.encode(x)
    assert mu.shape == sigma.shape == model.kl(mu, sigma).shape == (5, 7)
    assert (sigma >= 0).all()
    z = model.reparameterize(mu, sigma)
    logits = model.decoder(z)
    assert z.shape == (5, 7) and logits.shape == x.shape
    assert model.reconstruction_loss(logits, x).shape == (5,)
    x_hat, kld = model(x)
    assert x_hat.shape == x.shape and kld.shape == model.loss(x).shape == ()
    assert 0 <= x_hat.min() and x_hat.max() <= 1
    torch.testing.assert_close(model.decode(z), logits.sigmoid())
    assert model.importance_weighted_bound(x, 3).shape == (5,)


@every_recipe
def test_the_loss_is_connected_to_every_parameter(recipe):
    model = new_model(recipe)
    model.train().loss(images(20)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_recipe
def test_gradients_pass_from_the_decoder_to_mu_and_sigma(recipe):
    torch.manual_seed(1)
    model = new_model(recipe).eval()
    posterior = torch.randn(4, 10, requires_grad=True), torch.rand(4, 10, requires_grad=True)
    logits = model.decoder(model.reparameterize(*posterior))
    gradients = torch.autograd.grad(logits.square().sum(), posterior)
    assert all(gradient.any() for gradient in gradients)


@every_recipe
def test_what_is_trained_is_what_test_loss_measures(recipe, monkeypatch):
    """Whatever `loss` is: here it does not depend on the images, and the ELBO is still the model's.
    Training and evaluation give it the same beta.
    """

    def model_with_known_loss(latent_dim: int) -> main.VAE:
        model = original.model(latent_dim)
        loss = model.loss
        model.loss = lambda x, beta: 0 * loss(x, beta) + 10 * beta  # whose gradients are 0
        return model

    original = main.RECIPES[recipe]
    monkeypatch.setitem(main.RECIPES, recipe, original._replace(model=model_with_known_loss))
    (row,) = metrics(train(f"{SHORT} --recipe {recipe} --beta 0.5 --epochs 1"))
    assert row["train_loss"] == pytest.approx(row["test_loss"]) and row["test_loss"] > 0
    assert row["neg_elbo"] == pytest.approx(row["bce"] + row["kl"], rel=1e-5)


@every_recipe
def test_trained_saved_and_loaded(few_digits, recipe):
    run = train(f"{SHORT} --recipe {recipe} --latent-dim 3 --epochs 2")
    first, last = metrics(run)
    assert last["train_loss"] < first["train_loss"] and math.isfinite(last["test_loss"])
    model = main.load_model(run)
    assert type(model) is type(new_model(recipe)) and not model.training
    assert model.encode(images(2))[0].numpy().shape == (2, 3)  # it has no gradients
    test_images = main.load_images("MNIST", few_digits).test
    measures = main.evaluate(model, test_images, beta=1.0, seed=0).measures
    assert measures == {name: pytest.approx(last[name], rel=1e-5) for name in measures}


@every_recipe
def test_resumed_as_if_never_stopped(recipe):
    train(f"{SHORT} --recipe {recipe} --epochs 1 --run run")
    train("--resume run --epochs 2")
    train(f"{SHORT} --recipe {recipe} --epochs 2 --run reference")
    rows, expected = metrics("run"), metrics("reference")
    for row in rows + expected:
        del row["seconds"]
    assert rows == expected
