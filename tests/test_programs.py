"""main.py called by notebooks and other programs, which get their process back as it was."""

import contextlib
import io
import os
import shutil
import signal
import socket
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
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


STATE = """
import signal, socket, torch
state = lambda: (signal.getsignal(signal.SIGTERM), socket.getdefaulttimeout(),
                 torch.get_num_threads(), torch.get_rng_state().sum().item())
torch.set_num_threads(2); before = state()
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own libraries
def test_in_a_notebook(kernel, tmp_path):
    manager, client = kernel
    cells = [
        STATE,
        f"%run main.py {OPTIONS} --run first\nassert state() == before",
        f"import main; run = main.main('{OPTIONS} --run second'.split())\nassert state() == before",
        "main.load_model(run); before = state()",
    ]
    for cell in cells:
        reply = client.execute_interactive(cell, timeout=300, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]
    assert len(metrics(tmp_path / "first")) == len(metrics(tmp_path / "second")) == 1

    # By default a kernel also aborts what is sent within an instant after an error.
    client.execute(f"main.main('{SHORT} --run third'.split())", stop_on_error=False)
    wait_for((tmp_path / "third" / "metrics.csv").exists)
    manager.interrupt_kernel()
    reply = wait_for(lambda: client.get_shell_msg(timeout=300))
    assert reply["content"]["status"] == "error" and "--resume" in str(reply["content"])
    reply = client.execute_interactive("assert state() == before", timeout=300)
    assert reply["content"]["status"] == "ok"


def test_in_a_thread_and_with_the_output_elsewhere(environment, tmp_path):
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=main.main, args=(f"{OPTIONS} --run thread".split(),))
    thread.start()
    thread.join()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main.main(f"{OPTIONS} --run redirected".split())
    assert main.HEAD in output.getvalue()
    assert len(metrics(tmp_path / "thread")) == len(metrics(tmp_path / "redirected")) == 1
    assert handlers == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    assert socket.getdefaulttimeout() is None


def test_a_refusal_leaves_no_lock_behind(a_run):
    """Not even while somebody keeps its traceback, as notebooks do."""
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
        assert threads == [int(wanted or 1)] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_as_a_program_with_a_name_that_the_output_cannot_encode(environment, tmp_path):
    """And every row is in a file or pipe as soon as it is printed."""
    command = [sys.executable, main.__file__, *SHORT.split(), "--run", "実験"]
    settings = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **settings) as process:
        assert any(line.split()[:1] == ["2"] for line in process.stdout)
        process.kill()
    saved = len(load_checkpoint(tmp_path / "実験")["history"])
    command = [sys.executable, main.__file__, "--resume", "実験", "--epochs", str(saved + 1)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, **settings).stdout
    assert output.splitlines()[-1] == r"Saved in \u5b9f\u9a13"


def test_a_closed_output(environment, tmp_path):
    command = f"{sys.executable} {main.__file__} {OPTIONS} --run run >&-"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    assert len(metrics(tmp_path / "run")) == 1
