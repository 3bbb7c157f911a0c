"""The figures of RESULTS.md and the README: `python tests/results.py` (takes hours).

Trains both recipes, and the steps between them, in runs/results/. Finished parts are not repeated,
so it can be interrupted, or split with `--only RECIPE-SEED ...`. `--report` trains nothing and
prints the tables of RESULTS.md from what is there; `--readme` prints the README's.
"""

import argparse
import functools
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import recipes  # noqa: E402, F401, because it adds recipes

import main  # noqa: E402
from vae import VAE, ArticleVAE, bernoulli_nll  # noqa: E402

RUNS = PROJECT / "runs" / "results"


class LinearHeads(VAE):  # the article's model with only the encoder's last layer corrected
    initialize = ArticleVAE.initialize
    reconstruction_loss = ArticleVAE.reconstruction_loss


class Bernoulli(ArticleVAE):  # with only the likelihood corrected
    reconstruction_loss = VAE.reconstruction_loss


class Both(VAE):  # with both mistakes corrected
    initialize = ArticleVAE.initialize


ARTICLE, ELBO = main.RECIPES["article"], main.RECIPES["elbo"]
STEPS = {  # between the two recipes
    "both": ARTICLE._replace(model=Both),
    "linear-heads": ARTICLE._replace(model=LinearHeads),
    "bernoulli": ARTICLE._replace(model=Bernoulli),
    "grey": ELBO._replace(binarized=False),
}
main.RECIPES |= STEPS
SEEDS = (0, 1, 2)
UNITS = (2, 20, 50, 100)  # `elbo` has ten

OPTIONS = {
    f"{recipe}-{seed}": f"--recipe {recipe} --seed {seed}"
    for recipe in ("elbo", "article", *STEPS)
    for seed in SEEDS
}
OPTIONS |= {f"units{n}-0": f"--latent-dim {n}" for n in UNITS}
OPTIONS["split-0"] = "--dataset validation"
STAGES = dict.fromkeys(OPTIONS, (50,))  # the epochs after which a run is kept and measured
STAGES |= {"elbo-0": (3, 10, 50, 200, 500, 1000), "article-0": (3, 10, 50)}
STAGES |= {f"units{n}-0": (10,) for n in UNITS}


def train(name: str) -> None:
    folder = RUNS / name
    for stage in STAGES[name]:
        kept = RUNS / f"{name}.{stage}"
        if not kept.exists():
            begun = (folder / "checkpoint.pt").exists()
            begin = [*OPTIONS[name].split(), "--run", str(folder), "--no-visdom"]
            how = ["--resume", str(folder)] if begun else begin
            main.main([*how, "--epochs", str(stage), "--data", str(PROJECT / "data")])
            kept.mkdir()
            shutil.copy(folder / "checkpoint.pt", kept)


# ---- what is measured ----
IMAGES, TEST_IMAGES, TEST_LABELS, _ = main.load_images("MNIST", PROJECT / "data")


@torch.no_grad()
def share_recognized(classifier: nn.Module, images) -> float:
    classifier.eval()
    read = torch.cat([classifier(x).argmax(1) for x in images.split(1000)])
    return 100 * (read == TEST_LABELS).float().mean().item()


@functools.cache
def trained_classifier() -> nn.Module:
    """A small convolutional network that recognizes digits."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32 * 49, 10)),
    )
    labels = datasets.MNIST(PROJECT / "data").targets
    optimizer = torch.optim.Adam(classifier.parameters())
    for _ in range(4):
        for batch in torch.randperm(len(IMAGES)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(classifier(IMAGES[batch] / 255), labels[batch]).backward()
            optimizer.step()
    return classifier


def black_and_white():
    """The test digits, sampled once as in a training step; the same for all runs."""
    main.set_seed(0, epoch=0)
    return (255 * main.binarize(TEST_IMAGES / 255)).byte()


def remembered(function: Callable) -> Callable:
    """Keep a run's figures in its folder; delete these .json files to measure it again."""

    @functools.wraps(function)
    def look_up(run: str, *arguments):
        path = RUNS / run / f"{'-'.join([function.__name__, *map(str, arguments)])}.json"
        if not path.exists():
            path.write_text(json.dumps(function(run, *arguments)))
        return json.loads(path.read_text())

    return look_up


@remembered
def measure(run: str) -> dict[str, float]:
    """The figures of RECIPE-SEED.EPOCHS on the test digits, with the same noise for every run."""
    model = main.load_model(RUNS / run)
    measures = main.evaluate(model, TEST_IMAGES, 1.0, 0).measures
    measures["binarized"] = main.evaluate(model, black_and_white(), 1.0, 1).measures["neg_elbo"]
    main.set_seed(0, epoch=0)
    mu, sigma = model.encode(TEST_IMAGES / 255)
    z = model.reparameterize(mu, sigma)
    measures["kept_z"] = share_recognized(trained_classifier(), model.decode(z))
    measures["kept_mu"] = share_recognized(trained_classifier(), model.decode(mu))
    measures["dead"] = (mu == 0).all(0).sum().item()
    return measures


