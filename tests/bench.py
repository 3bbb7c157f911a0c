"""How fast? `python tests/bench.py` on real MNIST; `--busy 2` while two other programs run.

Compares, in one process and in turns of one epoch each: main.py's loop, by default and with
`--batch-size 128 --lr 0.003`, the batch size of pytorch/examples; the article's loop as the article
writes it (DataLoader, PIL, ToTensor, unfused Adam), for its own model and for one with its two
mistakes corrected; the configuration of pytorch/examples `vae`; and the matrix products of an epoch
of ours alone. Prints the median seconds of an epoch, and the seconds of training until -ELBO on the
whole test set is below 106 nats.

Only main.py's loop runs on one thread and flushes subnormal numbers; both are set before each turn.
(PyTorch's worker threads may keep the flushing, which favours the others.)
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402
from vae import VAE, ArticleVAE  # noqa: E402

TARGET = 106  # nats, which pytorch/examples reaches in ten epochs


class Mended(VAE):
    """The article's model with its two mistakes corrected, and nothing else."""

    initialize = ArticleVAE.initialize


class Examples(VAE):
    """The model of pytorch/examples `vae`: 784-400-20, PyTorch's initialisation."""

    def __init__(self):
        nn.Module.__init__(self)
        self.latent_dim = 20
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def encode(self, x):
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return mu, torch.exp(0.5 * logvar)


class Loop:
    """A training, one epoch per call. `measured` is the model whose -ELBO is measured."""

    threads, flush = torch.get_num_threads(), False

    def __init__(self, model_class: type[VAE], batch_size: int):
        main.seed_noise(0)
        self.model = self.measured = model_class()
        folder, to_tensor = PROJECT / "data", transforms.ToTensor()
        data_set = datasets.MNIST(folder, train=True, transform=to_tensor)
        self.loader = DataLoader(data_set, batch_size=batch_size, shuffle=True)
        self.optimizer = optim.Adam(self.model.parameters(), lr=1e-3)


class ArticleLoop(Loop):
    def train(self, epoch: int) -> None:
        criterion = nn.MSELoss() if isinstance(self.model, ArticleVAE) else nn.BCELoss()
        self.model.train()
        for x, _ in self.loader:
            x = x.to("cpu")
            x_hat, kld = self.model(x)
            loss = criterion(x_hat, x)
            elbo = -loss - 1.0 * kld
            loss = -elbo
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class ExamplesLoop(Loop):
    def train(self, epoch: int) -> None:
        self.model.train()
        train_loss = 0
        for data, _ in self.loader:
            data = data.to("cpu")
            self.optimizer.zero_grad()
            recon, kld = self.model(data)
            bce = F.binary_cross_entropy(recon.view(-1, 784), data.view(-1, 784), reduction="sum")
            loss = bce + kld * data.numel()
            loss.backward()
            train_loss += loss.item()
            self.optimizer.step()


class OurLoop:
    threads, flush = 1, True

    def __init__(self, recipe: str, images: torch.Tensor, batch_size=32, lr=1e-3):
        main.seed_noise(0)
        self.args = argparse.Namespace(batch_size=batch_size, lr=lr, beta=1.0)
        self.images = images
        model, averaged, fast_start = main.RECIPES[recipe]
        self.model = self.measured = model()
        self.average = None
        if averaged:
            self.average = AveragedModel(self.model, avg_fn=main.polynomial_decay, use_buffers=True)
            self.measured = self.average.module
        self.optimizer = optim.Adam(self.model.parameters(), lr, fused=True)
        factor = main.learning_rate_factor if fast_start else lambda epochs_done: 1.0
        self.schedule = optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def train(self, epoch: int) -> None:
        learners = self.model, self.average, self.optimizer
        main.train(self.args, *learners, self.images, epoch)
        self.schedule.step()


class Products:
    """The products of forward and backward, as many steps as in an epoch, and nothing else."""

    threads, flush = 1, True

    def __init__(self, steps: int):
        self.steps = steps
        layers = [layer for layer in VAE().modules() if isinstance(layer, nn.Linear)]
        self.weights = [layer.weight.detach() for layer in layers]
        self.inputs = [torch.rand(32, weight.shape[1]) for weight in self.weights]
        self.gradients = [torch.rand(32, weight.shape[0]) for weight in self.weights]

    def train(self, epoch: int) -> None:
        for _ in range(self.steps):
            together = zip(self.inputs, self.gradients, self.weights, strict=True)
            for i, (x, gradient, weight) in enumerate(together):
                x @ weight.t()
                gradient.t() @ x
                if i:  # the image needs no gradient
                    gradient @ weight


def seconds_of_an_epoch(loop, epoch: int) -> float:
    torch.set_num_threads(loop.threads)
    torch.set_flush_denormal(loop.flush)
    main.seed_noise(0, epoch)  # otherwise every epoch would repeat the noise of the evaluation
    start = time.perf_counter()
    loop.train(epoch)
    return time.perf_counter() - start


def negative_elbo(loop, test_images: torch.Tensor) -> float:
    torch.set_num_threads(1)
    return main.evaluate(loop.measured, test_images, 1.0, 0).measures["neg_elbo"]


def print_table(repeats: int, limit: float) -> None:
    images, test_images, *_ = main.load_images("MNIST", PROJECT / "data")
    loops = {
        "elbo, main.py": OurLoop("elbo", images),
        "elbo, batch of 128": OurLoop("elbo", images, 128, 3e-3),
        "elbo, article's loop": ArticleLoop(Mended, 32),
        "pytorch/examples": ExamplesLoop(Examples, 128),
        "article, main.py": OurLoop("article", images),
        "article, article's loop": ArticleLoop(ArticleVAE, 32),
        "matrix products": Products(-(-len(images) // 32)),
    }
    racing = list(loops)[:4]  # the others never get there
    seconds, reached = {name: [] for name in loops}, {}

    def races(name: str) -> bool:
        return name in racing and name not in reached and sum(seconds[name]) < limit

    while turn := [name for name in loops if len(seconds[name]) < repeats or races(name)]:
        for name in turn:
            epoch = len(seconds[name]) + 1
            seconds[name].append(seconds_of_an_epoch(loops[name], epoch))
            if races(name) and (nats := negative_elbo(loops[name], test_images)) < TARGET:
                reached[name] = epoch
                reach = f"{nats:.1f} nats, {sum(seconds[name]):.0f} s"
                print(f"{name}, epoch {epoch}: {reach}", flush=True)
    print(f"{'':25}{'s an epoch':>12}{'vs article':>12}{f's to {TARGET} nats':>18}{'epochs':>8}")
    median = {name: statistics.median(times[:repeats]) for name, times in seconds.items()}
    for name, typical in median.items():
        article = median.get(f"{name.partition(',')[0]}, article's loop")
        faster = f"{article / typical:.2f} x" if article else ""
        epochs = reached.get(name, len(seconds[name]))
        total = f"{'' if name in reached else '> '}{sum(seconds[name][:epochs]):.0f}"
        race = f"{total:>18}{epochs:>8}" if name in racing else ""
        print(f"{name:25}{typical:12.2f}{faster:>12}{race}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="epochs whose median is printed")
    parser.add_argument("--busy", type=int, default=0, help="programs to keep busy beside it")
    parser.add_argument("--limit", type=float, default=1200, help="seconds after which to give up")
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, {args.busy} other programs busy"
    )
    while_we_live = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    command = [sys.executable, "-c", while_we_live]
    others = [subprocess.Popen(command) for _ in range(args.busy)]
    try:
        print_table(args.repeats, args.limit)
    finally:
        for other in others:
            other.kill()
