"""The loop and the scores on 1 to 4 CPU processes under torchrun: pytest tests/test_distributed.py"""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model, read_metrics, torchrun, weights, write_rows
from test_architectures import ARCHITECTURES
from transformers import AutoModelForCausalLM

from common.hub import load_weights


def run(processes, args, worker="worker", machines=1, **env):
    before = dict(os.environ)
    os.environ.update(env)
    try:
        return torchrun(processes, f"tests/{worker}.py", *args, machines=machines)
    finally:
        os.environ.clear()
        os.environ.update(before)


SAVING_MEMORY = ["--packing", "on", "--loss_chunk", "100", "--gradient_checkpointing", "true"]


def check_weights(kept, model_dir, processes, shards):
    """Under FSDP2 the first process of all has read the weights, none of the others; each has its part of the file."""
    model = load_weights(str(model_dir), dtype=torch.float64)
    for rank in range(processes):
        held = torch.load(f"{kept}.{rank}.pt")
        assert (held["read"] == sum(p.nbytes for p in model.parameters())) if rank == 0 else held["read"] < 1000
        for name, p in model.named_parameters():
            parts = [*p.detach().chunk(shards), p.detach()[:0]]
            assert torch.equal(held["shards"].pop(name), parts[min(rank % shards, len(parts) - 1)]), name
        assert not held["shards"] and held["buffers"]
        assert all(torch.equal(held["buffers"][name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.slow
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


FROZEN = pytest.param(["gmt", "--masked_weights", "frozen"], marks=pytest.mark.slow)


@pytest.mark.parametrize("rule", [FROZEN, ["rmt"]], ids=" ".join)
def test_whole_runs_agree_on_1_2_and_3_processes_in_fp64(tmp_path, train_args, rule):
    runs = []
    for n in (1, 2 if rule[0] == "gmt" else 3):
        more = ["--rule", *rule, "--keep_ratio", "0.3", "--master_dtype", "float64", "--eval_rows", "5"]
        more += SAVING_MEMORY if rule[0] == "rmt" and n > 1 else []
        done = run(n, train_args(tmp_path / str(n), *more))
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append((weights(tmp_path / str(n)), read_metrics(tmp_path / str(n))))
    for other, metrics in runs[1:]:
        assert max((other[name] - runs[0][0][name]).abs().max() for name in other) < 1e-9
        for a, b in zip(metrics, runs[0][1], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
            assert a["kept_fraction"] == b["kept_fraction"]
        assert metrics[-1]["eval_loss"] == pytest.approx(runs[0][1][-1]["eval_loss"], abs=1e-9)


def test_ddp_holds_gradients_once(tmp_path, train_args):
    """Also under accumulation, and in the calibration."""
    more = ["--rule", "grad_square", "--keep_ratio", "0.3", "--calibration_steps", "1", "--max_steps", "3"]
    done = run(2, train_args(tmp_path / "run", *more, "--per_device_batch_size", "2"), BUCKETS="1")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_resume_is_bitwise(tmp_path, train_args, processes):
    more = ["--rule", "gmt", "--keep_ratio", "0.3", "--save_every", "2", "--micro_batch_tokens", "0"]
    assert run(processes, train_args(tmp_path / "whole", *more)).returncode == 0
    assert run(processes, train_args(tmp_path / "cut", *more), CRASH_AT="5").returncode != 0
    assert len(read_metrics(tmp_path / "cut")) == 5
    done = run(processes, train_args(tmp_path / "cut", *more, "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("processes", "rule", "more"),
    [
        (2, "gmt", ["--masked_weights", "frozen", "--log_masks_every", "2", "--mask_jaccard", "true", *SAVING_MEMORY]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, "gmt", ["--scope", "model", "--log_masks_every", "2", "--mask_update_share", "true"]),
                (3, "grad_square", ["--calibration_steps", "2"]),
                (4, "rmt", ["--two_machines"]),
            )
        ),
    ],
)
def test_fsdp2_runs_agree_with_one_process_in_fp64(tmp_path, train_args, model_dir, processes, rule, more):
    """Also at the end of a run that is saved in shards, cut, and resumed on another number of processes.

    Two machines are two torchruns with two processes each: sharded inside, replicated between them.
    """
    args = ["--rule", rule, "--master_dtype", "float64", "--eval_rows", "5", "--save_every", "2", *more]
    args += ["--keep_ratio", "0.3"]
    env = {}
    if "--two_machines" in args:
        args.remove("--two_machines")
        env = {"FSDP_REPLICATE": "2", "machines": 2}
    single = run(1, train_args(tmp_path / "one", *args))
    assert single.returncode == 0, single.stderr[-3000:]
    env["WEIGHTS"] = str(tmp_path / "weights")
    cut = run(processes, train_args(tmp_path / "cut", *args), "fsdp_worker", CRASH_AT="5", **env)
    assert cut.returncode != 0 and len(read_metrics(tmp_path / "cut")) == 5, cut.stderr[-3000:]
    check_weights(env["WEIGHTS"], model_dir, processes, processes // env.get("machines", 1))
    assert any((tmp_path / "cut" / "checkpoints" / "step_000004").glob("pytorch_model_fsdp_0/*.distcp"))
    done = run(processes - 1, train_args(tmp_path / "cut", *args, "--resume"), "fsdp_worker")
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = weights(tmp_path / "cut"), weights(tmp_path / "one")
    assert max((a[name] - b[name]).abs().max() for name in b) < 1e-9 and len(a) == len(b)
    for x, y in zip(read_metrics(tmp_path / "cut"), read_metrics(tmp_path / "one"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-9) and x["grad_norm"] == pytest.approx(y["grad_norm"])
        assert x["kept_fraction"] == y["kept_fraction"]
        assert x["grad_norm_kept"] == pytest.approx(y["grad_norm_kept"])
    if "--log_masks_every" in args:
        masks = [
            [json.loads(x) for x in (tmp_path / f / "masks.jsonl").read_text().splitlines()] for f in ("cut", "one")
        ]
        kept = [[{n: c["kept"] for n, c in line["tensors"].items()} for line in lines] for lines in masks]
        assert kept[0] == kept[1] and [line["step"] for line in masks[0]] == [2, 4, 6, 8, 10]
        assert [m["jaccard"] for m in masks[0][:2]] == pytest.approx([m["jaccard"] for m in masks[1][:2]])
        shares = [[m.get("update_share_masked") for m in lines] for lines in masks]
        assert shares[0] == pytest.approx(shares[1]) and (shares[0][0] is None) == ("--mask_update_share" not in args)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_with_other_numbers_of_chunks_on_each_process(tmp_path, train_args, tied):
    """A process with more chunks of the loss issues the same collectives as one with fewer; the numbers are the same.

    Micro-batches of one example each, with 3, 13, 23, ... trained tokens: 1, 2, 3, ... chunks.
    """
    rows = [{"query": "q" * 9, "response": "r" * (2 + 10 * i)} for i in range(8)]
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    args = ["--model", str(model), "--dataset", str(write_rows(tmp_path / "rows.jsonl", rows)), "--packing", "off"]
    args += ["--master_dtype", "float64", "--loss_chunk", "9", "--per_device_batch_size", "1", "--rule", "gmt"]
    args += ["--keep_ratio", "0.3", "--global_batch_size", "4", "--max_steps", "3"]
    runs = []
    for processes, worker in ((1, "worker"), (2, "fsdp_worker")):
        done = run(processes, train_args(tmp_path / worker, *args), worker, WEIGHTS=str(tmp_path / "weights"))
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append((weights(tmp_path / worker), [line["loss"] for line in read_metrics(tmp_path / worker)]))
    check_weights(tmp_path / "weights", model, 2, 2)
    (a, losses), (b, others) = runs
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-9 and others == pytest.approx(losses, abs=1e-9)


@pytest.mark.slow
def test_fsdp2_of_a_model_with_buffers_that_are_saved(tmp_path, train_args):
    """DeepSeek-V3's router has one: Accelerate does not send it, and every process reads the weights."""
    kind, settings = ARCHITECTURES["experts, latent attention: DeepSeek-V3"]
    model = make_model(tmp_path / "model")  # for its tokenizer
    AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).save_pretrained(model)
    args = ["--model", str(model), "--max_steps", "3"]
    for processes, worker in ((1, "worker"), (2, "fsdp_worker")):
        done = run(processes, train_args(tmp_path / worker, *args), worker)
        assert done.returncode == 0, done.stderr[-3000:]
    for x, y in zip(read_metrics(tmp_path / "worker"), read_metrics(tmp_path / "fsdp_worker"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


@pytest.mark.parametrize("worker", ["worker", pytest.param("fsdp_worker", marks=pytest.mark.slow)])
def test_dpo_on_2_processes_agrees_with_one_in_fp64(tmp_path, train_args, worker):
    """Under FSDP2 also cut, and resumed on one process."""
    rows = [{"prompt": f"{i}{'?' * (i % 7)}", "chosen": "a" * (i % 5 + 1), "rejected": "b" * 9} for i in range(20)]
    pairs = str(write_rows(tmp_path / "pairs.jsonl", rows))
    more = ["--dataset", pairs, "--objective", "dpo", "--template", "prompt_response", "--save_every", "2"]
    more += ["--rule", "gmt", "--keep_ratio", "0.3", "--master_dtype", "float64", "--eval_rows", "3", "--epochs", "3"]
    done = run(1, train_args(tmp_path / "one", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    if worker == "fsdp_worker":
        assert run(2, train_args(tmp_path / "two", *more), worker, CRASH_AT="5").returncode != 0
        done = run(1, train_args(tmp_path / "two", *more, "--resume"), worker)
    else:
        done = run(2, train_args(tmp_path / "two", *more), worker)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert max((a[name] - b[name]).abs().max() for name in b) < 1e-9
    lines = [read_metrics(tmp_path / f) for f in ("two", "one")]
    assert lines[1][0]["reward_margin"] == 0.0 and len(lines[0]) == len(lines[1]) > 4
    for x, y in zip(*lines, strict=True):
        for name in ("loss", "reward_chosen", "reward_rejected", "implicit_kl", "tokens_chosen"):
            assert x[name] == pytest.approx(y[name], abs=1e-9)


def test_bad_input_under_torchrun_ends_all_processes(tmp_path, train_args):
    done = run(2, train_args(tmp_path / "run", "--global_batch_size", "1"))
    assert done.returncode != 0
    assert "global_batch_size 1, 2 processes: some processes would never get an example" in done.stderr
    bad_row = write_rows(tmp_path / "rows.jsonl", [{"query": "q"}])
    done = run(2, train_args(tmp_path / "run", "--dataset", str(bad_row)))
    assert done.returncode != 0 and "line 1: no column 'response'" in done.stderr


@pytest.mark.slow
def test_machines_that_share_no_folder_are_told_so_before_the_first_step(tmp_path, train_args):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    done = run(2, train_args(Path("run")), APART=str(tmp_path))
    assert done.returncode != 0 and "output_dir run is not one folder for all processes" in done.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))
