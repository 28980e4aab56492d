"""The measurements of scripts/bench_*.py run, at their smallest: pytest tests/test_bench.py -m slow"""

import json

import pytest
from conftest import python

SMALL = {
    "bench_mask.py": ("--shape", "64", "96", "--growth", "1000", "100000", "--repeats", "2"),
    "bench_step.py": ("--tokens", "256", "--length", "64", "--repeats", "1", "--no_memory", "--ways", "gmt"),
    "bench_train.py": ("--steps", "4", "--rounds", "1", "--global_batch_size", "4", "--batch_sizes", "2"),
    "bench_eval.py": ("--items", "4", "--batch_size", "2", "--repeats", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_it_measures(script, tmp_path):
    out = tmp_path / "results.json"
    done = python(
        f"scripts/{script}", *SMALL[script], "--out" if script == "bench_eval.py" else "--json", str(out), timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert len(found.get("rows", found.get("growth"))) > 1
    assert found.get("same", 4) == 4  # bench_eval: both backends gave the same 4 answers
