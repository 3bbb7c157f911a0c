"""A variational autoencoder (VAE) for 28 x 28 images: the model and its mathematics.

    x -> encoder -> mu, sigma      z = mu + sigma * eps, eps ~ N(0, I)      z -> decoder -> x_hat

`VAE` is the model to use. `ArticleVAE` reproduces the blog post that this project started from
("the article", see the README), including its two mistakes.

Losses and bounds are in nats per image; only `forward` returns a KL per pixel.

References:
    Kingma & Welling 2014, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Burda, Grosse & Salakhutdinov 2016, Importance Weighted Autoencoders, arXiv:1509.00519
    He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852
"""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F


class VAE(nn.Module):
    """A VAE with a Gaussian posterior q(z|x) = N(mu, sigma²), a standard normal prior p(z) and
    Bernoulli pixels p(x|z).
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 2 * latent_dim),  # mu and log sigma
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 64),
            nn.ReLU(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 784),
            nn.Unflatten(1, (1, 28, 28)),  # logits, the log-odds of each pixel
        )
        self.initialize()

    def initialize(self) -> None:
        """He initialization of all linear layers but one; call it again after replacing layers.

        The encoder's last layer keeps PyTorch's weights, which are 0.41 times as large as He's, so
        that the KL starts low. With 100 latent units it is then 7 nats instead of 50, which could
        make training switch off all units before the decoder uses them.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer is not self.encoder[-1]:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu and sigma, each [b, latent_dim], with sigma > 0.
        It is not log sigma because the sigma of `ArticleVAE`, a subclass, can be 0.
        """
        mu, log_sigma = self.encoder(x).chunk(2, dim=1)
        return mu, log_sigma.exp()

    def reparameterize(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """Sample z ~ N(mu, sigma²) with the reparameterization trick.

        Gradients cannot pass through direct sampling, but z as a function of independent noise has
        gradients with respect to mu and sigma (Kingma & Welling 2014, section 2.4).
        """
        return mu + sigma * torch.randn_like(sigma)

    def decode(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> x_hat [b, 1, 28, 28] in [0, 1], the mean of p(x|z)."""
        return self.decoder(z).sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> x_hat, of the same shape, and kld, a scalar in nats per pixel: the
        article's interface. Training uses `loss`.
        """
        mu, sigma = self.encode(x)
        x_hat = self.decode(self.reparameterize(mu, sigma))
        return x_hat, self.kl(mu, sigma).sum() / x.numel()

    def loss(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """x [b, 1, 28, 28] -> the objective, a scalar in nats per image, averaged over the batch.

        With beta = 1 it is the negative evidence lower bound (ELBO), estimated with one sample of z
        per image (Kingma & Welling 2014, equations 7 and 10). Override it for another objective.
        """
        mu, sigma = self.encode(x)
        # Not x_hat: a sigmoid rounds large logits to 1, and log(1 - 1) is infinite.
        logits = self.decoder(self.reparameterize(mu, sigma))
        return self.reconstruction_loss(logits, x).mean() + beta * self.kl(mu, sigma).sum(1).mean()

    def reconstruction_loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) of each image: logits and x [b, 1, 28, 28] -> [b]."""
        return bernoulli_nll(logits, x)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)) per unit, [b, latent_dim], exact (Kingma & Welling, appendix B)."""
        return 0.5 * (mu.square() + sigma.square() - 1) - sigma.log()

    def importance_weighted_bound(self, x: Tensor, k: int) -> Tensor:
        """x [b, 1, 28, 28] -> a lower bound on log p(x), [b], estimated with k samples of z per
        image (Burda et al. 2016, equation 8), to compare models. It needs memory for k * b images.

        It approaches log p(x) as k grows, and for k = 1 its expectation is the ELBO. p(x|z) is the
        model's own, so `reconstruction_loss` must include constants; that of `ArticleVAE` does not.
        The prior is N(0, I): override this method together with `kl` if yours is not. For Bernoulli
        pixels and grey x, it is a bound on the mean of log p(y) instead, where y is black and white
        and each pixel of y is 1 with probability x.
        """
        mu, sigma = self.encode(x)
        # Clamped, as q has no density where ArticleVAE's sigma is 0; the bound holds for any q.
        # Without validation, a NaN reaches the loss, which training reports in one sentence.
        q = Normal(mu, sigma.clamp(min=1e-4), validate_args=False)
        prior = Normal(0.0, 1.0, validate_args=False)
        z = q.rsample((k,))  # [k, b, latent_dim]
        logits = self.decoder(z.flatten(0, 1))  # [k * b, 1, 28, 28]
        nll = self.reconstruction_loss(logits, x.repeat(k, 1, 1, 1)).unflatten(0, (k, -1))
        log_weight = (prior.log_prob(z) - q.log_prob(z)).sum(-1) - nll
        return log_weight.logsumexp(0) - math.log(k)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) of Bernoulli pixels: logits and x, both [b, 1, 28, 28] -> [b]."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))


class ArticleVAE(VAE):
    """The article's model to the letter, with its two mistakes.

    1. The encoder ends in a ReLU, so mu cannot be negative. The KL pulls mu towards 0, and once the
       ReLU's input is negative for every image, mu gets no gradient. In our runs, most units end
       with mu = 0 and sigma near 1 for every test digit: they carry nothing.
    2. Squared error plus KL is the negative ELBO of Gaussian pixels with variance 1/2. For pixels
       in [0, 1] that variance is so large that most units cost more KL than they save in squared
       error.
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__(latent_dim)
        self.encoder.append(nn.ReLU())

    def initialize(self) -> None:
        pass  # PyTorch's default, as in the article

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu and sigma, each [b, latent_dim], both >= 0."""
        return self.encoder(x).chunk(2, dim=1)

    def reconstruction_loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Squared error of each image, [b]. Up to a constant, -log p(x|z) of N(x_hat, 1/2)."""
        return (logits.sigmoid() - x).square().sum((1, 2, 3))

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """As in `VAE`, but the article's 1e-8 keeps it finite: at sigma = 0 it is
        0.5 * (mu² - log 1e-8 - 1) = 8.7 + mu² / 2.
        """
        return 0.5 * (mu.square() + sigma.square() - torch.log(1e-8 + sigma.square()) - 1)
