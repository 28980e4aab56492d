"""The quickstart's table and figure, from the folders of its runs.

    python scripts/quickstart/report.py outputs/quickstart

prints the table and writes quickstart.md, quickstart.png and quickstart.pdf there.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import UserError, run_main
from scripts.report.figures import NAMES, STYLE, save

NEW_SKILL = "sort"
CAPTION = "A demonstration on generated problems with one seed: it shows that everything runs, and is no evidence."
RULES = ("base", "none", "rmt", "hft", "gmt")


def accuracies(folder: Path, test_file: Path) -> dict[str, tuple[float, float]]:
    """(accuracy, standard error) on the new skill and on the old ones together, from eval.py's verdicts."""
    skills = [json.loads(line)["skill"] for line in test_file.read_text().splitlines()]
    verdicts: dict[str, list[bool]] = {"new": [], "old": []}
    for line in (folder / "gsm8k.metamath.jsonl").read_text().splitlines():
        line = json.loads(line)
        verdicts["new" if skills[line["id"]] == NEW_SKILL else "old"].append(line["correct"])
    means = {part: sum(v) / len(v) for part, v in verdicts.items()}
    return {part: (m, (m * (1 - m) / (len(verdicts[part]) - 1)) ** 0.5) for part, m in means.items()}


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """The configuration and the logged steps of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "run.json").read_text())["config"], lines


def table(folder: Path, results: dict[str, dict]) -> str:
    rows = [
        "| rule | learning rate | new skill | retained | kept | s/step | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rule, accuracy in results.items():
        cells = [f"{a:.1%} ± {e:.1%}" for a, e in accuracy.values()]
        rest = ["", "", "", ""]
        if rule != "base":
            config, lines = read_run(folder / rule)
            rest = [
                f"{config['learning_rate']:g}",
                f"{lines[-1]['kept_fraction']:.3f}",
                f"{median(sum(line['seconds'].values()) for line in lines):.3f}",
                f"{max(line['peak_memory_gib'] for line in lines):.2f} GiB",
            ]
        rows.append(f"| {NAMES[rule]} | {rest[0]} | {cells[0]} | {cells[1]} | {' | '.join(rest[1:])} |")
    return "\n".join(rows)


def figure(folder: Path, results: dict[str, dict]) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for rule, accuracy in results.items():
        colour, marker, dashes = STYLE[rule]
        if rule != "base":
            _, lines = read_run(folder / rule)
            steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
            left.plot(steps, losses, color=colour, linestyle=dashes, label=NAMES[rule], linewidth=1.8)
        (new, new_error), (old, old_error) = accuracy["new"], accuracy["old"]
        right.errorbar(
            100 * new, 100 * old, xerr=196 * new_error, yerr=196 * old_error, color=colour, marker=marker,
            markersize=9, capsize=3, linestyle="none", label=NAMES[rule],
        )  # fmt: skip
    left.set(
        xlabel="optimizer step", ylabel="training loss (nats per token)", yscale="log", title="Learning the new skill"
    )
    right.set(
        xlabel="new skill: accuracy (%)", ylabel="old skills: accuracy (%)", xlim=(-4, 104), ylim=(-4, 104),
        title="New skill against retained skills",
    )  # fmt: skip
    left.legend()
    right.legend(loc="lower left", title="with 95 % intervals")
    fig.suptitle(CAPTION, fontsize=9, color="#444444")
    save(fig, folder / "quickstart")


def run_in_folder(main: Callable[[Path], None], program: str) -> None:
    """Run the main of a program whose one argument is the folder of a finished quickstart."""

    def run() -> None:
        if len(sys.argv) != 2:
            raise UserError("one argument is needed: the quickstart's folder, outputs/quickstart")
        folder = Path(sys.argv[1])
        if missing := [rule for rule in RULES if not (folder / f"{rule}_eval" / "scores.json").exists()]:
            raise UserError(f"{folder} has no scores of {', '.join(missing)}: bash scripts/quickstart.sh makes them")
        main(folder)

    run_main(run, program)


def main(folder: Path) -> None:
    test_file = folder / "data" / "test.jsonl"
    results = {rule: accuracies(folder / f"{rule}_eval", test_file) for rule in RULES}
    text = (
        f"{CAPTION}\n\n{table(folder, results)}\n\n± is one standard error over the held-out problems. "
        "kept: share of the maskable weights whose gradient reached the optimizer at the last step."
    )
    (folder / "quickstart.md").write_text(text + "\n")
    figure(folder, results)
    print(f"\n{text}\n\nfigure: {folder / 'quickstart.png'}")


if __name__ == "__main__":
    run_in_folder(main, "report.py")
