"""How fast? `python tests/bench.py` on real MNIST; `--busy 2` while two other programs run.

In turns of one epoch each: main.py, also with the batch size of pytorch/examples; the article's
loop as it writes it (DataLoader, PIL, ToTensor, unfused Adam), also with its two mistakes
corrected; and the configuration of pytorch/examples `vae`. Prints the median seconds of an epoch,
the seconds until -ELBO on the test digits is below 106 nats, and what drawing an epoch takes.

main.py's seconds include its evaluation; the others' do not. Only main.py runs on one thread and
flushes subnormal numbers (PyTorch's worker threads may keep the flushing, which favours others).
"""

import argparse
import contextlib
import csv
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402
from vae import VAE, ArticleVAE  # noqa: E402

TARGET = 106  # nats, which pytorch/examples reaches in ten epochs
THREADS = torch.get_num_threads()
TEST_IMAGES = main.load_images("MNIST", PROJECT / "data").test


class Mended(VAE):
    """The article's model with its two mistakes corrected, and nothing else."""

    initialize = ArticleVAE.initialize


class Examples(VAE):
    """The model of pytorch/examples `vae`: 784-400-20, PyTorch's initialization."""

    def __init__(self):
        nn.Module.__init__(self)
        self.latent_dim = 20
        layers = nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40)
        self.encoder = nn.Sequential(*layers)
        layers = nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784), nn.Unflatten(1, (1, 28, 28))
        self.decoder = nn.Sequential(*layers)

    def encode(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, torch.exp(0.5 * logvar)


class MainPy:
    """A run of main.py that is continued by an epoch at a time."""

    def __init__(self, options: str):
        self.options = options
        self.folder = tempfile.TemporaryDirectory()

    def epoch(self, number: int) -> tuple[float, float]:
        run = Path(self.folder.name, "run")
        begin = [*self.options.split(), "--run", str(run), "--data", str(PROJECT / "data")]
        how = begin if number == 1 else ["--resume", str(run)]
        with contextlib.redirect_stdout(io.StringIO()):
            main.main([*how, "--epochs", str(number), "--device", "cpu"])
        with open(run / "metrics.csv") as file:
            last = list(csv.DictReader(file))[-1]
        return float(last["seconds"]), float(last["neg_elbo"])


class Loop:
    """A loop over a DataLoader, as most tutorials have it."""

    def __init__(self, model_class: type[VAE], batch_size: int, step):
        main.set_seed(0, epoch=0)
        self.model, self.step = model_class(), step
        data = datasets.MNIST(PROJECT / "data", train=True, transform=transforms.ToTensor())
        self.loader = DataLoader(data, batch_size=batch_size, shuffle=True)
        self.optimizer = optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self, number: int) -> tuple[float, float]:
        torch.set_num_threads(THREADS)
        torch.set_flush_denormal(False)
        main.set_seed(0, number)
        start = time.perf_counter()
        self.model.train()
        for x, _ in self.loader:
            self.step(self.model, x.to("cpu"), self.optimizer)
        seconds = time.perf_counter() - start
        torch.set_num_threads(1)
        return seconds, main.evaluate(self.model, TEST_IMAGES, 1.0, 0).measures["neg_elbo"]


def article_step(model: VAE, x, optimizer: optim.Optimizer) -> None:
    criterion = nn.MSELoss() if isinstance(model, ArticleVAE) else nn.BCELoss()
    x_hat, kld = model(x)
    elbo = -criterion(x_hat, x) - 1.0 * kld
    optimizer.zero_grad()
    elbo.neg().backward()
    optimizer.step()


def examples_step(model: VAE, data, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    recon, kld = model(data)
    loss = F.binary_cross_entropy(recon, data, reduction="sum") + kld * data.numel()
    loss.backward()
    loss.item()  # its sum is printed
    optimizer.step()


def print_table(repeats: int, limit: float) -> None:
    loops = {
        "main.py": MainPy("--no-visdom"),
        "main.py, batch of 128": MainPy("--no-visdom --batch-size 128 --lr 0.006"),
        "article's loop, corrected": Loop(Mended, 32, article_step),
        "pytorch/examples": Loop(Examples, 128, examples_step),
        "main.py, article": MainPy("--no-visdom --recipe article"),
        "article's loop": Loop(ArticleVAE, 32, article_step),
    }
    racing = list(loops)[:4]  # the others never get there
    seconds, reached = {name: [] for name in loops}, {}

    def races(name: str) -> bool:
        return name in racing and name not in reached and sum(seconds[name]) < limit

    while turn := [name for name in loops if len(seconds[name]) < repeats or races(name)]:
        for name in turn:
            taken, neg_elbo = loops[name].epoch(len(seconds[name]) + 1)
            seconds[name].append(taken)
            print(f"{name}: {taken:.1f} s, -ELBO {neg_elbo:.1f}", flush=True)
            if races(name) and neg_elbo < TARGET:
                reached[name] = len(seconds[name])
    print(f"{'':27}{'s an epoch':>12}{f's to {TARGET} nats':>18}{'epochs':>8}")
    for name, times in seconds.items():
        epochs = reached.get(name, len(times))
        total = f"{'' if name in reached else '> '}{sum(times[:epochs]):.0f}"
        race = f"{total:>18}{epochs:>8}" if name in racing else ""
        print(f"{name:27}{statistics.median(times):12.2f}{race}")


def print_drawing(epochs: int = 6) -> None:
    """The seconds of main.py's epochs, and those of drawing them, which come on top."""
    show, drawing = main.Dashboard.show, []

    def timed(*arguments) -> None:
        start = time.perf_counter()
        show(*arguments)
        drawing.append(time.perf_counter() - start)

    main.Dashboard.show = timed
    run = MainPy("--visdom http://localhost:8098")
    taken = [run.epoch(number)[0] for number in range(1, epochs + 1)]
    print(f"{statistics.median(drawing):.2f} s to draw after {statistics.median(taken):.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each, at least")
    parser.add_argument("--busy", type=int, default=0, help="programs to keep busy beside it")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which to give up")
    args = parser.parse_args()
    print(f"{platform.machine()}, {THREADS} threads, torch {torch.__version__}, {args.busy} busy")
    while_we_live = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    command = [sys.executable, "-c", while_we_live]
    others = [subprocess.Popen(command) for _ in range(args.busy)]
    try:
        print_table(args.repeats, args.limit)
        print_drawing()
    finally:
        for other in others:
            other.kill()
