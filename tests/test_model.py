"""What must be true of every VAE: shapes, ranges, gradients, the mathematics, saving and loading.

These tests run for the model of each recipe in main.py. They do not depend on its layers or
weights, so they should pass after you have changed the model or added a recipe.
"""

import math

import pytest
import torch
from conftest import SHORT, metrics, succeeded
from torch.distributions import Bernoulli, Normal, kl_divergence

import main
from vae import VAE, log_likelihood

MODELS = sorted({recipe.model for recipe in main.RECIPES.values()}, key=str)
every_model = pytest.mark.parametrize("model_class", MODELS)


def digits_like(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, 28, 28, generator=generator).round()


@every_model
def test_shapes_and_ranges(model_class):
    model, x = model_class(latent_dim=7), digits_like(5)
    mu, sigma = model.encode(x)
    assert mu.shape == sigma.shape == model.kl(mu, sigma).shape == (5, 7)
    assert (sigma >= 0).all()
    z = model.reparameterize(mu, sigma)
    assert z.shape == (5, 7)
    assert model.logits(z).shape == (5, 784)
    x_hat, kld = model(x)
    assert x_hat.shape == model.decode(z).shape == (5, 1, 28, 28)
    assert 0 <= x_hat.min() and x_hat.max() <= 1
    assert model.reconstruction(model.logits(z), x).shape == (5,)
    assert kld.shape == () and all(loss.shape == () for loss in model.losses(x))


@every_model
def test_range_and_mean_of_sampled_pixels(model_class):
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 784).view(1, 1, 28, 28)
    pixels = model_class().sample_pixels(x.expand(10_000, 1, 28, 28))
    assert 0 <= pixels.min() and pixels.max() <= 1
    assert (pixels.mean(0) - x[0]).abs().max() < 0.025  # five standard errors


@every_model
def test_decoded_pixels_are_the_sigmoid_of_the_logits(model_class):
    model, z = model_class().eval(), torch.randn(5, 10)
    torch.testing.assert_close(model.decode(z).flatten(1), model.logits(z).sigmoid())


@every_model
def test_mean_and_deviation_of_reparameterized_samples(model_class):
    torch.manual_seed(0)
    mu, sigma = torch.tensor([[-2.0, 0.5]]), torch.tensor([[0.1, 3.0]])
    z = model_class(2).reparameterize(mu.expand(100_000, 2), sigma.expand(100_000, 2))
    assert ((z.mean(0) - mu[0]).abs() < 5 * sigma[0] / 100_000**0.5).all()
    assert ((z.std(0) / sigma[0] - 1).abs() < 0.02).all()


@every_model
def test_gradients_of_reparameterize(model_class):
    """Gradients for mu and sigma match finite differences and pass through the decoder."""
    torch.manual_seed(1)
    model, mu, log_sigma = model_class().double().eval(), *torch.randn(2, 2, 10).double()

    def drawn(mu, sigma):
        torch.manual_seed(2)  # the same noise for every evaluation
        return model.reparameterize(mu, sigma)

    posterior = mu.requires_grad_(), log_sigma.exp().requires_grad_()
    assert torch.autograd.gradcheck(drawn, posterior)
    logits = model.logits(drawn(*posterior))
    gradients = torch.autograd.grad(logits.square().sum(), posterior)
    assert all(gradient.any() for gradient in gradients)


@every_model
def test_losses_are_connected_to_every_parameter(model_class):
    model = model_class()
    sum(model.losses(digits_like(20))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_model
def test_kl_equals_torch_distributions(model_class):
    torch.manual_seed(0)
    mu, sigma = 3 * torch.randn(1000, 10), torch.randn(1000, 10).exp()
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0))
    torch.testing.assert_close(model_class().kl(mu, sigma), expected, rtol=1e-4, atol=1e-5)


