"""What must be true of every VAE: shapes, ranges, gradients, the mathematics, saving and loading.

These tests run for the model of each recipe in main.py. They know neither layers nor weights, so
they must still pass after you have changed the model or added a recipe.
"""

import math

import pytest
import torch
from conftest import SHORT, load_checkpoint, metrics, succeeded
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

import main
from vae import VAE, log_likelihood

MODELS = sorted(
    {recipe.model for recipe in main.RECIPES.values()}, key=lambda model: model.__name__
)
every_model = pytest.mark.parametrize("model_class", MODELS)
every_recipe = pytest.mark.parametrize("recipe", main.RECIPES)


def digits_like(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, 28, 28, generator=generator).round()


def posterior(model, x):
    return Independent(Normal(*model.encode(x)), 1)


def log_joint(model, x, z):
    """log p(x, z) from torch.distributions, z [..., b, latent_dim] -> [..., b]."""
    logits = model.logits(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    return log_prior + Bernoulli(logits=logits).log_prob(x.flatten(1)).sum(-1)


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
def test_a_training_step_sees_pixels_between_0_and_1_whose_mean_is_the_grey_value(model_class):
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
def test_reparameterized_draws_are_of_the_posterior(model_class):
    torch.manual_seed(0)
    mu, sigma = torch.tensor([[-2.0, 0.5]]), torch.tensor([[0.1, 3.0]])
    z = model_class(2).reparameterize(mu.expand(100_000, 2), sigma.expand(100_000, 2))
    assert ((z.mean(0) - mu[0]).abs() < 5 * sigma[0] / 100_000**0.5).all()
    assert ((z.std(0) / sigma[0] - 1).abs() < 0.02).all()


@every_model
def test_gradients_pass_through_the_draw(model_class):
    """Into mu and sigma both, against finite differences; and on through the decoder."""
    torch.manual_seed(1)
    model, mu, log_sigma = model_class().double().eval(), *torch.randn(2, 2, 10).double()

    def drawn(mu, sigma):
        torch.manual_seed(2)  # the same noise for every evaluation
        return model.reparameterize(mu, sigma)

    posterior = mu.requires_grad_(), log_sigma.exp().requires_grad_()
    assert torch.autograd.gradcheck(drawn, posterior)
    x_hat = model.decode(drawn(*posterior))
    assert all(gradient.any() for gradient in torch.autograd.grad(x_hat.square().sum(), posterior))


@every_model
def test_the_losses_reach_every_parameter(model_class):
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
def test_losses_are_means_over_the_images_and_forwards_kld_is_per_pixel(model_class):
    torch.manual_seed(0)
    model, x = model_class().eval(), digits_like(6)
    mu, sigma = model.encode(x)
    torch.manual_seed(1)
    reconstruction, kl = model.losses(x)
    torch.manual_seed(1)
    logits = model.logits(mu + sigma * torch.randn_like(sigma))
    torch.testing.assert_close(reconstruction, model.reconstruction(logits, x).sum() / 6)
    torch.testing.assert_close(kl, model.kl(mu, sigma).sum() / 6)
    torch.testing.assert_close(784 * model(x)[1], kl)


@torch.no_grad()
def test_losses_of_bernoulli_pixels_are_the_negative_elbo():
    torch.manual_seed(0)
    model, x = VAE().eval(), digits_like(6)
    q = posterior(model, x)
    torch.manual_seed(1)
    losses = model.losses(x)
    torch.manual_seed(1)
    z = q.rsample()
    bce = Normal(0.0, 1.0).log_prob(z).sum(-1) - log_joint(model, x, z)
    kl = kl_divergence(q.base_dist, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(losses, (bce.mean(), kl.mean()), rtol=1e-5, atol=0)


@every_model
@torch.no_grad()
def test_log_likelihood_equals_torch_distributions(model_class):
    torch.manual_seed(0)
    model, x, z = model_class().eval(), digits_like(4), torch.randn(12, 10)
    logits = model.logits(z).view(3, 4, 784)
    expected = Bernoulli(logits=logits).log_prob(x.flatten(1)).sum(-1)
    torch.testing.assert_close(log_likelihood(logits, x), expected)


def test_log_likelihood_of_a_certain_mistake_is_exact():
    """From sigmoid(200), which is 1.0, it would be -inf or clamped."""
    wrong = log_likelihood(torch.full((1, 784), 200.0), torch.zeros(1, 1, 28, 28))
    assert wrong.item() == -200 * 784


@torch.no_grad()
def test_grey_pixels_score_the_mean_of_binarised_ones():
    """log p(b|z), averaged over b ~ Bernoulli(x), is log p(x|z): over all images of 8 pixels."""
    torch.manual_seed(0)
    logits, x = 3 * torch.randn(20, 1, 8), torch.rand(1, 1, 2, 4)
    b = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8).view(256, 1, 2, 4)
    share = Bernoulli(x).log_prob(b).sum((1, 2, 3)).exp()  # of each image among all draws
    grey = log_likelihood(logits, x).squeeze(1)  # [20]
    drawn = log_likelihood(logits.expand(20, 256, 8), b)  # [20, 256]
    torch.testing.assert_close((share * drawn).sum(1), grey)


@torch.no_grad()
def test_importance_weighted_bound_equals_its_definition():
    """Burda et al. 2016, equation 8, from torch.distributions, with the same draws."""
    torch.manual_seed(0)
    model, x = VAE().eval(), digits_like(4)
    torch.manual_seed(1)
    bound = model.importance_weighted_bound(x, 50)
    torch.manual_seed(1)
    q = posterior(model, x)
    z = q.base_dist.loc + q.base_dist.scale * torch.randn(50, 4, 10)
    log_weights = (log_joint(model, x, z) - q.log_prob(z)).double()
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


@every_recipe
def test_trained_saved_and_loaded(run_main, few_digits, tmp_path, recipe):
    succeeded(run_main(f"{SHORT} --recipe {recipe} --latent-dim 3 --epochs 2 --run run"))
    first, last = metrics(tmp_path / "run")
    assert last["train_loss"] < first["train_loss"] and math.isfinite(last["test_loss"])
    model = main.load_model(tmp_path / "run")
    assert type(model) is main.RECIPES[recipe].model and not model.training
    average = load_checkpoint(tmp_path / "run")["average"]
    torch.testing.assert_close(model.state_dict(), average, rtol=0, atol=0)
    test_images = main.load_images("MNIST", few_digits).test
    measures = main.evaluate(model, test_images, beta=1.0, seed=0).measures
    assert measures == {name: pytest.approx(last[name], rel=1e-5) for name in measures}
