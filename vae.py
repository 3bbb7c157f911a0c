"""A variational autoencoder (VAE) for 28 x 28 images: the model and its mathematics.

    x -> encoder -> mu, sigma      z = mu + sigma * eps, eps ~ N(0, 1)      z -> decoder -> x_hat

`VAE` is the model to use. `ArticleVAE` reproduces the blog post that this project started from
("the article", see the README), including its two mistakes; it differs from `VAE` only in the
methods it overrides. Its layers have the article's names and positions, so the article's state dict
loads into it.

All losses and bounds are in nats per image, except for the KL that `forward` returns.

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
            nn.Linear(256, 784),  # log-odds: `decode` applies the sigmoid
        )
        self.initialize()

    def initialize(self) -> None:
        """He initialization of every linear layer; call it again after replacing layers.

        PyTorch's default weights are too small for ReLU networks: at first z hardly changes the
        decoded image, so the KL can switch off a latent unit before the decoder uses it. The last
        layers have no ReLU, but smaller weights made them slightly worse. If you add convolutions,
        they keep PyTorch's initialization, which was better for them (tests/RESULTS.md).
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def binarize(self, x: Tensor) -> Tensor:
        """Grey x in [0, 1] -> black and white x, sampled anew for every training step. A pixel is 1
        with its grey value as the probability (Burda et al. 2016, section 5).
        """
        return (torch.rand_like(x) < x).float()  # twice as fast as torch.bernoulli on a CPU

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu and sigma, each [b, latent_dim], with sigma > 0."""
        mu, log_sigma = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return mu, log_sigma.exp()  # sigma itself, because the article's encoder returns sigma

    def reparameterize(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """Sample z ~ N(mu, sigma²) with the reparameterization trick.

        Gradients cannot pass through direct sampling, but z as a function of independent noise has
        gradients with respect to mu and sigma (Kingma & Welling 2014, section 2.4).
        """
        return mu + sigma * torch.randn_like(sigma)

    def logits(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> the log-odds of each pixel, [b, 784].

        The likelihood is computed from logits: a sigmoid can round to 0, and log 0 is infinite.
        """
        return self.decoder(z)

    def decode(self, z: Tensor) -> Tensor:
        """z [b, latent_dim] -> x_hat [b, 1, 28, 28] in [0, 1], the mean of p(x|z)."""
        return self.logits(z).sigmoid().view(-1, 1, 28, 28)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> x_hat, of the same shape, and kld, a scalar in nats per pixel.

        The article's interface, for those who come from there; main.py does not use it.
        """
        mu, sigma = self.encode(x)
        x_hat = self.decode(self.reparameterize(mu, sigma))
        return x_hat, self.kl(mu, sigma).sum() / x.numel()

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] -> the reconstruction loss and the KL, averaged over the batch.

        In `VAE`, their sum is the negative evidence lower bound (ELBO), estimated with one sample
        of z per image (Kingma & Welling 2014, equations 7 and 10).

        main.py minimizes the first plus beta times the second, and measures the same on all test
        images at once as `test_loss`. Put another objective here, such as free bits, and not into
        `kl`, from which the ELBO is measured. A single loss is returned with a second one of 0,
        `loss.new_zeros(())`.
        """
        mu, sigma = self.encode(x)
        logits = self.logits(self.reparameterize(mu, sigma))
        return self.reconstruction(logits, x).mean(), self.kl(mu, sigma).sum(1).mean()

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z) of each image: logits [b, 784], x [b, 1, 28, 28] -> [b].

        Override this for another likelihood, as ArticleVAE does. `bce` in metrics.csv is measured
        with `log_likelihood` all the same, so that models can be compared: `logits` must stay the
        log-odds of pixels.
        """
        return -log_likelihood(logits, x)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """KL(q(z|x) || p(z)), exact and per unit, [b, latent_dim] (Kingma & Welling, appendix B).

        Another prior also needs another `importance_weighted_bound`, and in main.py other samples
        (`make_pictures`) and another `traversal`.
        """
        return 0.5 * (mu.square() + sigma.square() - 1) - sigma.log()

    def importance_weighted_bound(self, x: Tensor, k: int) -> Tensor:
        """x [b, 1, 28, 28] -> a lower bound on log p(x), [b] (Burda et al. 2016, equation 8).

        The pixels are Bernoulli variables, whatever the model's `reconstruction` is. For black and
        white x, the bound approaches log p(x) as k grows; for k = 1 its expectation is the ELBO.
        For grey x, it bounds the mean over the images that `VAE.binarize` samples from x. It needs
        memory for k * b images.
        """
        mu, sigma = self.encode(x)
        # ArticleVAE's sigma can be 0, where q has no density. The bound holds for any q, so a
        # minimum is allowed.
        sigma = sigma.clamp(min=1e-4)
        eps = torch.randn(k, *mu.shape, dtype=mu.dtype, device=mu.device)
        z = mu + sigma * eps
        # log N(z; 0, 1) - log N(z; mu, sigma²), where (z - mu) / sigma = eps and log 2 pi cancels.
        log_p_minus_log_q = (sigma.log() + 0.5 * (eps.square() - z.square())).sum(-1)
        logits = self.logits(z.flatten(0, 1)).unflatten(0, (k, -1))
        log_weight = log_likelihood(logits, x) + log_p_minus_log_q
        return log_weight.logsumexp(0) - math.log(k)


def log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x|z) of Bernoulli pixels: logits [..., b, 784], x [b, 1, 28, 28] -> [..., b]."""
    pixels = x.flatten(1).expand_as(logits)
    return -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(-1)


class ArticleVAE(VAE):
    """The article's model to the letter, with its two mistakes.

    1. The encoder ends in a ReLU, so mu cannot be negative. The KL pulls mu towards 0, and once the
       ReLU's input is negative there is no gradient to bring it back. After 50 epochs, 7 to 9 of
       the ten units have mu = 0 and sigma near 1 for every test digit: they carry no information.
    2. Squared error plus KL is the negative ELBO of Gaussian pixels with variance 1/2. For pixels
       in [0, 1] that variance is so large that some units would add more to the KL than they
       would take from the squared error.
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__(latent_dim)
        self.encoder.append(nn.ReLU())

    def initialize(self) -> None:
        pass  # PyTorch's default, as in the article

    def binarize(self, x: Tensor) -> Tensor:
        """Return x itself: the article trains on grey pixels."""
        return x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, 1, 28, 28] in [0, 1] -> mu and sigma, each [b, latent_dim], both >= 0."""
        return self.encoder(x.flatten(1)).chunk(2, dim=1)

    def reconstruction(self, logits: Tensor, x: Tensor) -> Tensor:
        """Squared error of each image, [b]. Up to a constant, -log p(x|z) of N(x_hat, 1/2)."""
        return (logits.sigmoid() - x.flatten(1)).square().sum(1)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """As in `VAE`, but the article's 1e-8 keeps it finite: at sigma = 0 it is
        0.5 * (mu² - log 1e-8 - 1) = 8.7 + mu² / 2.
        """
        return 0.5 * (mu.square() + sigma.square() - torch.log(1e-8 + sigma.square()) - 1)