@every_model
@torch.no_grad()
def test_losses_are_per_image_and_the_kld_of_forward_per_pixel(model_class):
    torch.manual_seed(0)
    model, x = model_class().eval(), digits_like(6)
    mu, sigma = model.encode(x)
    torch.manual_seed(1)
    reconstruction, kl = model.losses(x)
    torch.manual_seed(1)
    logits = model.logits(model.reparameterize(mu, sigma))
    torch.testing.assert_close(reconstruction, model.reconstruction(logits, x).sum() / 6)
    torch.testing.assert_close(kl, model.kl(mu, sigma).sum() / 6)
    torch.testing.assert_close(784 * model(x)[1], kl)


def test_log_likelihood_equals_torch_distributions():
    """It is linear in grey pixels, so it is the average over all binarized images."""
    torch.manual_seed(0)
    logits, x = 3 * torch.randn(3, 4, 784), torch.rand(4, 1, 28, 28)
    black, white = (Bernoulli(logits=logits).log_prob(torch.tensor(value)) for value in (0.0, 1.0))
    expected = torch.lerp(black, white, x.flatten(1)).sum(-1)
    torch.testing.assert_close(log_likelihood(logits, x), expected)
    torch.testing.assert_close(VAE().reconstruction(logits[0], x), -expected[0])


def test_log_likelihood_is_exact_for_large_logits():
    """sigmoid(200) rounds to 1, so probabilities would give -inf or a clamped value."""
    wrong = log_likelihood(torch.full((1, 784), 200.0), torch.zeros(1, 1, 28, 28))
    assert wrong.item() == -200 * 784


@torch.no_grad()
def test_importance_weighted_bound_equals_its_definition():
    """Burda et al. 2016, equation 8, from torch.distributions, with the same noise."""
    torch.manual_seed(0)
    model, x = VAE().eval(), digits_like(4)
    mu, sigma = model.encode(x)
    torch.manual_seed(1)
    bound = model.importance_weighted_bound(x, 50)
    torch.manual_seed(1)
    z = mu + sigma * torch.randn(50, 4, 10)
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_q = Normal(mu, sigma).log_prob(z).sum(-1)
    logits = model.logits(z.view(200, 10)).view(50, 4, 784)
    log_p = Bernoulli(logits=logits).log_prob(x.flatten(1)).sum(-1)
    log_weights = (log_p + log_prior - log_q).double()
    largest = log_weights.max()  # whose exponential would underflow
    expected = (log_weights - largest).exp().mean(0).log() + largest
    torch.testing.assert_close(bound.double(), expected, rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_importance_weighted_bound_is_exact_where_the_posterior_is():
    """A decoder that ignores z and an encoder that returns the prior: log p(x) is known."""
    model, x = VAE().eval(), digits_like(4)
    for parameter in model.parameters():
        parameter.zero_()
    bound = model.importance_weighted_bound(x, 3)
    torch.testing.assert_close(bound, torch.full((4,), -784 * math.log(2)))


@every_model
@torch.no_grad()
def test_importance_weighted_bound_of_collapsed_units_is_finite(model_class):
    model, x = model_class().eval(), digits_like(4)
    for parameter in model.encoder.parameters():
        parameter.zero_()  # in the article's model, sigma is then 0
    assert model.importance_weighted_bound(x, 10).isfinite().all()


@pytest.mark.parametrize("recipe", main.RECIPES)
def test_trained_saved_and_loaded(run_main, few_digits, tmp_path, recipe):
    succeeded(run_main(f"{SHORT} --recipe {recipe} --latent-dim 3 --epochs 2 --run run"))
    first, last = metrics(tmp_path / "run")
    assert last["train_loss"] < first["train_loss"] and math.isfinite(last["test_loss"])
    model = main.load_model(tmp_path / "run")
    assert type(model) is main.RECIPES[recipe].model and not model.training
    test_images = main.load_images("MNIST", few_digits).test
    measures = main.evaluate(model, test_images, beta=1.0, seed=0).measures
    assert measures == {name: pytest.approx(last[name], rel=1e-5) for name in measures}
