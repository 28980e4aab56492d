"""The report of a study: README.md and figures from the lines of its runs (scripts/report.py FOLDER)."""

from pathlib import Path

from common import run_folder
from scripts.study import miniature_report, smollm2_report
from scripts.study.driver import ABOUT


def write_report(folder: Path) -> str:
    """Write README.md and figures into the folder that holds runs.jsonl; returns README.md's text.

    The claims of the small models stand beside those of the real one, where its folder, smollm2, is in this one.
    """
    if "passages" in run_folder.read_json(folder / ABOUT)["scale"]:
        return smollm2_report.write_report(folder)
    return miniature_report.write_report(folder, smollm2_report.verdicts(folder / "smollm2"))
