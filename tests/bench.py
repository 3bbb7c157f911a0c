"""How fast is an epoch? `python tests/bench.py` prints one table, on real MNIST.

Side by side, in one process and in turns: the article's loop as the article writes it (DataLoader,
PIL, ToTensor, unfused Adam), main.py's loop for the same recipe and batch size, and the bare matrix
products of its steps, which nothing that computes this network can beat. Each turn is one epoch of
a training that goes on; the table has the medians. Where JAX is installed, the same network runs
there too, one compiled scan per epoch.

main.py flushes subnormal numbers, the article does not. The switch is set before each turn, but
PyTorch's worker threads keep main.py's setting throughout, which favours the article.
"""

import argparse
import copy
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import transforms

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402

WATCHED = """
import re, runpy, sys, time
from pathlib import Path
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
def peak():  # of this process alone: the usual ru_maxrss begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
def first_step(*_):
    hook.remove()
    print("first step:", time.time() - start)
hook = register_optimizer_step_pre_hook(first_step)
start = float(sys.argv[1])
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].removesuffix("main.py"))
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak:", peak() - before)
"""


def article_loop(recipe: str, batch_size: int):
    """The article's training loop, one epoch a call."""
    data_set = torchvision.datasets.MNIST(
        PROJECT / "data", train=True, transform=transforms.ToTensor()
    )
    loader = DataLoader(data_set, batch_size=batch_size, shuffle=True)
    model = main.RECIPES[recipe]()
    criterion = nn.MSELoss() if recipe == "article" else nn.BCELoss()
    optimizer = optim.Adam(model.parameters(), lr=1e-3)

    def epoch():
        torch.set_flush_denormal(False)
        model.train()
        for x, _ in loader:
            x = x.to("cpu")
            x_hat, kld = model(x)
            loss = criterion(x_hat, x)
            elbo = -loss - 1.0 * kld
            loss = -elbo
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def our_loop(recipe: str, images: torch.Tensor, batch_size: int):
    """main.py's training of one epoch a call."""
    model = main.RECIPES[recipe]()
    average = model if recipe == "article" else copy.deepcopy(model)
    optimizer = optim.Adam(model.parameters(), lr=1e-3, fused=True)
    options = argparse.Namespace(batch_size=batch_size, beta=1.0)
    epochs = 0

    def epoch():
        nonlocal epochs
        epochs += 1
        torch.set_flush_denormal(True)
        main.train(model, average, optimizer, images, options, epochs)

    return epoch


def matrix_products(images: torch.Tensor, batch_size: int):
    """The products of forward and backward, as many steps as in an epoch, and nothing else."""
    layers = [layer for layer in main.VAE().modules() if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach() for layer in layers]
    inputs = [torch.rand(batch_size, weight.shape[1]) for weight in weights]
    gradients = [torch.rand(batch_size, weight.shape[0]) for weight in weights]

    def epoch():
        for _ in range(-(-len(images) // batch_size)):
            for i, (x, gradient, weight) in enumerate(zip(inputs, gradients, weights, strict=True)):
                x @ weight.t()
                gradient.t() @ x
                if i:  # the image needs no gradient
                    gradient @ weight

    return epoch


def jax_scan(images: torch.Tensor, batch_size: int):
    """The mended recipe in JAX: one jitted scan an epoch, Adam written out."""
    import jax
    from jax import numpy as jnp

    data = jnp.asarray((images / 255).flatten(1).numpy())
    model = main.VAE()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    weights = [
        (jnp.asarray(layer.weight.detach().numpy().T), jnp.asarray(layer.bias.detach().numpy()))
        for layer in layers
    ]

    def mlp(layers, x):
        for weight, bias in layers[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        return x @ layers[-1][0] + layers[-1][1]

    def loss(weights, x, noise):
        mu, log_sigma = jnp.split(mlp(weights[:3], x), 2, axis=1)
        logits = mlp(weights[3:], mu + jnp.exp(log_sigma) * noise)
        bce = (jax.nn.softplus(logits) - x * logits).sum()
        kl = (0.5 * (mu**2 + jnp.exp(2 * log_sigma) - 1) - log_sigma).sum()
        return (bce + kl) / x.size

    def step(state, inputs):
        weights, m, v, t = state
        index, key = inputs
        x = data[index]
        gradient = jax.grad(loss)(weights, x, jax.random.normal(key, (batch_size, 10)))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)
        weights = jax.tree.map(
            lambda w, m, v: w - 1e-3 * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),
            weights,
            m,
            v,
        )
        return (weights, m, v, t + 1), None

    @jax.jit
    def scan(state, key):
        steps = len(data) // batch_size
        order = jax.random.permutation(key, len(data))[: steps * batch_size]
        inputs = order.reshape(steps, batch_size), jax.random.split(key, steps)
        return jax.lax.scan(step, state, inputs)[0]

    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = (weights, zeros, zeros, 1.0)
    state = scan(state, jax.random.key(0))  # compiles

    def epoch():
        nonlocal state
        state = jax.block_until_ready(scan(state, jax.random.key(1)))

    return epoch


def watch_a_run(batch_size: int) -> tuple[str, str]:
    """Seconds from a run's start to its first step, and MiB that it needs beyond `import torch`."""
    options = ["--epochs", "1", "--no-visdom", "--batch-size", str(batch_size)]
    options += ["--data", str(PROJECT / "data")]
    start = str(time.time())
    command = [sys.executable, "-c", WATCHED, start, str(PROJECT / "main.py"), *options]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    first_step = re.search(r"first step: (\S+)", done.stdout)[1]
    return f"{float(first_step):.2f}", f"{done.stdout.split()[-1]} MiB"


def print_table() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    images, _ = main.load_images("MNIST", PROJECT / "data")
    print(
        f"{platform.machine()}, {args.threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, medians of {args.repeats} epochs"
    )
    columns = "{:>5}  {:26}{:>8}{:>10}{:>12}{:>13}".format
    print(columns("batch", "loop", "seconds", "images/s", "vs article", "vs products"))
    for batch_size in args.batch_size:
        loops = {"matrix products": matrix_products(images, batch_size)}
        for recipe in main.RECIPES:
            loops[f"{recipe}, article's loop"] = article_loop(recipe, batch_size)
            loops[f"{recipe}, main.py"] = our_loop(recipe, images, batch_size)
        try:
            loops["elbo, JAX scan"] = jax_scan(images, batch_size)
        except ImportError:
            pass
        seconds = {name: [] for name in loops}
        for _ in range(args.repeats):
            for name, epoch in loops.items():
                start = time.perf_counter()
                epoch()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        for name, time_ in median.items():
            article = median.get(f"{name.partition(',')[0]}, article's loop")
            faster = f"{article / time_:.2f} x" if article else ""
            slower = f"{time_ / median['matrix products']:.2f} x"
            rate = f"{len(images) / time_:,.0f}"
            print(columns(batch_size, name, f"{time_:.2f}", rate, faster, slower))
        first_step, peak = watch_a_run(batch_size)
        print(columns(batch_size, "main.py's first step after", first_step, "", "", ""))
        print(columns(batch_size, "main.py's peak memory", peak, "", "", ""))


if __name__ == "__main__":
    print_table()
