"""Choose the learning rate of each rule for the quickstart, on validation problems: configs/quickstart_rates.txt.

    python scripts/quickstart/tune.py outputs/quickstart      # after scripts/quickstart.sh; about 8 minutes on 2 cores

Criterion: the harmonic mean of new-skill and retained accuracy, which asks for both; of equal rates the lower one.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"

from tqdm import tqdm

import eval as evaluation
import train
from scripts.quickstart.report import accuracies, run_in_folder

RATES = ("5e-5", "7e-5", "1e-4", "1.5e-4", "2e-4")
KEEP_RATIO = {"none": "", "rmt": "0.2", "hft": "", "gmt": "0.2"}


def main(folder: Path) -> None:
    chosen = []
    bar = tqdm(total=len(KEEP_RATIO) * len(RATES), desc="tune", unit="run")
    for rule, keep_ratio in KEEP_RATIO.items():
        scored = []
        for rate in RATES:
            run = folder / "tune" / f"{rule}_{rate}"
            words = ["--config", "configs/quickstart.yaml", "--model", str(folder / "base" / "final")]
            words += ["--dataset", str(folder / "data" / "new_skill.jsonl"), "--rule", rule, "--learning_rate", rate]
            words += [f"--keep_ratio={keep_ratio}"] * bool(keep_ratio) + ["--save_every", "0", "--overwrite"]
            problems = folder / "data" / "validation.jsonl"
            score = ["--config", "configs/quickstart_eval.yaml", "--tasks", f"gsm8k={problems}", "--overwrite"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train.main([*words, "--output_dir", str(run)])
                evaluation.main([*score, "--model", str(run / "final"), "--output_dir", str(run / "eval")])
            accuracy = accuracies(run / "eval", problems)
            (new, _), (old, _) = accuracy["new"], accuracy["old"]
            both = 2 * new * old / (new + old) if new + old else 0.0
            scored.append((both, -float(rate), rate))
            bar.update()
            bar.write(f"{rule:5} {rate}: new skill {new:.1%}, retained {old:.1%}, harmonic mean {both:.1%}")
        chosen.append(f"{rule} {max(scored)[2]} {keep_ratio}".strip())
    bar.close()
    text = "# rule, learning rate, keep_ratio: written by scripts/quickstart/tune.py\n" + "\n".join(chosen) + "\n"
    (ROOT / "configs" / "quickstart_rates.txt").write_text(text)
    print(text)


if __name__ == "__main__":
    run_in_folder(main, "tune.py")
