"""Make the runs of a study that have no line in its results yet; scripts/study.sh calls this.

python scripts/study/run.py --study small --results results
GMT_DATA_DIR=FOLDER python scripts/study/run.py --study smollm2 --results results/smollm2
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from common.errors import run_main
from scripts.study import miniature, smollm2
from scripts.study.driver import run_study

STUDIES = {
    **{word: miniature.Miniature(scale) for word, scale in miniature.SCALES.items()},
    **{word: smollm2.SmolLM2(size) for word, size in smollm2.SIZES.items()},
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="small")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "study", help="models and data")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="runs.jsonl and study.json")
    parser.add_argument("--processes", type=int, default=0, help="runs at the same time; 0: the study's own number")
    args = parser.parse_args(argv)
    study = STUDIES[args.study]
    command = f"scripts/study/run.py --study {args.study}"
    run_study(study, args.folder / args.study, args.results, args.processes or study.processes, command)


if __name__ == "__main__":
    run_main(main, "scripts/study/run.py")
