"""From run folders to tables and figures; all options: python scripts/report.py --help

python scripts/report.py outputs/math_sft/eval outputs/math_gmt/eval [--out report.md] [--csv scores.csv]
python scripts/report.py results                    # of scripts/study.sh
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import run_main
from scripts.report.tables import main

if __name__ == "__main__":
    run_main(main, "report.py")
