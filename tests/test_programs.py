"""main.main called from notebooks and threads, and main.py with its output in a pipe."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from conftest import PROJECT, SHORT, load_checkpoint, metrics, succeeded, wait_for
from jupyter_client.manager import start_new_kernel

import main

OPTIONS = f"{SHORT} --epochs 1"


@pytest.fixture
def kernel(environment, tmp_path):
    """IPython's own kernel, with main.py and vae.py in its working folder."""
    for script in ("main.py", "vae.py"):
        shutil.copy(PROJECT / script, tmp_path)
    manager, client = start_new_kernel(startup_timeout=300, cwd=str(tmp_path), env=environment)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
def test_in_a_notebook(kernel, tmp_path):
    manager, client = kernel

    def execute(cell: str) -> None:
        reply = client.execute_interactive(cell, timeout=300, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]

    execute(f"%run main.py {OPTIONS} --run first")
    execute(f"import main; run = main.main('{OPTIONS} --run second'.split())")
    execute("main.load_model(run)")
    assert len(metrics(tmp_path / "first")) == len(metrics(tmp_path / "second")) == 1

    # With stop_on_error, the kernel would drop requests that are sent right after an error.
    options = f"{SHORT} --epochs 100000 --run third"
    client.execute(f"main.main('{options}'.split())", stop_on_error=False)
    wait_for((tmp_path / "third" / "metrics.csv").exists)
    manager.interrupt_kernel()
    content = client.get_shell_msg(timeout=300)["content"]
    saved = len(load_checkpoint(tmp_path / "third")["history"])
    assert content["status"] == "error"
    *_, command = content["evalue"].splitlines()
    execute(f"{command[:-2]}, '--epochs', '{saved + 1}'])")  # main.main(['--resume', 'third'])
    assert len(metrics(tmp_path / "third")) == saved + 1


def test_in_a_thread(environment, tmp_path):
    """Signal handlers can only be set in the main thread."""
    thread = threading.Thread(target=main.main, args=(f"{OPTIONS} --run run".split(),))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path / "run")) == 1


def test_the_lock_is_released_after_an_error(a_run):
    """Even if the exception is kept alive, as in notebooks."""
    with pytest.raises(SystemExit) as kept:
        main.main(f"{OPTIONS} --run run".split())
    main.main(["--resume", "run"])
    assert "not empty" in str(kept.value)


@pytest.mark.parametrize("wanted", [None, "3"])
def test_one_thread_unless_the_user_wants_more(run_main, monkeypatch, wanted):
    threads, before = [], torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(main, "experiment", lambda *_: threads.append(torch.get_num_threads()))
    if wanted:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    try:
        succeeded(run_main(OPTIONS))
        assert threads == [int(wanted or 1)]
    finally:
        torch.set_num_threads(before)


def test_output_that_cannot_encode_the_name_of_the_run(environment, tmp_path):
    """And each row reaches a file or pipe as soon as it is printed."""
    command = [sys.executable, main.__file__, *f"{SHORT} --epochs 90 --run 実験".split()]
    settings = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **settings) as process:
        assert any(line.split()[:1] == ["2"] for line in process.stdout)
        process.kill()
    saved = len(load_checkpoint(tmp_path / "実験")["history"])
    assert saved < 90  # whose rows would not fill a pipe's buffer
    command = [sys.executable, main.__file__, "--resume", "実験", "--epochs", str(saved + 1)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, **settings).stdout
    assert output.splitlines()[-1] == r"Saved in \u5b9f\u9a13"
