"""The figures and the picture of the README: `python tests/results.py` (an hour or so, 2 cores).

Trains both recipes with three seeds, and the steps from the one to the other, for 50 epochs; each
is a run of main.py in runs/results/, which is not repeated, so the work can be split among
processes and go on after an interruption. Then prints the table and writes .github/recipes.png.
`--only RECIPE-SEED ...` trains just those.
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.utils import save_image

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402
from vae import VAE, ArticleVAE  # noqa: E402

RUNS = PROJECT / "runs" / "results"
EPOCHS = 50
SEEDS = {"article": (0, 1, 2), "elbo": (0, 1, 2)}  # the steps between them have seed 0 alone


class Bernoulli(ArticleVAE):
    """The article with the likelihood mended alone."""

    reconstruction_loss = VAE.reconstruction_loss


class Both(VAE):
    """The article with heads and likelihood mended; PyTorch's initialisation, no average."""

    initialize = ArticleVAE.initialize


class LinearHeads(Both):
    """The article with the heads mended alone."""

    reconstruction_loss = ArticleVAE.reconstruction_loss


STEPS = {
    "article": ArticleVAE,
    "linear-heads": LinearHeads,
    "bernoulli": Bernoulli,
    "both": Both,
    "elbo": VAE,  # the only one whose weights main.py averages
}


class Classifier(nn.Sequential):
    """Reads the digits that are to be kept; the small network everybody starts with."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(32 * 49, 10),
        )

    @torch.no_grad()
    def share_read_as(self, labels, images) -> float:
        self.eval()
        read = torch.cat([self(x).argmax(1) for x in images.split(1000)])
        return (read == labels).float().mean().item()


def train_classifier(images, labels) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters())
    for _ in range(4):
        classifier.train()
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(classifier(images[batch]), labels[batch]).backward()
            optimizer.step()
    return classifier


def train(name: str) -> None:
    """A run of main.py, which knows the steps as recipes here; goes on where it was stopped."""
    recipe, _, seed = name.rpartition("-")
    run = RUNS / name
    where = ["--data", str(PROJECT / "data"), "--no-visdom"]
    if (run / "checkpoint.pt").exists():
        sys.argv = ["main.py", "--resume", str(run), *where]
    else:
        options = ["--recipe", recipe, "--seed", seed, "--epochs", str(EPOCHS), "--run", str(run)]
        sys.argv = ["main.py", *options, *where]
    main.main()


def measure(name: str, classifier: Classifier, images, labels) -> tuple[dict, torch.Tensor]:
    """The figures of a finished run, and its reconstructions of the test digits."""
    checkpoint = torch.load(RUNS / name / "checkpoint.pt", weights_only=True)
    model = STEPS[name.rpartition("-")[0]]()
    model.load_state_dict(checkpoint["average"])
    with open(RUNS / name / "metrics.csv") as file:
        last = {key: float(value) for key, value in list(csv.DictReader(file))[-1].items()}
    assert last["epoch"] == EPOCHS
    torch.manual_seed(0)
    with torch.no_grad():
        x_hat = model.eval()(images)[0]
    log = (RUNS / f"{name}.log").read_text()
    figures = {
        "-ELBO": last["bce"] + last["kl"],
        "bce": last["bce"],
        "kl": last["kl"],
        "log p(x) >=": float(re.findall(r"log p\(x\) >= (\S+)", log)[-1]),
        "MSE": last["mse"],
        "active units": last["active_units"],
        "digits kept, %": 100 * classifier.share_read_as(labels, x_hat),
    }
    return figures, x_hat


def report() -> None:
    torch.set_flush_denormal(True)
    images, test_images = (part / 255 for part in main.load_images("MNIST", PROJECT / "data"))
    labels, test_labels = (
        datasets.MNIST(PROJECT / "data", train=part).targets for part in (True, False)
    )
    classifier = train_classifier(images, labels)
    accuracy = classifier.share_read_as(test_labels, test_images)
    print(f"the classifier reads {accuracy:.2%} of the test digits themselves")
    assert accuracy >= 0.98
    rows = [test_images[:16]]
    for recipe in STEPS:
        measured = [
            measure(f"{recipe}-{seed}", classifier, test_images, test_labels)
            for seed in SEEDS.get(recipe, (0,))
        ]
        cells = [recipe]
        for key in measured[0][0]:
            values = [figures[key] for figures, _ in measured]
            digits = 4 if key == "MSE" else 1
            cells.append(f"{statistics.mean(values):.{digits}f}")
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values):.{digits}f}"
        if recipe == "article":
            print(" | ".join(["recipe", *measured[0][0]]))
        print(" | ".join(cells))
        if recipe in main.RECIPES:
            rows.append(measured[0][1][:16])
    picture = PROJECT / ".github" / "recipes.png"
    picture.parent.mkdir(exist_ok=True)
    large = torch.cat(rows).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    save_image(large, picture, nrow=16, padding=4, pad_value=1.0)


def results() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="train just these, as RECIPE-SEED")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        main.RECIPES.update(STEPS)
        return train(args.train)
    RUNS.mkdir(parents=True, exist_ok=True)
    names = [f"{recipe}-{seed}" for recipe in STEPS for seed in SEEDS.get(recipe, (0,))]
    for name in args.only or names:
        log = RUNS / f"{name}.log"
        if not log.exists() or "log p(x)" not in log.read_text():
            print("training", name, flush=True)
            with open(log, "a") as file:
                command = [sys.executable, __file__, "--train", name]
                subprocess.run(command, stdout=file, check=True)
    if not args.only:
        report()


if __name__ == "__main__":
    results()
