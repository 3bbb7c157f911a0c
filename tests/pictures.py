"""The README's pictures: `python tests/pictures.py`, in headless Chromium, after results.py."""

import io
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from torchvision.utils import save_image

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import main  # noqa: E402

PICTURES = PROJECT / ".github"
SERVER = "http://localhost:8099"
PLAIN = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def photographs(page: Page, env: str, options: str) -> list[Image.Image]:
    """The page after each of ten epochs."""
    shots = []
    with tempfile.TemporaryDirectory() as folder:
        begin = (
            f"{options} --data {PROJECT}/data --run {folder}/{env} --visdom {SERVER} --env {env}"
        )
        for epoch in range(1, 11):
            how = begin if epoch == 1 else f"--resume {folder}/{env}"
            main.main(f"{how} --epochs {epoch}".split())
            page.goto(f"{SERVER}/env/{env}")
            page.locator(".react-grid-item").nth(6).wait_for()
            page.wait_for_timeout(3000)  # until the panes have moved to their places
            shots.append(Image.open(io.BytesIO(page.screenshot())))
    return shots


def draw_dashboard(page: Page) -> None:
    """It begins with the tenth epoch, which is what stands still if the picture does not move."""
    shots = photographs(page, "elbo", "--recipe elbo")
    frames = [shots[-1], *shots[:-1]]
    how = {"save_all": True, "append_images": frames[1:], "loop": 0, "quality": 80, "method": 6}
    frames[0].save(PICTURES / "dashboard.webp", duration=[4000] + [1000] * 9, **how)


def draw_plane(page: Page) -> None:
    photographs(page, "plane", "--latent-dim 2")[-1].save(PICTURES / "plane.png", optimize=True)


def draw_recipes() -> None:
    x = main.load_images("MNIST", PROJECT / "data").test[:16] / 255
    rows = [x]
    for recipe in ("article", "elbo"):
        model = main.load_model(PROJECT / "runs" / "results" / f"{recipe}-0.50")
        main.set_seed(0, epoch=0)
        rows.append(model(x)[0])
    large = torch.cat(rows).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    save_image(large, PICTURES / "recipes.png", nrow=16, padding=4, pad_value=1.0)


if __name__ == "__main__":
    draw_recipes()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=PLAIN)
        page = browser.new_page(viewport={"width": 1280, "height": 650})
        draw_dashboard(page)
        draw_plane(page)
