"""Recipes and data sets to start from: `cp tests/recipes.py mine.py`, delete what you do not need,
change the rest, and run `python mine.py --recipe freebits`.

Resume runs of mine.py with mine.py, and `import mine` before `load_model`.
"""

from functools import partial

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.distributions import Normal
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

import main
from vae import VAE


class Convolutional(VAE):
    """Other layers: a few convolutions find strokes anywhere in the image."""

    def __init__(self, latent_dim=10):
        super().__init__(latent_dim)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 2 * latent_dim)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7))),
            *(nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU()),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )
        self.initialize()  # the new linear layers; convolutions keep PyTorch's initialization


class FreeBits(VAE):
    """Another objective: 0.5 nats of each unit cost nothing, so that no unit is switched off
    (Kingma et al. 2016, arXiv:1606.04934, appendix C.8).
    """

    def loss(self, x, beta=1.0):
        mu, sigma = self.encode(x)
        logits = self.decoder(self.reparameterize(mu, sigma))
        kl = self.kl(mu, sigma).mean(0).clamp(min=0.5).sum()
        return self.reconstruction_loss(logits, x).mean() + beta * kl


class IWAE(VAE):
    """A tighter bound than the ELBO, from five z (Burda et al. 2016). beta has no effect."""

    def loss(self, x, beta=1.0):
        return -self.importance_weighted_bound(x, k=5).mean()


class WarmUp(VAE):
    """beta grows from 0 to its value in 20,000 steps (ten epochs of MNIST), so that units are used
    before they cost anything. The count is a buffer, which is saved and copied to the average.
    """

    def __init__(self, latent_dim=10):
        super().__init__(latent_dim)
        self.register_buffer("steps", torch.tensor(0))

    def loss(self, x, beta=1.0):
        self.steps += self.training
        return super().loss(x, beta * (self.steps / 20_000).clamp(max=1))


class Gaussian(VAE):
    """Another likelihood: grey pixels N(x_hat, scale²), a density, so that losses may be negative.
    `decode` is their mean, in [0, 1]; bce and neg_elbo stay those of Bernoulli pixels.
    """

    def __init__(self, latent_dim=10, scale=0.1):
        super().__init__(latent_dim)
        self.scale = scale

    def reconstruction_loss(self, logits, x):
        return -Normal(logits.sigmoid(), self.scale).log_prob(x).sum((1, 2, 3))


elbo = main.RECIPES["elbo"]
main.RECIPES["conv"] = elbo._replace(model=Convolutional)
main.RECIPES["freebits"] = elbo._replace(model=FreeBits)
main.RECIPES["iwae"] = elbo._replace(model=IWAE)
main.RECIPES["warmup"] = elbo._replace(model=WarmUp)
main.RECIPES["gaussian"] = elbo._replace(model=Gaussian, binarized=False)
# A recipe for each value of a hyperparameter: a run saves the recipe's name, not the value.
main.RECIPES["sharp"] = main.RECIPES["gaussian"]._replace(model=partial(Gaussian, scale=0.07))


def load_split(folder):
    """Hold out MNIST's last 10,000 training digits, in place of the test digits."""
    images = main.load_images("MNIST", folder)
    labels = datasets.MNIST(folder).targets[50_000:]
    return images._replace(
        train=images.train[:50_000], test=images.train[50_000:], test_labels=labels
    )


def read_image(path):
    """A picture as a grey image of 28 x 28 pixels, on white where it is transparent. One that is
    not square gets margins, in the colour of its corner.
    """
    image = Image.open(path)
    if image.mode.startswith(("I", "F")):  # Pillow would turn them white
        raise main.RunError(f"{path} has more than 8 bits per pixel; convert it first.")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
    return ImageOps.pad(image, (28, 28), color=image.getpixel((0, 0)))


def load_own(folder):
    """Your images, FOLDER/class/image.png: `--dataset own --data FOLDER`. A sixth of them is for
    testing. Few images need many epochs: 60 are two steps an epoch, where MNIST has 1,875.
    """
    try:
        files = datasets.ImageFolder(folder, pil_to_tensor, loader=read_image)
    except FileNotFoundError as error:
        raise main.RunError(error) from error
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    images = torch.stack([files[i][0] for i in order])
    labels = torch.tensor(files.targets)[order]
    test = len(files) // 6 + 1
    return main.Images(images[test:], images[:test], labels[:test], files.classes)


main.DATASETS["validation"] = load_split
main.DATASETS["own"] = load_own

if __name__ == "__main__":
    main.run_script()
