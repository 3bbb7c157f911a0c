"""A variational autoencoder (VAE) for 28 x 28 images: the model and its mathematics.

    x -> encoder -> mu, sigma      z = mu + sigma * eps, eps ~ N(0, 1)      z -> decoder -> x_hat

`VAE` is the model to use. `ArticleVAE` is the model of the blog post that this project started from
("the article" below), reproduced with its mistakes; the methods it overrides are all that differs.
Both keep the article's layers and names, so a state dict of one loads into the other.

All losses and bounds are in nats per image. The one exception is the kld that `forward` returns,
which is per pixel, as in the article.

References:
    Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Burda, Grosse & Salakhutdinov 2016, Importance Weighted Autoencoders, arXiv:1509.00519
    He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VAE(nn.Module):
    """A VAE with a Gaussian posterior q(z|x) = N(mu, sigma²), a standard normal prior p(z) and
    Bernoulli pixels p(x|z).
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
            nn.Sigmoid(),  # part of the article's decoder; `logits` leaves it out
        )
        self.initialize()

    def initialize(self) -> None:
        """Initialize as in He et al. 2015, with the gain for ReLU in every linear layer.

        PyTorch's default weights are too small for ReLU networks: the KL can switch off a latent
        unit before the decoder has learned to use it.
        """
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def sample_pixels(self, x: Tensor) -> Tensor:
        """Turn grey values in [0, 1] into the 0s and 1s that a training step sees, of the same
        shape, with each grey value as the probability of a 1 (Burda et al. 2016, section 5).

        Override this for a likelihood of grey pixels.
        """
        return (torch.rand_like(x) < x).float()  # twice as fast as torch.bernoulli on a CPU

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu and sigma, each [b, latent_dim], with sigma > 0."""
        mu, log_sigma = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return mu, log_sigma.exp()

    def reparameterize(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """Sample z ~ N(mu, sigma²), of their shape, by the reparameterization trick.

        Sampling is not differentiable. Written as a function of mu, sigma and independent noise,
        z has a gradient with respect to mu and sigma (Kingma & Welling 2014, section 2.4).
        """
        return mu + sigma * torch.randn_like(sigma)

    def logits(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> the log-odds of each pixel, [b, 784].

        The likelihood is computed from these: where the Sigmoid has rounded to 0 or 1, it is too
        late to take a logarithm.
        """
        decoder_without_sigmoid = self.decoder[:-1]
        return decoder_without_sigmoid(z)

    def decode(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> x_hat [b, 1, 28, 28] in [0, 1], the mean of p(x|z)."""
        return self.decoder(z).view(-1, 1, 28, 28)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> x_hat, of the same shape, and kld, a scalar in nats per pixel.

        This is the article's interface, kept for code written against it. Training uses `losses`.
        """
        mu, sigma = self.encode(x)
        x_hat = self.decode(self.reparameterize(mu, sigma))
        return x_hat, self.kl(mu, sigma).sum() / x.numel()

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> the reconstruction loss and the KL, each averaged over the batch.

        In this class their sum is the negative ELBO, estimated with one sample of z per image
        (Kingma & Welling 2014, equations 7 and 10).
        """
        mu, sigma = self.encode(x)
        logits = self.logits(self.reparameterize(mu, sigma))
        return self.reconstruction(logits, x).mean(), self.kl(mu, sigma).sum(1).mean()

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) of each image: logits [b, 784], x [b, 1, 28, 28] -> [b]."""
        return -log_likelihood(logits, x)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """KL(N(mu, sigma²) || N(0, 1)) of each latent unit, [b, latent_dim] (Kingma & Welling 2014,
        appendix B).
        """
        return 0.5 * (mu.square() + sigma.square() - 1) - sigma.log()

    def importance_weighted_bound(self, x: Tensor, k: int) -> Tensor:
        """x [b, 1, 28, 28] -> a lower bound on log p(x), [b] (Burda et al. 2016, equation 8).

        For k = 1 its expectation is the ELBO; it approaches log p(x) as k grows. Memory holds k * b
        decoded images at once.
        """
        mu, sigma = self.encode(x)
        # A unit with sigma = 0 has no density. The bound holds for every q, so a wider one is fine.
        sigma = sigma.clamp(min=1e-4)
        eps = torch.randn(k, *mu.shape, dtype=mu.dtype, device=mu.device)
        z = mu + sigma * eps
        # log N(z; 0, 1) - log N(z; mu, sigma²), where (z - mu) / sigma = eps and log 2 pi cancels.
        log_prior_over_q = (sigma.log() + 0.5 * (eps.square() - z.square())).sum(-1)
        logits = self.logits(z.flatten(0, 1)).unflatten(0, (k, -1))
        log_weight = log_likelihood(logits, x) + log_prior_over_q
        return log_weight.logsumexp(0) - math.log(k)


def log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x|z) of Bernoulli pixels: logits [..., b, 784], x [b, 1, 28, 28] -> [..., b].

    Every model is evaluated with it, whatever loss it was trained with.
    """
    pixels = x.flatten(1).expand_as(logits)
    return -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)


class ArticleVAE(VAE):
    """The article's model to the letter, with its two mistakes.

    1. The encoder ends in a ReLU, so mu cannot be negative. The KL pulls mu towards 0, and once the
       ReLU's input is negative there is no gradient to bring it back. After 50 epochs, 7 or 8 of
       the ten units have mu = 0 and sigma near 1 for every test digit: they carry no information.
    2. Mean squared error with a unit-weight KL is the ELBO of Gaussian pixels with variance 1/2. In
       [0, 1] that is so much noise that for most units using z costs more than ignoring it.
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__(latent_dim)
        self.encoder.append(nn.ReLU())

    def initialize(self) -> None:
        pass  # PyTorch's default, as in the article

    def sample_pixels(self, x: Tensor) -> Tensor:
        """Return x itself: the article trains on grey values."""
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu and sigma, each [b, latent_dim], neither negative."""
        return self.encoder(x.flatten(1)).chunk(2, dim=1)

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """Squared error of each image, [b]. Up to a constant, -log p(x|z) of N(x_hat, 1/2)."""
        return (logits.sigmoid() - x.flatten(1)).square().sum(1)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """As in `VAE`, but finite for sigma = 0, where it is 8.7 nats plus mu² / 2."""
        return 0.5 * (mu.square() + sigma.square() - torch.log(1e-8 + sigma.square()) - 1)
