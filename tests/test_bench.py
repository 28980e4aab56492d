"""The measurements of scripts/bench/*.py run, at their smallest: pytest tests/test_bench.py -m slow"""

import json

import pytest
from conftest import python

SMALL = {
    "mask.py": ("--shape", "64", "96", "--growth", "1000", "100000", "--repeats", "2"),
    "step.py": ("--tokens", "256", "--length", "64", "--repeats", "1", "--no_memory", "--ways", "gmt"),
    "train.py": ("--steps", "4", "--rounds", "1", "--global_batch_size", "4", "--batch_sizes", "2"),
    "eval.py": ("--items", "4", "--batch_size", "2", "--repeats", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_it_measures(script, tmp_path):
    out = tmp_path / "results.json"
    done = python(
        f"scripts/bench/{script}", *SMALL[script], "--out" if script == "eval.py" else "--json", str(out), timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert len(found.get("rows", found.get("growth"))) > 1
    assert found.get("same", 4) == 4  # bench/eval.py: both backends gave the same 4 answers
