"""The mathematics of vae.py against independent references."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from vae import VAE, ArticleVAE, log_likelihood


def digits_like(batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, 28, 28, generator=generator).round()


class Article(nn.Module):
    """The article's model, written out again from its text, on PyTorch alone."""

    def __init__(self):
        super().__init__()
        encoder, decoder = [784, 256, 64, 20], [10, 64, 256, 784]
        self.encoder = nn.Sequential(*self.layers(encoder))
        self.decoder = nn.Sequential(*self.layers(decoder)[:-1], nn.Sigmoid())

    @staticmethod
    def layers(sizes):
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        return [layer for n, m in pairs for layer in (nn.Linear(n, m), nn.ReLU())]

    def forward(self, x):
        code = self.encoder(x.reshape(len(x), 784))
        mu, sigma = code[:, :10], code[:, 10:]
        h = mu + sigma * torch.randn(len(x), 10)
        x_hat = self.decoder(h).reshape(len(x), 1, 28, 28)
        kld = 0.5 * (mu**2 + sigma**2 - torch.log(1e-8 + sigma**2) - 1).sum()
        return x_hat, kld / (len(x) * 28 * 28)


@pytest.mark.parametrize("model_class", [VAE, ArticleVAE])
def test_shapes_and_ranges(model_class):
    model, x = model_class(latent_dim=7), digits_like(5)
    mu, sigma = model.encode(x)
    assert mu.shape == sigma.shape == model.kl(mu, sigma).shape == (5, 7)
    z = model.reparameterize(mu, sigma)
    assert z.shape == (5, 7)
    x_hat, kld = model(x)
    assert x_hat.shape == model.decode(z).shape == (5, 1, 28, 28)
    assert 0 <= x_hat.min() and x_hat.max() <= 1
    assert model.reconstruction(model.logits(z), x).shape == (5,)
    assert kld.shape == () and all(loss.shape == () for loss in model.losses(x))


def test_heads():
    """The mended sigma is positive and mu takes both signs; the article's are never negative."""
    torch.manual_seed(0)
    x = 3 * torch.randn(500, 1, 28, 28)
    mu, sigma = VAE().encode(x)
    assert (sigma > 0).all() and (mu < 0).any() and (mu > 0).any()
    mu, sigma = ArticleVAE().encode(x)
    assert mu.min() == 0 and sigma.min() == 0


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mu, sigma = 3 * torch.randn(1000, 10), torch.randn(1000, 10).exp()
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0))
    torch.testing.assert_close(VAE().kl(mu, sigma), expected, rtol=1e-5, atol=1e-6)
    assert ArticleVAE().kl(torch.zeros(3, 10), torch.ones(3, 10)).abs().max() < 1e-7


def test_gradients_pass_through_the_draw():
    """Into mu and sigma both, against finite differences."""
    torch.manual_seed(1)
    model, mu, log_sigma = VAE().double(), *torch.randn(2, 2, 10, dtype=torch.double)

    def decoded(mu, sigma):
        torch.manual_seed(2)  # the same noise for every evaluation
        return model.decode(model.reparameterize(mu, sigma)).square().sum()

    posterior = mu.requires_grad_(), log_sigma.exp().requires_grad_()
    assert torch.autograd.gradcheck(decoded, posterior, eps=1e-5, rtol=1e-5, atol=1e-8)
    gradients = torch.autograd.grad(decoded(*posterior), posterior)
    assert all(gradient.abs().min() > 0 for gradient in gradients)


def test_reparameterize_draws_from_the_posterior():
    torch.manual_seed(0)
    mu, sigma = torch.tensor([[-2.0, 0.5]]), torch.tensor([[0.1, 3.0]])
    z = VAE(2).reparameterize(mu.expand(100_000, 2), sigma.expand(100_000, 2))
    assert ((z.mean(0) - mu[0]).abs() < 5 * sigma[0] / 100_000**0.5).all()
    assert ((z.std(0) / sigma[0] - 1).abs() < 0.02).all()


def test_drawn_pixels_are_0_or_1_and_their_means_the_grey_values():
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 784).view(1, 1, 28, 28)
    drawn = VAE().draw_pixels(x.expand(10_000, 1, 28, 28))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - x[0]).abs().max() < 0.025  # five standard errors
    assert drawn[:, 0, 0, 0].max() == 0 and drawn[:, 0, -1, -1].min() == 1
    assert ArticleVAE().draw_pixels(x) is x


def posterior(model, x):
    return Independent(Normal(*model.encode(x)), 1)


