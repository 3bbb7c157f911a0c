"""The figures and a picture of the README: `python tests/results.py` (takes hours; resumable).

Trains both recipes with three seeds, and the steps between the recipes, for as many epochs as
STAGES says, all with main.py itself, in runs/results/. Finished parts are not repeated, so the work
can be split among processes and continued after an interruption: `--only RECIPE-SEED ...` trains
only those; `--epochs 50` stops there; `--report` trains nothing. Then it prints the figures of all
finished parts and writes .github/recipes.png.
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
from torchvision.utils import save_image

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402
from vae import VAE, ArticleVAE  # noqa: E402

RUNS = PROJECT / "runs" / "results"


class LinearHeads(VAE):
    """The article's model with only the encoder's last layer corrected."""

    initialize = ArticleVAE.initialize
    binarize = ArticleVAE.binarize
    reconstruction = ArticleVAE.reconstruction


class Bernoulli(ArticleVAE):
    """The article's model with only the likelihood corrected."""

    reconstruction = VAE.reconstruction


class Both(LinearHeads):
    """The article's model with both mistakes corrected."""

    reconstruction = VAE.reconstruction


class Grey(VAE):
    """The default model, but trained on grey pixels."""

    binarize = ArticleVAE.binarize


STEPS = {  # between the two recipes, as rows of main.RECIPES
    "linear-heads": main.Recipe(LinearHeads, averaged=False, fast_start=False),
    "bernoulli": main.Recipe(Bernoulli, averaged=False, fast_start=False),
    "both": main.Recipe(Both, averaged=False, fast_start=False),
    "grey-slow": main.Recipe(Grey, averaged=True, fast_start=False),
    "grey": main.Recipe(Grey, averaged=True, fast_start=True),
}
main.RECIPES |= STEPS
STAGES = {  # the epochs after which a run is kept and measured
    "article-0": (3, 10, 50, 200, 1000),
    "article-1": (50,),
    "article-2": (50,),
    "elbo-0": (3, 10, 50, 200, 1000),
    "elbo-1": (50, 1000),
    "elbo-2": (50, 1000),
} | {f"{step}-0": (50,) for step in STEPS}


def train(name: str, last: int) -> None:
    recipe, _, seed = name.rpartition("-")
    folder = RUNS / name
    for stage in STAGES[name]:
        kept = RUNS / f"{name}.{stage}"
        if stage <= last and not kept.exists():
            begin = ["--recipe", recipe, "--seed", seed, "--run", str(folder), "--no-visdom"]
            begun = (folder / "checkpoint.pt").exists()
            where = ["--epochs", str(stage), "--data", str(PROJECT / "data")]
            main.main([*(["--resume", str(folder)] if begun else begin), *where])
            kept.mkdir()
            shutil.copy(folder / "checkpoint.pt", kept)


class Classifier(nn.Sequential):
    """Recognizes digits; the small network everybody starts with."""

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
        return 100 * (read == labels).float().mean().item()


def train_classifier(images, labels) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters())
    for _ in range(4):
        classifier.train()
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(classifier(images[batch] / 255), labels[batch]).backward()
            optimizer.step()
    return classifier


def load(run: str) -> VAE | None:
    """The model of a run, RECIPE-SEED.EPOCHS, or None if it has not been made yet."""
    return main.load_model(RUNS / run) if (RUNS / run).exists() else None


def binarised(images):
    """Black and white digits, sampled once as in a training step, the same for all runs. From bytes
    to bytes, 0 or 255.
    """
    model = VAE()  # before seeding, as its weights are random, too
    main.seed_noise(0)
    return (255 * model.binarize(images / 255)).byte()


@torch.no_grad()
def mean_bound(model: VAE, images, seed: int, k: int = 100) -> float:
    """The mean importance-weighted bound on log p(x), in nats per image; images as bytes."""
    main.seed_noise(seed)
    bounds = [model.importance_weighted_bound(x, k) for x in (images / 255).split(20)]
    return torch.cat(bounds).mean().item()


@torch.no_grad()
def measure(model: VAE, classifier: Classifier, images, labels) -> dict[str, float]:
    """The figures of a model on the test digits, with the noise of seed 0 for every seed."""
    measures = main.evaluate(model, images, 1.0, 0).measures
    measures_b = main.evaluate(model, binarised(images), 1.0, 1).measures  # not its own noise
    bound = mean_bound(model, images, 0)
    main.seed_noise(0)
    mu, sigma = model.encode(images / 255)
    z = model.reparameterize(mu, sigma)
    return {
        "-ELBO": measures["neg_elbo"],
        "bce": measures["bce"],
        "KL": measures["kl"],
        "log p(x) >=": bound,
        "MSE": measures["mse"],
        "active units": measures["active_units"],
        "units with mu = 0 on every digit": (mu == 0).all(0).sum().item(),
        "units with sigma = 0 on every digit": (sigma == 0).all(0).sum().item(),
        "% kept, z": classifier.share_read_as(labels, model.decode(z)),
        "% kept, mu": classifier.share_read_as(labels, model.decode(mu)),
        "-ELBO, binarised": measures_b["neg_elbo"],
    }


def sentence(measured: list[dict[str, float]]) -> str:
    """The figures of one run, or mean and standard deviation over several."""
    parts = []
    for key in measured[0]:
        values = [figures[key] for figures in measured]
        digits = 4 if key == "MSE" else 1 if "%" in key or "units" in key else 2
        parts.append(f"{key} {statistics.mean(values):.{digits}f}")
        if len(values) > 1:
            parts[-1] += f" ± {statistics.stdev(values):.{digits}f}"
    return ", ".join(parts)


def report() -> None:
    images, test_images, test_labels, _ = main.load_images("MNIST", PROJECT / "data")
    labels = datasets.MNIST(PROJECT / "data").targets
    x, classifier = test_images / 255, train_classifier(images, labels)
    accuracy = classifier.share_read_as(test_labels, x)
    print(f"the classifier reads {accuracy:.2f} % of the test digits themselves")
    assert accuracy >= 98

    kept = [f"{name}.{stage}" for name, stages in STAGES.items() for stage in stages]
    rows = {run: [run] for run in kept}
    for recipe, epochs in (("article", 50), ("elbo", 50), ("elbo", 1000)):
        rows[f"{recipe}.{epochs}"] = [f"{recipe}-{seed}.{epochs}" for seed in (0, 1, 2)]

    @functools.cache  # most are in a row of their own and in a mean
    def figures(run: str) -> dict[str, float] | None:
        model = load(run)
        return measure(model, classifier, test_images, test_labels) if model else None

    for name, runs in rows.items():
        measured = [figures(run) for run in runs if figures(run)]
        if measured:
            print(f"{name} ({len(measured)}): {sentence(measured)}", flush=True)
    for run in kept:
        if run.startswith("elbo") and (model := load(run)):
            for k in (100, 500):
                bound = mean_bound(model, binarised(test_images), 1, k)
                print(f"{run}: log p(b) >= {bound:.2f} (k = {k})", flush=True)

    pair = load("article-0.50"), load("elbo-0.50")
    if all(pair):
        digits = [x[:16]]
        for model in pair:
            main.seed_noise(0)
            digits.append(model(x)[0][:16].detach())
        large = torch.cat(digits).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        save_image(large, PROJECT / ".github" / "recipes.png", nrow=16, padding=4, pad_value=1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, help="train just these")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--epochs", type=int, choices=STAGES["elbo-0"], default=1000)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)  # as main.py does; on two, the classifier is another one
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in [] if args.report else args.only or STAGES:
        train(name, args.epochs)
    if not args.only:
        report()