@remembered
@torch.no_grad()
def bound(run: str, pixels: str, k: int) -> float:
    """The mean bound on log p of Bernoulli pixels, whatever the model was trained with."""
    model = main.load_model(RUNS / run)
    model.reconstruction_loss = bernoulli_nll
    images = TEST_IMAGES if pixels == "grey" else black_and_white()
    main.set_seed(1, epoch=0)
    bounds = [model.importance_weighted_bound(x, k) for x in (images / 255).split(20)]
    return torch.cat(bounds).mean().item()


# ---- tables ----
def seeds(recipe: str, epochs: int) -> list[str]:
    return [f"{recipe}-{seed}.{epochs}" for seed in SEEDS]


def figure(values: list[float], form: str, unit: str = "") -> str:
    """One value, or mean and standard deviation of several."""
    text = format(statistics.mean(values), form)
    if len(set(values)) > 1:
        text += f" ± {statistics.stdev(values):{form}}"
    return text.replace("-", "−") + unit  # a minus as in print


def cell(runs: list[str], name: str, form: str, unit: str = "") -> str:
    return figure([measure(run)[name] for run in runs], form, unit)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*titles: str) -> None:
    print()
    row(*titles)
    row(*["---"] * len(titles))


def print_steps() -> None:
    measured = "−ELBO", "= bce", "+ KL", "log p ≥", "MSE", "active", "mu = 0"
    head("50 epochs", *measured, "kept, z", "kept, mu")
    for recipe, title in {
        "article": "`article`",
        "linear-heads": "no ReLU at the end of the encoder",
        "bernoulli": "Bernoulli likelihood",
        "both": "both",
        "grey": "+ He initialization, averaged weights, a doubled rate that falls to half",
        "elbo": "`elbo`: + black and white pixels",
    }.items():
        runs = seeds(recipe, 50)
        cells = [cell(runs, name, ".2f") for name in ("neg_elbo", "bce", "kl")]
        cells.append(figure([bound(run, "grey", 100) for run in runs], ".2f"))
        cells += [cell(runs, "mse", ".4f"), cell(runs, "active_units", ".2g")]
        cells += [cell(runs, "dead", ".2g"), cell(runs, "kept_z", ".1f", " %")]
        row(title, *cells, cell(runs, "kept_mu", ".1f", " %"))


def print_epochs() -> None:
    stages = STAGES["elbo-0"]
    head("seed 0, after", f"{stages[0]} epochs", *map(str, stages[1:]))
    for title, recipe, *column in (
        ("`elbo`: −ELBO, grey pixels", "elbo", "neg_elbo", ".2f"),
        ("`elbo`: −ELBO, black and white", "elbo", "binarized", ".2f"),
        ("`elbo`: digits kept, z", "elbo", "kept_z", ".1f", " %"),
        ("`article`: −ELBO, grey pixels", "article", "neg_elbo", ".2f"),
        ("`article`: digits kept, z", "article", "kept_z", ".1f", " %"),
    ):
        runs = [f"{recipe}-0.{stage}" for stage in stages]
        row(title, *(cell([run], *column) if (RUNS / run).exists() else "" for run in runs))
    for stage in (10, 1000):
        value = bound(f"elbo-0.{stage}", "black and white", 500)
        print(f"log p(y) ≥ {figure([value], '.2f')} after {stage} epochs, with k = 500")


def print_units() -> None:
    head("seed 0, 10 epochs", "−ELBO", "= bce", "+ KL", "active")
    for n in sorted({10, *UNITS}):
        run = [f"units{n}-0.10" if n in UNITS else "elbo-0.10"]
        cells = [cell(run, name, ".2f") for name in ("neg_elbo", "bce", "kl")]
        row(f"{n} units", *cells, cell(run, "active_units", ".0f"))


def print_split() -> None:
    images = main.load_images("validation", PROJECT / "data").test
    model = main.load_model(RUNS / "split-0.50")
    validation = main.evaluate(model, images, 1.0, 0).measures["neg_elbo"]
    test = measure("split-0.50")["neg_elbo"]
    print(f"\nThe split: −ELBO {validation:.2f} on validation digits, {test:.2f} on test digits.")


def print_readme() -> None:
    print("recipe | epochs | −ELBO | active units | digits kept\n--- | --- | --- | --- | ---")
    for title, epochs, runs in (
        ("`article`, three seeds", 50, seeds("article", 50)),
        ("`elbo`, three seeds", 50, seeds("elbo", 50)),
        ("`elbo`, one seed", 1000, ["elbo-0.1000"]),
    ):
        cells = [cell(runs, "neg_elbo", ".1f"), cell(runs, "active_units", ".2g")]
        print(f"{title} | {epochs} | {' | '.join(cells)} | {cell(runs, 'kept_z', '.1f', ' %')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, help="train just these")
    parser.add_argument("--report", action="store_true", help="train nothing, print RESULTS.md's")
    parser.add_argument("--readme", action="store_true", help="train nothing, print README's")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # as main.py does; on two, the classifier is another one
    if not (args.report or args.readme):
        for name in args.only or STAGES:
            train(name)
    if args.readme:
        print_readme()
    elif not args.only:
        print_steps()
        print_epochs()
        print_units()
        print_split()
        accuracy = share_recognized(trained_classifier(), TEST_IMAGES / 255)
        print(f"\nThe classifier recognizes {accuracy:.1f} % of the test digits themselves.")
