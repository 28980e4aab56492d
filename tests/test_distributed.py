"""The loop and the scores on 1 to 4 CPU processes under torchrun: pytest tests/test_distributed.py"""

import json
import os

import pytest
import torch
from conftest import read_metrics, torchrun, write_rows
from safetensors.torch import load_file


def run(processes, args, **env):
    before = dict(os.environ)
    os.environ.update(env)
    try:
        return torchrun(processes, "tests/worker.py", *args)
    finally:
        os.environ.clear()
        os.environ.update(before)


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def test_gradients_agree_on_1_2_and_3_processes_in_fp32(tmp_path, train_args):
    grads = []
    for n in (1, 2, 3):
        more = ["--max_steps", "1", "--global_batch_size", "32", "--per_device_batch_size", "4", "--max_grad_norm", "0"]
        done = run(n, train_args(tmp_path / str(n), *more), GRADIENTS=str(tmp_path / f"{n}.pt"))
        assert done.returncode == 0, done.stderr[-3000:]
        grads.append(torch.cat([g.flatten() for g in torch.load(tmp_path / f"{n}.pt").values()]))
        assert json.loads((tmp_path / str(n) / "run.json").read_text())["processes"] == n
    for g in grads[1:]:
        assert (g - grads[0]).norm() / grads[0].norm() < 1e-6


@pytest.mark.parametrize("rule", ["gmt", "rmt"])
def test_whole_runs_agree_on_1_2_and_3_processes_in_fp64(tmp_path, train_args, rule):
    runs = []
    for n in (1, 2, 3):
        more = ["--rule", rule, "--keep_ratio", "0.3", "--master_dtype", "float64", "--eval_rows", "5"]
        done = run(n, train_args(tmp_path / str(n), *more))
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append((weights(tmp_path / str(n)), read_metrics(tmp_path / str(n))))
    for other, metrics in runs[1:]:
        assert max((other[name] - runs[0][0][name]).abs().max() for name in other) < 1e-9
        for a, b in zip(metrics, runs[0][1], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
            assert a["kept_fraction"] == b["kept_fraction"]
        assert metrics[-1]["eval_loss"] == pytest.approx(runs[0][1][-1]["eval_loss"], abs=1e-9)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_resume_is_bitwise(tmp_path, train_args, processes):
    more = ["--rule", "gmt", "--keep_ratio", "0.3", "--save_every", "2"]
    assert run(processes, train_args(tmp_path / "whole", *more)).returncode == 0
    assert run(processes, train_args(tmp_path / "cut", *more), CRASH_AT="5").returncode != 0
    assert len(read_metrics(tmp_path / "cut")) == 5
    done = run(processes, train_args(tmp_path / "cut", *more, "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_bad_input_under_torchrun_ends_all_processes(tmp_path, train_args):
    done = run(2, train_args(tmp_path / "run", "--global_batch_size", "1"))
    assert done.returncode != 0
    assert "global_batch_size 1, 2 processes: some processes would never get an example" in done.stderr
    bad_row = write_rows(tmp_path / "rows.jsonl", [{"query": "q"}])
    done = run(2, train_args(tmp_path / "run", "--dataset", str(bad_row)))
    assert done.returncode != 0 and "line 1: no column 'response'" in done.stderr


def test_answers_do_not_depend_on_the_number_of_processes(tmp_path, model_dir):
    items = [{"question": f"What is {i}{'?' * (i % 5)}", "answer": f"#### {i}"} for i in range(11)]
    items = write_rows(tmp_path / "items.jsonl", items)
    answers = []
    for n in (1, 2, 3):
        args = ["--model", str(model_dir), "--tasks", f"gsm8k={items}", "--dtype", "float32", "--batch_size", "3"]
        done = torchrun(n, "eval.py", *args, "--output_dir", str(tmp_path / str(n)))
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append((tmp_path / str(n) / "gsm8k.metamath.jsonl").read_text())
        assert not (tmp_path / str(n) / "gsm8k.metamath.parts").exists()
    assert answers[0] == answers[1] == answers[2] and answers[0].count("\n") == 11
