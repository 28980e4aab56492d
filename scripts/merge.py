"""Make a model of finished ones, without training: mask a task vector, or average weights.

    python scripts/merge.py drop --base BASE_DIR --tuned outputs/x/final --output_dir outputs/x/drop --keep_ratio 0.2
    python scripts/merge.py average --models outputs/*/final --output_dir outputs/soup/final
    python scripts/merge.py greedy --models outputs/*/final --output_dir outputs/soup/final --tasks gsm8k
    python scripts/merge.py fisher --models outputs/*/final --output_dir outputs/soup/final --dataset FILE

`python scripts/merge.py METHOD --help` lists a method's keys. Tensors are read and written one by one.
"""

import os
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, nearest, run_main
from common.launch import world_size
from scripts.merging import average, drop, fisher, greedy

METHODS = {"drop": drop.main, "average": average.main, "greedy": greedy.main, "fisher": fisher.main}


def main(argv: list[str] | None = None) -> None:
    """Run the method that the first word names."""
    method, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if method in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if method not in METHODS:
        raise UserError(f"the first word is the method, got {method!r}{nearest(method, METHODS)}")
    if "RANK" in os.environ and world_size() > 1:
        raise UserError(f"merge.py is one process, a launcher started {world_size()}: start it with python")
    transformers_logging.set_verbosity_error()
    METHODS[method](words)


if __name__ == "__main__":
    run_main(main, "merge.py")