def log_joint(model, x, z):
    """log p(x, z) from torch.distributions, z [..., b, latent_dim] -> [..., b]."""
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    pixels = Bernoulli(logits=model.logits(z))
    return log_prior + pixels.log_prob(x.flatten(1)).sum(-1)


@torch.no_grad()
def test_losses_are_the_terms_of_the_elbo_per_image_and_forwards_kld_is_per_pixel():
    torch.manual_seed(0)
    model, x = VAE(), digits_like(6)
    q = posterior(model, x)
    kl = kl_divergence(q.base_dist, Normal(0.0, 1.0)).sum() / 6
    torch.manual_seed(1)
    losses = model.losses(x)
    torch.manual_seed(1)
    z = q.rsample()
    reconstruction = Normal(0.0, 1.0).log_prob(z).sum(-1) - log_joint(model, x, z)
    torch.testing.assert_close(losses, (reconstruction.mean(), kl), rtol=1e-5, atol=0)
    torch.testing.assert_close(784 * model(x)[1], kl, rtol=1e-5, atol=0)


@torch.no_grad()
def test_log_likelihood_equals_torch_distributions():
    torch.manual_seed(0)
    model, x, z = VAE(), digits_like(4), torch.randn(3, 4, 10)
    expected = Bernoulli(logits=model.logits(z)).log_prob(x.flatten(1)).sum(-1)
    torch.testing.assert_close(log_likelihood(model.logits(z), x), expected)
    torch.testing.assert_close(model.reconstruction(model.logits(z[0]), x), -expected[0])
    certain = log_likelihood(torch.full((1, 784), 200.0), torch.zeros(1, 1, 28, 28))
    assert certain.item() == -200 * 784  # from sigmoid(200) = 1.0 it would be -inf or clamped


@torch.no_grad()
def test_grey_pixels_score_the_mean_of_binarised_ones():
    """log p(b|z), averaged over b ~ Bernoulli(x), is log p(x|z): over all images of 8 pixels."""
    torch.manual_seed(0)
    logits, x = 3 * torch.randn(20, 1, 8), torch.rand(1, 1, 2, 4)
    b = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8).view(256, 1, 2, 4)
    share = Bernoulli(x).log_prob(b).sum((1, 2, 3)).exp()  # of each image among the drawn ones
    grey = log_likelihood(logits, x).squeeze(1)  # [20]
    drawn = log_likelihood(logits.expand(20, 256, 8), b)  # [20, 256]
    torch.testing.assert_close((share * drawn).sum(1), grey)


@torch.no_grad()
def test_importance_weighted_bound_equals_its_definition():
    """Burda et al. eq. 8 from torch.distributions, with the same draws."""
    torch.manual_seed(0)
    model, x = VAE(), digits_like(4)
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
    model, x = VAE(), digits_like(4)
    for parameter in model.parameters():
        parameter.zero_()
    bound = model.importance_weighted_bound(x, 3)
    torch.testing.assert_close(bound, torch.full((4,), -784 * math.log(2)))


@torch.no_grad()
def test_importance_weighted_bound_of_dead_units_is_finite():
    model, x = ArticleVAE(), digits_like(4)
    for parameter in model.encoder.parameters():
        parameter.zero_()
    assert (model.encode(x)[1] == 0).all()
    assert model.importance_weighted_bound(x, 10).isfinite().all()


def test_article_recipe_trains_as_the_article():
    """The same x_hat, kld and loss at first, and the same weights after ten steps of each."""
    torch.manual_seed(0)
    article, model = Article(), ArticleVAE()
    for ours in (VAE(), model):
        ours.load_state_dict(article.state_dict())
    untrained = {name: weight.clone() for name, weight in article.state_dict().items()}
    adam = torch.optim.Adam(article.parameters(), lr=1e-3)
    ours = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for step in range(10):
        x = digits_like(32, step)
        torch.manual_seed(step)
        x_hat, kld = article(x)
        elbo = -nn.MSELoss()(x_hat, x) - 1.0 * kld
        torch.manual_seed(step)
        torch.testing.assert_close(model(x), (x_hat, kld), rtol=1e-4, atol=1e-4)
        torch.manual_seed(step)
        loss = sum(model.losses(model.draw_pixels(x))) / 784
        torch.testing.assert_close(loss, -elbo, rtol=1e-5, atol=1e-6)
        for optimizer, minimised in ((adam, -elbo), (ours, loss)):
            optimizer.zero_grad()
            minimised.backward()
            optimizer.step()
    for name, weight in article.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-5)
        assert (weight - untrained[name]).abs().max() > 1e-3
