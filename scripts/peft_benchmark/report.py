"""Our rows among those that peft publishes of its MetaMathQA benchmark, as a table and as CSV.

    python scripts/peft_benchmark/report.py outputs/peft_benchmark/*/eval --out outputs/peft_benchmark

published.csv holds what the 63 results of method_comparison/MetaMathQA/results at commit 5d602fd of huggingface/peft
(Apache-2.0) say: learning rate, weight decay, mean training loss of the last 250 steps, correct answers of 1,319
(sampled), forgetting, the 99th percentile of the GPU memory that was reserved in training, and the day; and
greedy_correct, of the same configuration's run of January 2026, for the few of which we know it.
"""

import argparse
import csv
import sys
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import yaml

from common.errors import UserError, run_main
from scripts.peft_benchmark.rows import TOKENS
from scripts.report.runs import Run, read_metrics, read_runs
from scripts.report.tables import make_room, table

CONFIG = Path(__file__).parents[2] / "configs" / "peft_llama3.2_3b.yaml"
PUBLISHED = Path(__file__).with_name("published.csv")
ACCURACY, FORGETTING = "gsm8k_peft.peft", "text_loss.peft"
ITEMS = 1319
LOSS_BEFORE = 1.58611  # of the base model on its texts, as a comment in its run.py has it
LAST_STEPS = 250
TRAPS = f"""\
How to read it:

- **Sampled answers.** Each published accuracy is of one sampled run: where nothing else is said, transformers 5 takes
  what the model's generation_config says (as far as copies of it show: temperature 0.6, top-p 0.9, top-k 50). Ours are
  greedy, as peft's were until January 2026. From that run to the published one 30 of 30 configurations fell, by 1.8
  points on average. The table is ordered by the column "correct", so our rows stand some 1.8 points too high in it:
  compare them with the column "greedy", where it has a number.
- **Weak full fine-tuning.** Its full-finetuning has bf16 weights and moments, and one learning rate, 1e-5: most updates
  of weights above 0.004 are rounded away, so that it hardly moves. Our none_bf16 has them too, but for AdamW's kernel:
  it is fused here, which rounds each weight once a step (there, after each operation). Our none has fp32
  masters. Several other rows were tuned, some of them by the test accuracy itself.
- **One seed, and noise.** Each row is one run. Repeated runs of one configuration differ by a standard deviation of 0.7
  to 0.8 points, and the standard error of {ITEMS:,} items is 1.4 points: a difference below 2 points says nothing. The
  training loss repeats to a few 1e-4. Seeds of ours that differ in nothing random repeat a run, too: none, none_bf16,
  gmt, gmt_frozen and mofo. For our own runs report.md has paired tests on the same items.
- **Forgetting** is the rise of the loss on 100 Wikipedia texts, in nats per token, lower is better. It is comparable
  where the base model's loss is {LOSS_BEFORE} before (nothing pins the texts' revision and language), and with rows
  since 2026-07-14: until then the same word meant another quantity.
- **What still differs in ours:** every row has its EOS trained (there, not the longest of a batch; the divisor of the
  loss is the same); matrices alone decay; nothing is validated in between (there, on 50 rows of GSM8K's training
  split); answers are generated in other batches; models are scored in bf16, so that fp32 masters are rounded and lora
  is merged before (there, it is computed beside the weights); the texts' losses are computed in fp32 from bf16 logits.
  shira keeps 2.604 % of every matrix (there, as many weights in all, but 2.083 % of q_proj and 4.167 % of v_proj, at
  the same places of matrices of one shape), without weight decay and on fp32 weights. none, gmt, gmt_frozen, rmt and
  mofo have full fine-tuning's learning rate, not a tuned one.
- **Of the test set's kind.** MetaMathQA is made from GSM8K's training problems.
- **Memory** is the peak that torch allocated in training (ours), or the 99th percentile of what it reserved in training
  (theirs, on an L40S). Times are left out: they are of other GPUs."""
PROTOCOL = (  # keys whose values make it this benchmark, as CONFIG has them
    "template", "train_on_prompt", "shuffle", "max_length", "lr_schedule", "warmup_ratio", "max_steps",
    "global_batch_size", "max_grad_norm",
)  # fmt: skip
HEAD = [
    "run", "learning rate", "weight decay", "training loss", "correct", "sampled (%)", "greedy (%)",
    "forgetting (nats)", "memory (GiB)", "date",
]  # fmt: skip


