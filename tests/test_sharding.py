"""Masks on shards are those of the whole matrices, bit for bit: pytest tests/test_sharding.py"""

import pytest
from conftest import torchrun

CASES = ((2, "shard"), (2, "hybrid"), (4, "shard"), (4, "hybrid"))
LONGER = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("processes", "layout"), [(3, "shard"), *LONGER])
def test_masks_on_shards(processes, layout):
    done = torchrun(processes, "tests/sharding_worker.py", layout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all masks are those of the whole gradients") == processes
