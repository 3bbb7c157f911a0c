"""A variational autoencoder for 28 x 28 images: the model and its mathematics.

    x -> encoder -> mu, sigma;   z = mu + sigma * eps, eps ~ N(0, 1);   z -> decoder -> x_hat

`VAE` is the model to use. `ArticleVAE` is the same network as one widely copied article writes it;
the methods it overrides are all that differs. A state dict of either loads into the other.

Everything is in nats per image, except the kld of `forward`, which the article wants per pixel.

Sources: Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114; Burda, Grosse &
Salakhutdinov 2016, Importance Weighted Autoencoders, arXiv:1509.00519.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VAE(nn.Module):
    """Gaussian posterior N(mu, sigma²), standard normal prior, Bernoulli pixels.

    The decoder ends in a Sigmoid, but the likelihood is computed from the logits before it: once
    the Sigmoid has rounded to 0 or 1, its logarithm is lost.
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 64),
            nn.ReLU(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 784),
            nn.Sigmoid(),
        )
        self.initialize()

    def initialize(self) -> None:
        """As in He et al. 2015, arXiv:1502.01852. PyTorch's default is too small for ReLU layers:
        before the decoder has learnt to use a unit, the KL may have shut it down.
        """
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def draw_pixels(self, x: Tensor) -> Tensor:
        """x in [0, 1] -> what a training step sees: 0s and 1s, with the grey values as their
        probabilities (Burda et al., section 5). Override it for a likelihood of grey pixels.
        """
        return (torch.rand_like(x) < x).float()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu, sigma, [b, latent_dim] each, sigma > 0."""
        mu, log_sigma = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return mu, log_sigma.exp()  # the exponential keeps sigma positive

    def reparameterize(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """A draw z ~ N(mu, sigma²), of their shape, by the reparameterization trick (Kingma &
        Welling, section 2.4): a draw from N(mu, sigma²) itself would have no gradient with respect
        to mu and sigma, but a sum and a product with noise from elsewhere have one.
        """
        return mu + sigma * torch.randn_like(sigma)

    def logits(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> the log-odds of each pixel, [b, 784]."""
        all_but_the_sigmoid = self.decoder[:-1]
        return all_but_the_sigmoid(z)

    def decode(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> x_hat [b, 1, 28, 28] in [0, 1], the mean of p(x|z)."""
        return self.decoder(z).view(-1, 1, 28, 28)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> x_hat of that shape, and kld, a scalar in nats per pixel."""
        mu, sigma = self.encode(x)
        x_hat = self.decode(self.reparameterize(mu, sigma))
        return x_hat, self.kl(mu, sigma).sum() / x.numel()

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> reconstruction and KL, the means over the batch.

        In this class their sum is -ELBO, with one draw of z an image (Kingma & Welling, equations
        7 and 10).
        """
        mu, sigma = self.encode(x)
        logits = self.logits(self.reparameterize(mu, sigma))
        return self.reconstruction(logits, x).mean(), self.kl(mu, sigma).sum(1).mean()

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z); logits [b, 784], x [b, 1, 28, 28] -> [b]."""
        return -log_likelihood(logits, x)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """KL(N(mu, sigma²) || N(0, 1)) of each latent unit (Kingma & Welling, appendix B)."""
        return 0.5 * (mu.square() + sigma.square() - 1) - sigma.log()

    def importance_weighted_bound(self, x: Tensor, k: int) -> Tensor:
        """x [b, 1, 28, 28] -> a lower bound on log p(x), [b] (Burda et al. eq. 8).

        With k = 1 its mean is the ELBO; it rises to log p(x) as k grows. It holds k·b decoded
        images in memory. The bound holds for any Gaussian from which z is drawn, so
        a sigma of 0, which has no density, may be raised.
        """
        mu, sigma = self.encode(x)
        sigma = sigma.clamp(min=1e-4)
        eps = torch.randn(k, *mu.shape, dtype=mu.dtype, device=mu.device)
        z = mu + sigma * eps
        # log N(z; 0, 1) - log N(z; mu, sigma²), where (z - mu) / sigma is eps and log 2 pi cancels.
        log_prior_over_q = (sigma.log() + 0.5 * (eps.square() - z.square())).sum(-1)
        logits = self.logits(z.flatten(0, 1)).unflatten(0, (k, -1))
        log_weight = log_likelihood(logits, x) + log_prior_over_q
        return log_weight.logsumexp(0) - math.log(k)


def log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x|z) of Bernoulli pixels; logits [..., b, 784], x [b, 1, 28, 28] -> [..., b].

    It measures every model, whatever loss the model was trained with.
    """
    pixels = x.flatten(1).expand_as(logits)
    return -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)


class ArticleVAE(VAE):
    """The article to the letter, with its two faults.

    1. The encoder ends in a ReLU, so mu cannot be negative. The KL draws mu to 0, and past 0 a
       ReLU has no gradient of its own: after 50 epochs 7 or 8 of ten units have mu = 0 on every
       test digit, and a sigma near 1. (Units can come back, as the layers below go on
       changing. A sigma of exactly 0 is rarer; the 1e-8 in `kl` keeps the KL finite there.)
    2. Mean squared error beside a unit-weight KL is a Gaussian likelihood with variance 1/2, far
       too weak for pixels in [0, 1]: ignoring z costs less than using it.
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__(latent_dim)
        self.encoder.append(nn.ReLU())

    def initialize(self) -> None:
        """PyTorch's default, as in the article."""

    def draw_pixels(self, x: Tensor) -> Tensor:
        """The grey values themselves, as the squared error is one of grey values."""
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu, sigma, [b, latent_dim] each, neither negative."""
        return self.encoder(x.flatten(1)).chunk(2, dim=1)

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """Squared error, [b]: -log p(x|z) of N(x_hat, 1/2), less a constant."""
        return (logits.sigmoid() - x.flatten(1)).square().sum(1)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """As in `VAE`, but finite at sigma = 0: 8.7 nats if mu = 0, too."""
        return 0.5 * (mu.square() + sigma.square() - torch.log(1e-8 + sigma.square()) - 1)
