"""A run that is told to stop, or killed, loses nothing: pytest tests/test_interrupts.py"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, read_metrics, torchrun
from safetensors.torch import load_file

import train
from common import run_folder
from common.errors import Interrupted
from training import interrupts


def start(args: list[str], program: tuple[str, ...] = ("train.py",)) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run came to no step {step}: {process.communicate(timeout=20)}")


def same_weights(a: Path, b: Path) -> bool:
    a, b = (load_file(f / "final" / "model.safetensors") for f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


LONG = ["--rule", "gmt", "--keep_ratio", "0.3", "--epochs", "1000", "--max_steps", "400"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(tmp_path, train_args, name):
    number = getattr(signal, name)
    process = start(train_args(tmp_path / "run", *LONG))
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err[-2000:]
    last = err.strip().splitlines()[-1]
    step = len(read_metrics(tmp_path / "run"))
    assert last == f"train.py: {name}: saved step {step} of 400; the same command with --resume goes on"
    assert "Traceback" not in err
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert json.loads((saved / "progress.json").read_text())["step"] == step


def test_the_process_group_ends_with_a_signal_too(tmp_path, train_args, monkeypatch):
    """Torch asks for that before the interpreter ends, where the group's threads can abort the process."""
    ended, write = [], run_folder.Log.write

    def signalled(self, line):
        write(self, line)
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(run_folder.Log, "write", signalled)
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ended.append(self))
    with pytest.raises(Interrupted, match="saved step 2 of 10"):
        train.main(train_args(tmp_path / "run"))
    assert len(ended) == 1


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path, train_args):
    process = start(
        train_args(tmp_path / "run", *LONG),
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"),
    )
    wait_for_step(tmp_path / "run", 3, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    step = len(read_metrics(tmp_path / "run"))
    assert (
        err.count(f"train.py: SIGUSR1: saved step {step} of 400") >= 1 and "Traceback (most recent" in err
    )  # torchrun's
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert (saved / "random_states_1.pkl").exists()
    words = [
        "--rule",
        "gmt",
        "--keep_ratio",
        "0.3",
        "--epochs",
        "1000",
        "--max_steps",
        str(step + 2),
        "--resume_changed",
        "true",
    ]
    done = torchrun(2, "train.py", *train_args(tmp_path / "run", *words, "--resume"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read_metrics(tmp_path / "run")) == step + 2


def test_ctrl_c_at_torchrun_saves_though_it_reaches_each_process_twice(tmp_path, train_args):
    """The terminal signals all processes of a job, and torchrun hands the signal on."""
    torchrun_and_two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    process = subprocess.Popen(
        [*torchrun_and_two, *train_args(tmp_path / "run", *LONG)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    step = len(read_metrics(tmp_path / "run"))
    assert f"train.py: SIGINT: saved step {step} of 400" in err, err[-2000:]
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


def test_a_second_signal_ends_a_run_at_once_if_it_is_no_echo(monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock["now"])
    with interrupts.Signals() as signals:
        signals.listen()
        signal.raise_signal(signal.SIGINT)
        clock["now"] = 101.0
        signal.raise_signal(signal.SIGINT)
        assert signal.SIGINT in signals.seen
        clock["now"] = 103.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_sixteen_kills_lose_nothing(tmp_path, train_args):
    """SIGKILL at random moments, also inside a save: every resume works, and the weights are those of a quiet run."""
    rng = random.Random(0)
    rules = {
        "gmt": ["--rule", "gmt", "--keep_ratio", "0.3"],
        "sift": ["--rule", "sift", "--keep_ratio", "0.3"],
        "frozen": ["--rule", "gmt", "--keep_ratio", "0.3", "--masked_weights", "frozen"],
        "grad_square": ["--rule", "grad_square", "--keep_ratio", "0.3", "--calibration_steps", "2"],
    }
    inside_a_save = kills = 0
    for name, rule in rules.items():
        words = [*rule, "--epochs", "40", "--save_every", "1", "--lr_schedule", "constant"]
        whole = start(train_args(tmp_path / f"{name}_whole", *words))
        assert whole.wait(timeout=300) == 0
        folder = tmp_path / name
        resume: list[str] = []
        for _ in range(4):
            process = start(train_args(folder, *words, *resume))
            wait_for_new_step(folder, process)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            process.communicate()
            kills += 1
            inside_a_save += any((folder / "checkpoints").glob(".aside*"))
            resume = ["--resume"]
        last = start(train_args(folder, *words, "--resume"))
        _, err = last.communicate(timeout=300)
        assert last.returncode == 0, (name, err[-2000:])
        assert same_weights(folder, tmp_path / f"{name}_whole"), name
        assert read_metrics(folder) == read_metrics(tmp_path / f"{name}_whole"), name
    print(f"{kills} kills, {inside_a_save} of them inside a save")
    assert kills == 16 and inside_a_save > 0


def wait_for_new_step(folder: Path, process: subprocess.Popen) -> None:
    """Until a checkpoint is there that was not there before."""
    before = set((folder / "checkpoints").glob("step_*"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if set((folder / "checkpoints").glob("step_*")) - before:
            return
        time.sleep(0.01)
    raise AssertionError(f"no new checkpoint: {process.communicate(timeout=20)}")
