"""The formulas of vae.py and of the measures, compared with torch.distributions and the article.

These tests fail if you change a formula itself; those in test_model.py must still pass. How `loss`
puts the formulas together is tested in test_training.py.
"""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

import main
from vae import VAE, ArticleVAE, bernoulli_nll

both_models = pytest.mark.parametrize("model_class", [VAE, ArticleVAE])


def images(batch: int) -> torch.Tensor:
    """Black and white noise."""
    return torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()


# ---- weights ----
def test_initialization():
    """He et al. 2015 (uniform), except for the encoder's last layer: PyTorch's default."""
    model = VAE()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            last = layer is model.encoder[-1]
            bound = ((1 if last else 6) / layer.in_features) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.bias.any() == last


@pytest.mark.parametrize("latent_dim", [10, 100])
@torch.no_grad()
def test_the_kl_starts_low(latent_dim):
    """Where a unit costs a nat from the start, training switches a hundred of them off."""
    torch.manual_seed(0)
    model = VAE(latent_dim)
    assert model.kl(*model.encode(images(100))).mean() < 1


# ---- the losses ----
@both_models
def test_kl_equals_torch_distributions(model_class):
    torch.manual_seed(0)
    mu, sigma = 3 * torch.randn(1000, 10), torch.randn(1000, 10).exp()
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0))
    torch.testing.assert_close(model_class().kl(mu, sigma), expected, rtol=1e-4, atol=1e-5)


def test_bernoulli_nll_equals_torch_distributions():
    """It is linear in grey pixels, so it is the average over all binarized images."""
    torch.manual_seed(0)
    logits, x = 3 * torch.randn(4, 1, 28, 28), torch.rand(4, 1, 28, 28)
    black, white = (Bernoulli(logits=logits).log_prob(torch.tensor(value)) for value in (0.0, 1.0))
    expected = -torch.lerp(black, white, x).flatten(1).sum(1)
    torch.testing.assert_close(bernoulli_nll(logits, x), expected)
    torch.testing.assert_close(VAE().reconstruction_loss(logits, x), expected)


@pytest.mark.parametrize("shape", [(4, 2, 28, 28), (3, 4, 1, 28, 28)])
def test_bernoulli_nll_refuses_logits_of_another_shape(shape):
    """Broadcast, two channels of logits would count each pixel twice."""
    with pytest.raises(ValueError, match="size"):
        bernoulli_nll(torch.zeros(shape), images(4))


def test_bernoulli_nll_is_exact_for_large_logits():
    """sigmoid(200) rounds to 1, so probabilities would give inf or a clamped value."""
    wrong = bernoulli_nll(torch.full((1, 1, 28, 28), 200.0), torch.zeros(1, 1, 28, 28))
    assert wrong.item() == 200 * 784


# ---- the bound on log p(x) ----
@torch.no_grad()
def test_importance_weighted_bound_equals_its_definition():
    """Burda et al. 2016, equation 8, from torch.distributions, with the same noise."""
    torch.manual_seed(0)
    model, x = VAE(), images(4)
    mu, sigma = model.encode(x)
    torch.manual_seed(1)
    bound = model.importance_weighted_bound(x, 50)
    torch.manual_seed(1)
    z = mu + sigma * torch.randn(50, 4, 10)
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_q = Normal(mu, sigma).log_prob(z).sum(-1)
    logits = model.decoder(z.view(200, 10)).view(50, 4, 784)
    log_p = Bernoulli(logits=logits).log_prob(x.flatten(1)).sum(-1)
    log_weights = (log_p + log_prior - log_q).double()
    largest = log_weights.max()  # whose exponential would underflow
    expected = (log_weights - largest).exp().mean(0).log() + largest
    torch.testing.assert_close(bound.double(), expected, rtol=1e-5, atol=1e-3)


@both_models
@torch.no_grad()
def test_importance_weighted_bound_of_collapsed_units_is_finite(model_class):
    model = model_class()
    for parameter in model.encoder.parameters():
        parameter.zero_()  # in the article's model, sigma is then 0
    assert model.importance_weighted_bound(images(4), 10).isfinite().all()


class Noise(VAE):
    """N(0.2, 0.3²) pixels, whatever z is."""

    def reconstruction_loss(self, logits, x):
        return -Normal(0.2, 0.3).log_prob(x).sum((1, 2, 3))


@torch.no_grad()
def test_importance_weighted_bound_has_the_models_own_likelihood():
    """Where the decoder ignores z and q is the prior, it is log p(x) itself."""
    model, x = Noise(), torch.rand(5, 1, 28, 28)
    for parameter in model.encoder.parameters():
        parameter.zero_()  # mu = 0 and sigma = 1
    log_p = Normal(0.2, 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(model.importance_weighted_bound(x, 20), log_p)


# ---- what is measured ----
def test_threshold_of_active_units():
    """A variance of mu above 0.01: Burda et al. 2016, section 5.2."""
    mu = torch.randn(50, 1)
    mu = mu / mu.std(correction=0) * torch.tensor([0.0101, 0.0099, 0, 4]).sqrt()
    model = VAE(latent_dim=4)
    model.encode = lambda x: (mu[: len(x)], torch.ones(len(x), 4))
    measures = main.evaluate(model, torch.zeros(50, 1, 28, 28).byte(), beta=1.0, seed=0).measures
    assert measures["active_units"] == 2


# ---- the article's model ----
class Article(nn.Module):
    """The article's model, written again from its text."""

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


def test_article_recipe_minimizes_the_articles_loss():
    """From the same weights, x_hat, kld, the loss and its gradients are the same."""
    torch.manual_seed(0)
    article, model, x = Article(), ArticleVAE(), torch.rand(32, 1, 28, 28)
    vector = nn.utils.parameters_to_vector(article.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())
    torch.manual_seed(1)
    x_hat, kld = article(x)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), (x_hat, kld), rtol=1e-6, atol=1e-7)
    elbo = -nn.MSELoss()(x_hat, x) - kld
    elbo.neg().backward()
    torch.manual_seed(1)
    loss = model.loss(x) / 784
    torch.testing.assert_close(loss, -elbo, rtol=1e-6, atol=0)
    loss.backward()
    for ours, theirs in zip(model.parameters(), article.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)
