"""The figures of RESULTS.md and the README: `python tests/results.py` (takes hours; resumable).

Trains both recipes with three seeds, and the steps between the recipes, with main.py itself, in
runs/results/. Finished parts are not repeated, so the work can be split among processes and goes on
after an interruption: `--only RECIPE-SEED ...` trains just those. `--report` trains nothing and
prints the tables of RESULTS.md from what is there; `--readme` prints the README's.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402
from vae import VAE, ArticleVAE  # noqa: E402

RUNS = PROJECT / "runs" / "results"


class LinearHeads(VAE):
    """The article's model with only the encoder's last layer corrected."""

    initialize = ArticleVAE.initialize
    reconstruction_loss = ArticleVAE.reconstruction_loss


class Bernoulli(ArticleVAE):
    """The article's model with only the likelihood corrected."""

    reconstruction_loss = VAE.reconstruction_loss


class Both(VAE):
    """The article's model with both mistakes corrected."""

    initialize = ArticleVAE.initialize


ARTICLE, ELBO = main.RECIPES["article"], main.RECIPES["elbo"]
STEPS = {  # between the two recipes
    "linear-heads": ARTICLE._replace(model=LinearHeads),
    "bernoulli": ARTICLE._replace(model=Bernoulli),
    "both": ARTICLE._replace(model=Both),
    "averaged": ELBO._replace(lr=1e-3, final_lr_factor=1.0, binarized=False),
    "falling-rate": ELBO._replace(binarized=False),
}
main.RECIPES |= STEPS
STAGES = {  # the epochs after which a run is kept and measured
    "elbo-0": (3, 10, 50, 200, 500, 1000),
    "elbo-1": (50,),
    "elbo-2": (50,),
    "article-0": (3, 10, 50),
    "article-1": (50,),
    "article-2": (50,),
} | {f"{step}-0": (50,) for step in STEPS}


def train(name: str) -> None:
    recipe, _, seed = name.rpartition("-")
    folder = RUNS / name
    for stage in STAGES[name]:
        kept = RUNS / f"{name}.{stage}"
        if kept.exists():
            continue
        begun = (folder / "checkpoint.pt").exists()
        begin = ["--recipe", recipe, "--seed", seed, "--run", str(folder), "--no-visdom"]
        how = ["--resume", str(folder)] if begun else begin
        main.main([*how, "--epochs", str(stage), "--data", str(PROJECT / "data")])
        kept.mkdir()
        shutil.copy(folder / "checkpoint.pt", kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, help="train just these")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as main.py does; on two, the classifier is another one
    for name in args.only or STAGES:
        train(name)
