"""Several dry runs in one process, before the first training: dry_runs.py PROGRAM WORDS -- PROGRAM WORDS ..."""

import sys
from functools import partial
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from common.errors import run_main
from scripts import merge

PROGRAMS = {"train.py": train.main, "scripts/merge.py": merge.main}

if __name__ == "__main__":
    for is_separator, group in groupby(sys.argv[1:], lambda word: word == "--"):
        if not is_separator:
            program, *words = group
            print(f"--- python {program} {' '.join(words)}", flush=True)
            try:
                run_main(partial(PROGRAMS[program], [*words, "--dry_run"]), Path(program).name)
            except SystemExit as end:
                if end.code:
                    raise
