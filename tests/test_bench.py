"""The measurements of scripts/bench/*.py run, at their smallest: pytest tests/test_bench.py [-m slow]"""

import json

import pytest
from conftest import python, write_rows

from scripts.bench import eval as bench_eval

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