def our_row(run: Run) -> dict[str, Any]:
    """A run in the columns of published.csv, and n, the number of items; empty where something was not measured."""
    entry, lines = run.scores[ACCURACY], read_metrics(run)
    correct = round(entry["metrics"]["correct"]["score"] * entry["n"])
    last = [line["loss"] for line in lines[-LAST_STEPS:] if line.get("loss") is not None]
    scored = datetime.fromtimestamp((run.folder / "scores.json").stat().st_mtime)
    keep_ratio = run.config.get("keep_ratio")
    return {
        "experiment": f"ours/{run.name}" + (f", keep_ratio {keep_ratio:g}" if keep_ratio else ""),
        "learning_rate": run.config.get("learning_rate", ""),
        "weight_decay": run.config.get("weight_decay", ""),
        "train_loss": fmean(last) if last else "",
        "correct": correct,
        "greedy_correct": correct,
        "forgetting": run.rises.get(FORGETTING, {}).get("score", ""),
        "memory_gib": max((line["peak_memory_gib"] for line in lines), default=""),
        "date": f"{scored:%Y-%m-%d}",
        "n": entry["n"],
    }


def published_rows() -> list[dict[str, Any]]:
    with open(PUBLISHED, newline="", encoding="utf-8") as f:
        return [{**row, "n": ITEMS} for row in csv.DictReader(f)]


def checks(runs: list[Run], base: Run | None) -> list[str]:
    """What tells that a result of ours does not belong beside the published ones; empty if nothing does."""
    found = []
    before = base and base.scores.get(FORGETTING, {}).get("score")
    if before is None:
        found.append("the base model's loss on texts was not measured: forgetting is not known")
    elif abs(before - LOSS_BEFORE) > 0.005:
        found.append(f"the base model's loss on texts is {before:.4f}, not {LOSS_BEFORE}: other texts or another model")
    protocol = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for run in runs:
        for key in PROTOCOL:
            if run.config.get(key) != protocol[key]:
                found.append(f"{run.name}: {key} {run.config.get(key)}, not {protocol[key]}")
        if (n := run.scores[ACCURACY]["n"]) != ITEMS:
            found.append(f"{run.name}: {n} items were answered, not {ITEMS:,}")
        tokens = next((line["tokens"] for line in reversed(read_metrics(run))), 0)
        if abs(tokens / TOKENS - 1) > 1e-3:
            found.append(
                f"{run.name}: it was trained on {tokens:,} tokens, not {TOKENS:,}: other rows, or not to the end"
            )
    return found


def shown(row: dict[str, Any]) -> list[str]:
    """The cells of a row."""
    per_cent = lambda correct: "" if correct == "" else f"{100 * int(correct) / row['n']:.1f}"  # noqa: E731
    number = lambda value, style: "" if value == "" else format(float(value), style)  # noqa: E731
    name = row["experiment"]
    return [
        f"**{name}**" if name.startswith("ours/") else name,
        number(row["learning_rate"], "g"),
        number(row["weight_decay"], "g"),
        number(row["train_loss"], ".4f"),
        str(row["correct"]),
        "" if name.startswith("ours/") else per_cent(row["correct"]),
        per_cent(row["greedy_correct"]),
        number(row["forgetting"], ".4f"),
        number(row["memory_gib"], ".1f"),
        row["date"],
    ]


def report(runs: list[Run]) -> tuple[str, list[dict[str, Any]]]:
    """(the text, all rows): sorted by their share of correct answers, the best first."""
    base = next((run for run in runs if run.rule == "base"), None)
    ours = [run for run in runs if ACCURACY in run.scores and run is not base]
    if not ours:
        raise UserError(f"none of these folders has the score {ACCURACY.partition('.')[0]}: name those of eval.py")
    rows = sorted([*map(our_row, ours), *published_rows()], key=lambda row: -int(row["correct"]) / row["n"])
    warnings = "".join(f"- not the benchmark's: {text}\n" for text in checks(ours, base))
    text = f"# peft's MetaMathQA benchmark, Llama-3.2-3B\n\n{table(HEAD, [shown(row) for row in rows])}\n"
    return f"{text}{warnings}{chr(10) * bool(warnings)}{TRAPS}\n", rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="output_dirs of eval.py, the base model's too"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write benchmark.md and benchmark.csv there")
    args = parser.parse_args(argv)
    if args.out:
        make_room(args.out / "benchmark.md")
    text, rows = report(read_runs(args.folders))
    print(text)
    if args.out:
        (args.out / "benchmark.md").write_text(text, encoding="utf-8")
        with open(args.out / "benchmark.csv", "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    run_main(main, "report.py")
