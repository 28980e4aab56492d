"""Several dry runs of train.py in one process: python scripts/reproduce/dry_runs.py WORDS -- WORDS ..."""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from common.config import run_main


def main() -> None:
    for is_words, group in groupby(sys.argv[1:], lambda word: word != "--"):
        if is_words:
            words = list(group)
            print(f"--- python train.py {' '.join(words)}", flush=True)
            train.main([*words, "--dry_run"])


if __name__ == "__main__":
    run_main(main, "train.py")
