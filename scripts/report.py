"""Line up the scores of several models, with paired tests against the first and with published scores.

    python scripts/report.py outputs/math_sft/eval outputs/math_gmt/eval [--out report.md]

Each folder is an output_dir of eval.py. Where two runs have answered the same items, their difference is tested on
these pairs: verdicts of 0 and 1 by McNemar's exact test, others (and means over groups) by a paired bootstrap. Runs
that differ in more than the model are named, since a score belongs to its protocol.

Of a run of train.py that has logged its masks (log_masks_every), the folder itself or the one that holds the
evaluation's, masks.png is drawn into the folder, see mask_figure.py.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from mask_figure import mask_figure
from published import PUBLISHED

from config import UserError, run_main
from run_folder import MASKS
from scores import read_lines
from tasks import TASKS

RESAMPLES = 10_000
# What two runs may not differ in, if their difference is to be one of models
SETTINGS = ("dataset_sha256", "prompts_sha256", "prompt_format", "n", "dtype", "batch_size", "max_new_tokens", "seed")


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test for verdicts (n,) of 0 and 1 on the same items."""
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def bootstrap(a: np.ndarray, b: np.ndarray, groups: list[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of b - a over items (n,), or of the mean over groups, drawn anew within each group."""
    names = np.array(groups)
    means = []
    rng = np.random.default_rng(seed)
    for name in sorted(set(groups)):
        d = (b - a)[names == name]
        counts = rng.multinomial(len(d), np.full(len(d), 1 / len(d)), size=RESAMPLES) if len(d) < 2000 else None
        if counts is None:  # large: one resample at a time
            means.append(np.array([d[rng.integers(len(d), size=len(d))].mean() for _ in range(RESAMPLES)]))
        else:
            means.append(counts @ d / len(d))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def compare(first: Path, second: Path, name: str, metric: str) -> str:
    """The difference second - first of two runs on the items of a job, and whether it may be chance."""
    task = TASKS[name.split(".")[0]]
    lines = [read_lines(folder / f"{name}.jsonl") for folder in (first, second)]
    if [line["id"] for line in lines[0]] != [line["id"] for line in lines[1]]:
        return "other items"
    a, b = (np.array([float(line[metric]) for line in run]) for run in lines)
    if not task.macro and set(np.unique([a, b])) <= {0.0, 1.0}:
        return f"{100 * (b - a).mean():+.2f}, p = {mcnemar(a, b):.2g}"
    groups = [task.group(line["item"]) for line in lines[0]] if task.macro else [""] * len(a)
    share = Counter(groups)
    mean = sum((y - x) / share[g] for x, y, g in zip(a, b, groups, strict=True)) / len(share)
    low, high = bootstrap(a, b, groups)
    return f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def read_scores(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: no readable scores.json, which eval.py writes ({e})") from None


def cell(value: dict[str, Any]) -> str:
    error = value["standard_error"]
    return f"{100 * value['score']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def report(folders: list[Path]) -> str:
    """The whole report, in Markdown."""
    runs = {folder: read_scores(folder) for folder in folders}
    names = [str(f.parent if f.name == "eval" else f) for f in folders]
    jobs = list(dict.fromkeys(name for scores in runs.values() for name in scores))
    rows, notes = [], []
    for name in jobs:
        entries = [runs[f].get(name) for f in folders]
        known = next(e for e in entries if e)
        for metric in known["metrics"]:
            cells = [cell(e["metrics"][metric]) if e else "" for e in entries]
            for i, entry in enumerate(entries[1:], 1):
                if entry and entries[0]:
                    cells[i] += f" ({compare(folders[0], folders[i], name, metric)})"
            what = f"{name} | {metric} | {known['n']} | {known.get('dataset_version') or known.get('dataset', '')}"
            rows.append(f"| {what} | {' | '.join(cells)} |")
        for folder, entry in zip(folders, entries, strict=True):
            differ = [k for k in SETTINGS if entry and entry.get(k) != known.get(k)]
            if differ:
                notes.append(f"- {name}: {folder} differs from the first run in {', '.join(differ)}")
            if entry and entry.get("timeouts"):
                notes.append(f"- {name}: {folder}: {entry['timeouts']} verdicts timed out and count as wrong")
    head = f"| task.protocol | metric | n | data | {' | '.join(names)} |\n|{' --- |' * (4 + len(names))}"
    text = f"# Scores, per cent ± one standard error\n\n{head}\n" + "\n".join(rows) + "\n"
    if len(folders) > 1:
        text += (
            f"\nIn brackets: the difference from {names[0]} on the same items, with the p-value of McNemar's exact "
            "test or, for other than 0/1 verdicts, the 95 % interval of a paired bootstrap. They know nothing of the "
            "variation between training seeds.\n"
        )
    if notes:
        text += "\n" + "\n".join(notes) + "\n"
    return text + published({name.split(".")[0] for name in jobs})


def published(tasks: set[str]) -> str:
    """Published scores on these tasks."""
    rows = [row for row in PUBLISHED if row[0] in tasks]
    if not rows:
        return ""
    keys = list(dict.fromkeys((task, metric) for task, metric, *_ in rows))
    lines: dict[tuple[str, str], dict] = {}
    for task, metric, model, value, source in rows:
        lines.setdefault((model, source), {})[task, metric] = value
    head = " | ".join(f"{task} {metric}" for task, metric in keys)
    out = [f"\n# Published scores\n\n| model | {head} | source |", "|" + " --- |" * (len(keys) + 2)]
    for (model, source), values in lines.items():
        out.append(f"| {model} | {' | '.join(str(values.get(key, '')) for key in keys)} | {source} |")
    return "\n".join(out) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, help="write the report there, too")
    args = parser.parse_args(argv)
    for run in dict.fromkeys(f.parent if f.name == "eval" else f for f in args.folders):
        if (run / MASKS).exists():
            mask_figure(run, run / "masks.png")
            print(f"figure: {run / 'masks.png'}")
    scored = [f for f in args.folders if (f / "scores.json").exists() or not (f / MASKS).exists()]
    if not scored:
        return
    text = report(scored)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_main(main, "report.py")
