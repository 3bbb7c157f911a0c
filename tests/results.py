"""The figures of RESULTS.md and the README: `python tests/results.py` (takes hours).

Trains both recipes, and the steps between them, in runs/results/. Finished parts are not repeated,
so it can be interrupted, or split with `--only RECIPE-SEED ...`. `--report` trains nothing and
prints the tables of RESULTS.md from what is there; `--readme` prints the README's.
"""

import argparse
import functools
import shutil
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import recipes  # noqa: E402, F401, because it adds recipes

import main  # noqa: E402
from vae import VAE, ArticleVAE  # noqa: E402

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
    "falling-rate": ELBO._replace(binarized=False),
    "averaged": ARTICLE._replace(model=VAE, averaged=True),
    "he": ARTICLE._replace(model=VAE),
}
main.RECIPES |= STEPS
SEEDS = (0, 1, 2)
UNITS = (2, 20, 50, 100)  # `elbo` has ten
EXAMPLES = ("freebits", "iwae", "warmup", "gaussian", "conv")  # of recipes.py

OPTIONS = {
    f"{recipe}-{seed}": f"--recipe {recipe} --seed {seed}"
    for recipe in ("elbo", "article", *STEPS, *EXAMPLES)
    for seed in SEEDS
}
OPTIONS |= {f"units{n}-{seed}": f"--latent-dim {n} --seed {seed}" for n in UNITS for seed in SEEDS}
OPTIONS["split-0"] = "--dataset validation"
STAGES = dict.fromkeys(OPTIONS, (50,))  # the epochs after which a run is kept and measured
STAGES |= {"elbo-0": (3, 10, 50, 200, 500, 1000), "elbo-1": (10, 50), "elbo-2": (10, 50)}
STAGES["article-0"] = (3, 10, 50)
STAGES |= {f"units{n}-{seed}": (10,) for n in UNITS for seed in SEEDS}
STAGES |= {f"{recipe}-{seed}": (3,) for recipe in EXAMPLES for seed in SEEDS}


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


@torch.no_grad()
def mean_bound(model: VAE, images, k: int) -> float:
    """The mean importance-weighted bound on log p(x), in nats per image; images as bytes."""
    main.set_seed(1, epoch=0)
    bounds = [model.importance_weighted_bound(x, k) for x in (images / 255).split(20)]
    return torch.cat(bounds).mean().item()


@functools.cache
def measure(run: str) -> dict[str, float]:
    """The figures of RECIPE-SEED.EPOCHS on the test digits, with the same noise for every run."""
    model = main.load_model(RUNS / run)
    measures = main.evaluate(model, TEST_IMAGES, 1.0, 0).measures
    measures["binarised"] = main.evaluate(model, black_and_white(), 1.0, 1).measures["neg_elbo"]
    measures["bound"] = mean_bound(model, TEST_IMAGES, 100)
    main.set_seed(0, epoch=0)
    mu, sigma = model.encode(TEST_IMAGES / 255)
    z = model.reparameterize(mu, sigma)
    measures["kept_z"] = share_recognized(trained_classifier(), model.decode(z))
    measures["kept_mu"] = share_recognized(trained_classifier(), model.decode(mu))
    measures["dead"] = (mu == 0).all(0).sum().item()
    return measures


# ---- tables ----
def cell(runs: list[str], name: str, form: str, unit: str = "") -> str:
    """A figure of one run, or mean and standard deviation over several."""
    values = [measure(run)[name] for run in runs]
    text = format(statistics.mean(values), form)
    if len(set(values)) > 1:
        text += f" ± {statistics.stdev(values):{form}}"
    return text.replace("-", "−") + unit  # a minus as in print


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def head(*titles: str) -> None:
    row(*titles)
    row(*["---"] * len(titles))


def print_steps() -> None:
    measured = (
        "−ELBO",
        "= bce",
        "+ KL",
        "log p(x) ≥",
        "MSE",
        "active",
        "mu = 0",
        "kept, z",
        "kept, mu",
    )
    head("", *measured)
    titles = {
        "`article`": THREE["article"],
        "no ReLU at the end of the encoder": ["linear-heads-0.50"],
        "Bernoulli likelihood": ["bernoulli-0.50"],
        "both": ["both-0.50"],
        "+ He initialization, averaged weights": ["averaged-0.50"],
        "+ falling rate": ["falling-rate-0.50"],
        "`elbo`: + black and white pixels": THREE["elbo"],
    }
    for title, runs in titles.items():
        columns = [(name, ".2f") for name in ("neg_elbo", "bce", "kl", "bound")]
        columns += [("mse", ".4f"), ("active_units", ".2g"), ("dead", ".2g")]
        columns += [("kept_z", ".1f", " %"), ("kept_mu", ".1f", " %")]
        row(title, *(cell(runs, *column) for column in columns))


def print_epochs() -> None:
    stages = [stage for stage in STAGES["elbo-0"] if (RUNS / f"elbo-0.{stage}").exists()]
    head("seed 0, after", f"{stages[0]} epochs", *map(str, stages[1:]))
    for title, recipe, *column in (
        ("`elbo`: −ELBO, grey pixels", "elbo", "neg_elbo", ".2f"),
        ("`elbo`: −ELBO, black and white", "elbo", "binarised", ".2f"),
        ("`elbo`: digits kept, z", "elbo", "kept_z", ".1f", " %"),
        ("`article`: −ELBO, grey pixels", "article", "neg_elbo", ".2f"),
        ("`article`: digits kept, z", "article", "kept_z", ".1f", " %"),
    ):
        runs = [f"{recipe}-0.{stage}" for stage in stages]
        row(title, *(cell([run], *column) if (RUNS / run).exists() else "" for run in runs))
    print()
    for stage in (10, stages[-1]):
        bound = mean_bound(main.load_model(RUNS / f"elbo-0.{stage}"), black_and_white(), 500)
        print(f"log p(b) ≥ {bound:.2f} after {stage} epochs, with k = 500", flush=True)


def print_readme() -> None:
    print("recipe | epochs | −ELBO | active units | digits kept\n--- | --- | --- | --- | ---")
    last = max(stage for stage in STAGES["elbo-0"] if (RUNS / f"elbo-0.{stage}").exists())
    for title, epochs, runs in (
        ("`article`, three seeds", 50, THREE["article"]),
        ("`elbo`, three seeds", 50, THREE["elbo"]),
        ("`elbo`, one seed", last, [f"elbo-0.{last}"]),
    ):
        cells = [cell(runs, "neg_elbo", ".1f"), cell(runs, "active_units", ".2g")]
        print(f"{title} | {epochs} | {' | '.join(cells)} | {cell(runs, 'kept_z', '.1f')} %")


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
        print()
        print_epochs()
        accuracy = share_recognized(trained_classifier(), TEST_IMAGES / 255)
        print(f"\nThe classifier recognizes {accuracy:.1f} % of the test digits themselves.")
