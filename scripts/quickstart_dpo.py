"""DPO in the quickstart's world: answers to the new skill that are right against plausible wrong ones.

    python scripts/quickstart_dpo.py outputs/quickstart      # after scripts/quickstart.sh; a minute on 2 cores

The policy and reference is the quickstart's model of rule none. Wrong answers have two neighbouring digits exchanged.
Prints, for the rules none and gmt, the margin of the rewards and the accuracy on held-out problems, before and after.
The margin grows; the accuracy falls somewhat.
"""

import contextlib
import io
import json
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.chdir(ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"

from quickstart_data import ANSWER, write
from quickstart_report import accuracies

import eval as evaluation
import train

PAIRS = 400
RULES = {"none": [], "gmt": ["--keep_ratio", "0.2"]}


def wrong(response: str, rng: random.Random) -> str | None:
    """The response with two neighbouring digits of its result exchanged; None where they are all alike."""
    result = response.rpartition(ANSWER)[2]
    places = [i for i in range(len(result) - 1) if result[i] != result[i + 1]]
    if not places:
        return None
    i = rng.choice(places)
    return response.replace(result, result[:i] + result[i + 1] + result[i] + result[i + 2 :])


def pairs(rows: list[dict], seed: int = 0) -> list[dict]:
    """PAIRS rows with the columns query, chosen, rejected."""
    rng = random.Random(seed)
    made = ({"query": r["query"], "chosen": r["response"], "rejected": wrong(r["response"], rng)} for r in rows)
    return [row for row in made if row["rejected"]][:PAIRS]


def score(model: Path, folder: Path, problems: Path) -> float:
    """Accuracy on the new skill."""
    words = ["--config", "configs/quickstart_eval.yaml", "--tasks", f"gsm8k={problems}", "--overwrite"]
    evaluation.main([*words, "--model", str(model), "--output_dir", str(folder)])
    return accuracies(folder, problems)["new"][0]


def main(folder: Path) -> dict[str, dict[str, float]]:
    """The numbers of the table, by rule."""
    rows = [json.loads(line) for line in (folder / "data" / "new_skill.jsonl").read_text().splitlines()]
    write(folder / "data" / "preferences.jsonl", pairs(rows))
    policy, problems, results = folder / "none" / "final", folder / "data" / "validation.jsonl", {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        before = score(policy, folder / "dpo" / "before", problems)
    print("| rule | margin, first step | margin, last | pairs right, last | accuracy before | after |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rule, more in RULES.items():
        run = folder / "dpo" / rule
        words = [
            "--config",
            "configs/quickstart_dpo.yaml",
            "--model",
            str(policy),
            "--rule",
            rule,
            *more,
            "--overwrite",
        ]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main([*words, "--dataset", str(folder / "data" / "preferences.jsonl"), "--output_dir", str(run)])
            after = score(run / "final", run / "eval", problems)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results[rule] = {
            "first": lines[0]["reward_margin"], "last": lines[-1]["reward_margin"],
            "right": lines[-1]["reward_accuracy"], "before": before, "after": after,
        }  # fmt: skip
        r = results[rule]
        print(f"| {rule} | {r['first']:.3f} | {r['last']:.3f} | {r['right']:.1%} | {before:.1%} | {after:.1%} |")
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]))
