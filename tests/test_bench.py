"""The measurements of scripts/bench/*.py run, at their smallest: pytest tests/test_bench.py [-m slow]"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import python, write_rows

from scripts.bench import eval as bench_eval
from scripts.bench import step as bench_step

SMALL = {
    "mask.py": ("--shape", "64", "96", "--growth", "1000", "100000", "--repeats", "2"),
    "step.py": ("--tokens", "256", "--length", "64", "--repeats", "1", "--no_memory", "--ways", "gmt"),
    "train.py": ("--steps", "4", "--rounds", "1", "--global_batch_size", "4", "--batch_sizes", "2"),
    "eval.py": ("--items", "4", "--batch_size", "2", "--repeats", "1"),
}


def measured(script, out, *more):
    words = (*SMALL[script], *more, "--out" if script == "eval.py" else "--json", str(out))
    done = python(f"scripts/bench/{script}", *words, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def test_the_most_there_is_to_gain():
    """Two batches of two: 10 + 4 steps for 20 tokens, which two places take 10 steps for."""
    assert bench_eval.most([10, 2, 4, 4], 2) == 14 / 10 and bench_eval.most([5] * 6, 3) == 1


def test_the_measured_step_has_the_gradient_of_the_mean_loss():
    args = bench_step.arguments(["--shape", "1m", "--tokens", "96", "--length", "16", "--micro_batch_tokens", "32"])
    model, _ = bench_step.build(args)
    torch.manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (6, 16))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    (torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / 96).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = []
    optimizer = SimpleNamespace(step=lambda: found.extend(p.grad.clone() for p in model.parameters()))
    optimizer.zero_grad = model.zero_grad
    torch.manual_seed(1)
    bench_step.step(args, "none", bench_step.build_masker(args, "none", model), 0, model, optimizer)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_it_measures(script, tmp_path):
    found = measured(script, tmp_path / "results.json")
    assert len(found.get("rows", found.get("growth"))) > 1
    assert found.get("same", 4) == 4  # bench/eval.py: both backends gave the same 4 answers


@pytest.mark.slow
def test_training_of_a_model_that_is_there(model_dir, tmp_path):
    words = ("--model", str(model_dir), "--bf16", "--micro_batch_tokens", "512", "1024")
    found = measured("train.py", tmp_path / "results.json", *words)
    assert found["settings"]["model"] == str(model_dir)
    assert [row["way"] for row in found["rows"]] == [
        "train.py, 512 tokens", "train.py, 1024 tokens", "SFTTrainer, 2 rows"
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_answers_of_a_model_that_is_there(model_dir, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{i} apples and {3 * i} pears?"} for i in range(9)])
    words = ("--model", str(model_dir), "--prompts", str(prompts), "--max_new_tokens", "16")
    found = measured("eval.py", tmp_path / "results.json", *words)
    assert found["same"] == 4 and 0 < found["tokens"] <= 16
