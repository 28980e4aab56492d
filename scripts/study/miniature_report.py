"""The study's report: README.md, its tables as CSV and its figures, from runs.jsonl (scripts/report.py results).

What counts as an answer is fixed here, whichever way it falls: a difference is one if its p-value, corrected by Holm
over all comparisons of its question, is below 0.05; keep_ratio (below 1) does not matter if the 95 % interval of each
difference from keep_ratio 0.2 lies within MARGIN; all else this study cannot tell.
"""

import csv
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

import numpy as np

from common.errors import UserError
from scripts.report.figures import NAMES, STYLE, plt, save
from scripts.report.stats import holm, interval, paired_test
from scripts.report.tables import table
from scripts.study.driver import Lines, read_lines
from scripts.study.miniature import KEEP_RATIO, RULES, choose_rate

HOLDS, CONTRARY, UNTOLD = "**holds**", "**the contrary holds**", "cannot be told"
LEVEL, MARGIN = 0.05, 0.05  # MARGIN: of accuracy, 5 points
MATCHED = 0.5  # forgetting is compared where a rule's new skill is this share of the best that SFT reaches
SKILLS = {"remainder": "arithmetic (remainders)", "code": "code (small Python functions)"}
METRICS = ("new", "retained", "new_nll", "retained_nll")


def write_report(folder: Path, beside: dict[str, dict[str, str]]) -> str:
    """Write README.md, scores.csv and figures into the folder that holds runs.jsonl; returns README.md's text.

    Args:
        beside: the verdicts of another study on the same claims, {claim: {its task: verdict}}.
    """
    lines, about = at_chosen_rates(read_lines(folder / "runs.jsonl")), json.loads((folder / "study.json").read_text())
    if not any(line["part"] == "seeds" for line in lines):
        raise UserError(
            f"{folder}: the {len(lines)} runs there are none of its seeds: let scripts/study.sh go on first"
        )
    tasks = [task for task in SKILLS if any(line["task"] == task for line in lines)]
    frontier_figure(lines, tasks, folder / "frontier")
    seeds_figure(lines, tasks, folder / "seeds")
    sweep_figure(lines, tasks, folder / "keep_ratio")
    rows = scores(lines, tasks)
    with open(folder / "scores.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    parts = [
        header(lines, about), answers(lines, tasks, beside),
        "## Scores at the chosen rates\n", base_text(folder), score_table(rows), comparison_table(lines, tasks),
        "![Scores of every seed at the chosen rates](seeds.png)\n",
        "## Forgetting at the same new skill\n", matched_table(lines, tasks),
        "![New skill against retained skills over five learning rates, for each rule](frontier.png)\n",
        "## keep_ratio\n", sweep_table(lines, tasks), "![Accuracy against keep_ratio](keep_ratio.png)\n",
        cost_table(folder),
    ]  # fmt: skip
    text = "\n".join(part for part in parts if part)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def at_chosen_rates(lines: Lines) -> Lines:
    """All lines but those of the part seeds at another than the rule's chosen rate: drop is made of all of none's."""
    pairs = {(line["task"], line["rule"]) for line in lines}
    chosen = {pair: choose_rate(lines, *pair) for pair in pairs}
    return [x for x in lines if x["part"] != "seeds" or x["learning_rate"] == chosen[x["task"], x["rule"]]]


def of(lines: Lines, **wanted: object) -> Lines:
    """The lines with these values, in the order of their seeds."""
    found = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda line: line["seed"])


def values(lines: Lines, metric: str, **wanted: object) -> list[float]:
    return [line[metric] for line in of(lines, **wanted)]


def percent(numbers: list[float]) -> str:
    """Mean and 95 % interval, in per cent."""
    middle, half = interval(numbers)
    return f"{100 * middle:.1f}" + (f" ± {100 * half:.1f}" if len(numbers) > 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def header(lines: Lines, about: dict) -> str:
    scale, hardware = about["scale"], about["hardware"]
    counts = ", ".join(
        f"{sum(line['part'] == part for line in lines)} {part}" for part in ("rates", "seeds", "keep_ratio")
    )
    return f"""# The paper's claims in miniature

Written by `python scripts/report.py` from [runs.jsonl](runs.jsonl), a line per scored model (used: {counts}), made by
`{about["command"]}` (today `bash scripts/study.sh`) of commit {about["git_commit"]}
with torch {about["versions"]["torch"]} on {hardware["cpu_count"]} cores ({hardware["gpu"] or "no GPU"}).

{scale["bases"]} base models (Llamas of width {scale["hidden"]} and {scale["layers"]} layers, from random weights) learn
addition, subtraction and reversal of digits in word problems, and functions of one operation. Each fine-tuning takes
{scale["steps"]} steps of 32 of {scale["rows"]:,} problems of a new skill: {" or ".join(SKILLS.values())}.
Each rule's learning rate is the one of {len(scale["rates"])} with the highest harmonic mean of new-skill and retained
accuracy on validation problems, over {scale["tuning_seeds"]} seeds of their own. Then {scale["seeds"]} seeds at it
(other sample and order, the base models in turn), on test problems. keep_ratio is {KEEP_RATIO} but where it is
varied; drop masks the task vector of the model of rule none by magnitude. ± is the 95 % interval over seeds
(Student's t); seeds share the {scale["bases"]} bases, so that it is of these bases and says little of others. Retained:
mean accuracy on the three old skills.

**Small models on generated problems: what holds here need not hold for a 7B model, nor what fails.**
"""


def answers(lines: Lines, tasks: list[str], beside: dict[str, dict[str, str]]) -> str:
    """The paper's claims, one by one; `beside`: the verdicts of another study, {claim: {its task: verdict}}."""
    found, counts = claims(lines, tasks)
    others = list(next(iter(beside.values()), {}))
    rows = [["claim", *tasks, *others], ["---"] * (1 + len(tasks) + len(others))]
    for claim, verdicts in found.items():
        more = beside.get(claim, {})
        rows.append([claim, *(verdicts[t] for t in tasks), *(more.get(t, "not compared") for t in others)])
    text = "## What became of the claims\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if others:
        text += (
            f"\n\n{' and '.join(others)}: the real model SmolLM2-135M, in nats per token, where less is better "
            "([smollm2/README.md](smollm2/README.md), which says how); the other columns, and all that follows: small "
            "models on generated problems."
        )
    return text + (
        f"\n\nOf {counts.total()} comparisons of the small models at their chosen rates {counts[HOLDS]} hold, in "
        f"{counts[CONTRARY]} the contrary does, {counts[UNTOLD]} this study cannot tell. p: exact paired test over "
        "seeds (all flips of signs), corrected by Holm over all of them. The paper claims better scores and "
        "insensitivity to keep_ratio; what is retained is a question of ours, as HFT asks it. A rule that learns less "
        'and retains more may just have taken smaller steps: "at the same new skill" compares them at equal learning, '
        "by the interval over tuning seeds.\n"
    )


def claims(lines: Lines, tasks: list[str]) -> tuple[dict[str, dict[str, str]], Counter[str]]:
    """({claim: {task: verdict}}, how many of the comparisons at chosen rates hold, do not, cannot be told)."""
    out: dict[str, dict[str, str]] = defaultdict(dict)
    found = {(c["task"], c["metric"], c["first"], c["other"]): c for c in comparisons(lines, tasks)}
    counts: Counter[str] = Counter()

    def verdict(task: str, metric: str, first: str, other: str) -> str:
        c = found.get((task, metric, first, other))
        if c is None:
            return "not measured"
        word = UNTOLD
        if c["corrected"] < LEVEL:
            word = HOLDS if c["mean"] > 0 else CONTRARY
        counts[word] += 1
        return f"{word}: {100 * c['mean']:+.1f} points, p = {c['corrected']:.2g}"

    for task in tasks:
        at_target = matched(lines, task, in_nats=False)[1]
        for metric, what in (("new", "learns more of the new skill than"), ("retained", "retains more than")):
            for first in ("gmt", "gmt_frozen"):
                for other in ("none", "rmt", "hft", "drop"):
                    out[f"{NAMES[first]} {what} {NAMES[other]}"][task] = verdict(task, metric, first, other)
        for first in ("gmt", "gmt_frozen"):
            for other in ("none", "rmt", "hft", "drop"):
                claim = f"{NAMES[first]} retains more at the same new skill than {NAMES[other]}"
                out[claim][task] = at_equal_skill(at_target[first], at_target[other])
        out["gmt is insensitive to keep_ratio"][task] = insensitive(lines, task)
    return dict(out), counts


def at_equal_skill(first: dict[int, float], other: dict[int, float]) -> str:
    """The verdict on what two rules retain where they have learnt the same, {tuning seed: accuracy} of each."""
    seeds = sorted(first.keys() & other.keys())
    if len(seeds) < 2:
        return "not measured"
    middle, half = interval([100 * (first[seed] - other[seed]) for seed in seeds])
    word = UNTOLD if abs(middle) <= half else HOLDS if middle > 0 else CONTRARY
    return f"{word}: {middle:+.1f} ± {half:.1f} points"


def comparisons(lines: Lines, tasks: list[str]) -> Lines:
    """Paired differences between two rules over the seeds, with p-values corrected for the number of comparisons."""
    out = []
    for task in tasks:
        for metric in ("new", "retained"):
            for first in ("gmt", "gmt_frozen"):
                for other in ("none", "rmt", "hft", "drop"):
                    pair = [
                        {x["seed"]: x[metric] for x in of(lines, part="seeds", task=task, rule=r)}
                        for r in (first, other)
                    ]
                    seeds = sorted(pair[0].keys() & pair[1].keys())
                    if len(seeds) < 2:
                        continue
                    a, b = ([scores[seed] for seed in seeds] for scores in pair)
                    middle, half = interval(np.subtract(a, b))
                    out.append({
                        "task": task, "metric": metric, "first": first, "other": other, "mean": middle, "half": half,
                        "p": paired_test(b, a), "n": len(seeds),
                    })  # fmt: skip
    for c, corrected in zip(out, holm([c["p"] for c in out]), strict=True):
        c["corrected"] = corrected
    return out


def comparison_table(lines: Lines, tasks: list[str]) -> str:
    rows: dict[tuple, list[str]] = defaultdict(list)
    for c in comparisons(lines, tasks):
        cells = rows[c["task"], c["first"], c["other"]]
        cells += [f"{100 * c['mean']:+.1f} ± {100 * c['half']:.1f}", f"{c['corrected']:.2g}"]
    head = ["task", "", "new skill", "p (Holm)", "retained", "p (Holm)"]
    named = [[task, f"{NAMES[a]} minus {NAMES[b]}", *cells] for (task, a, b), cells in rows.items()]
    return "Differences, seed by seed, in points:\n\n" + table(head, named)


def scores(lines: Lines, tasks: list[str]) -> Lines:
    """A row per task and rule: mean and half width of the 95 % interval of every metric, over the seeds."""
    out = []
    for task in tasks:
        for rule in RULES:
            found = of(lines, part="seeds", task=task, rule=rule)
            if not found:
                continue
            row = {"task": task, "rule": rule, "learning_rate": found[0]["learning_rate"], "seeds": len(found)}
            rates = sorted({line["learning_rate"] for line in lines if line["part"] == "rates"})
            row["at_the_edge"] = row["learning_rate"] in (rates[0], rates[-1])
            for metric in METRICS:
                row[metric], row[f"{metric}_half"] = interval([line[metric] for line in found])
            out.append(row)
    return out


def base_text(folder: Path) -> str:
    """What the base models score, if bases.json is there."""
    path = folder / "bases.json"
    if not path.exists():
        return ""
    bases = json.loads(path.read_text())
    scores = {"old skills": [next(iter(base.values()))["retained"] for base in bases]}
    scores |= {task: [base[task]["new"] for base in bases] for task in bases[0]}
    text = "; ".join(f"{skill} {', '.join(f'{100 * x:.1f}' for x in found)}" for skill, found in scores.items())
    return f"Before fine-tuning, accuracy of the base models in %: {text}.\n"


def score_table(rows: Lines) -> str:
    head = ["task", "rule", "learning rate", "seeds", "new skill, %", "retained, %", "new skill, nats"]
    found = []
    for r in rows:
        edge = " (edge)" if r["at_the_edge"] else ""
        cells = [f"{100 * r[m]:.1f} ± {100 * r[m + '_half']:.1f}" for m in METRICS[:2]]
        cells += [f"{r[m]:.3f} ± {r[m + '_half']:.3f}" for m in METRICS[2:]]
        rate = f"{r['learning_rate']:g}{edge}"
        found.append([r["task"], NAMES[r["rule"]], rate, r["seeds"], *cells])
    text = (
        table([*head, "retained, nats"], found)
        + "\nnats: negative log-likelihood per token of right answers to test problems."
    )
    if any(r["at_the_edge"] for r in rows):
        text += " (edge): the chosen rate is the lowest or highest of those tried; a better one may lie beyond."
    return text + "\n"


def at_matched(points: list[tuple[float, float]], target: float) -> float | None:
    """What is retained where the new skill first reaches `target`, on straight lines between points (new, retained)."""
    for (new, old), (next_new, next_old) in itertools.pairwise(points):
        if new < target <= next_new:
            return old + (next_old - old) * (target - new) / (next_new - new)
    return points[0][1] if points[0][0] >= target else None


def matched(lines: Lines, task: str, in_nats: bool) -> tuple[float, dict[str, dict[int, float]]]:
    """(score of the new skill, {rule: {tuning seed: retained score there}}), without the seeds that do not reach it.

    The score of the new skill is MATCHED of SFT's best mean accuracy, or SFT's mean negative log-likelihood at its
    chosen rate. Likelihoods are interpolated on a logarithmic scale, on which their curves are straighter.
    """
    rates = of(lines, part="rates", task=task)
    if in_nats:
        target = mean(values(rates, "new_nll", rule="none", learning_rate=choose_rate(lines, task, "none")))
    else:
        tried = {line["learning_rate"] for line in rates}
        target = MATCHED * max(mean(values(rates, "new", rule="none", learning_rate=rate)) for rate in tried)
    out: dict[str, dict[int, float]] = {rule: {} for rule in RULES}
    for rule, seed in itertools.product(RULES, sorted({line["seed"] for line in rates})):
        found = sorted(of(rates, rule=rule, seed=seed), key=lambda line: line["learning_rate"])
        if in_nats:
            points = [(-np.log(x["new_nll"]), np.log(x["retained_nll"])) for x in found]
            at = at_matched(points, -np.log(target))
        else:
            at = at_matched([(x["new"], x["retained"]) for x in found], target)
        if at is not None:
            out[rule][seed] = float(np.exp(at)) if in_nats else at
    return target, out


def matched_table(lines: Lines, tasks: list[str]) -> str:
    out = ["| task | new skill held at | " + " | ".join(NAMES[rule] for rule in RULES) + " |"]
    out.append("|" + " --- |" * (2 + len(RULES)))
    apart: list[str] = []  # rules that can be told from SFT
    for task, in_nats in itertools.product(tasks, (False, True)):
        target, retained = matched(lines, task, in_nats)
        cells = []
        for rule, found in retained.items():
            both = sorted(found.keys() & retained["none"].keys())
            text = "-"
            if found:
                middle = mean(found.values())
                text = f"{middle:.3f}" if in_nats else f"{100 * middle:.1f}"
            if rule != "none" and len(both) > 1:
                pairs = [(found[seed], retained["none"][seed]) for seed in both]
                middle, half = interval([np.log(a / b) if in_nats else 100 * (a - b) for a, b in pairs])
                if abs(middle) > half:
                    better = (middle < 0) == in_nats
                    apart.append(
                        f"{NAMES[rule]} ({task}, {'nats' if in_nats else '%'}: {'better' if better else 'worse'})"
                    )
                if in_nats:
                    text += f" (x {np.exp(middle):.2f}, {np.exp(middle - half):.2f} to {np.exp(middle + half):.2f})"
                else:
                    text += f" ({middle:+.1f} ± {half:.1f})"
            cells.append(text)
        score = f"{target:.3f} nats" if in_nats else f"{target:.1%}"
        out.append(f"| {task} | {score} | {' | '.join(cells)} |")
    return "\n".join(out) + (
        "\n\nWhat is retained, in % or in nats (less is better), where each rule has the same score on the new skill, "
        "on straight lines between its learning rates' validation scores. In brackets: the difference from SFT, or the "
        "ratio to it, paired by tuning seed, with 95 % intervals. -: no rate reaches that score. "
        f"Apart from SFT by their interval: {', '.join(apart) or 'none'}.\n"
    )


def sweep(lines: Lines, task: str) -> dict[float, Lines]:
    """{keep_ratio: lines of gmt at its chosen rate}, on the seeds that the sweep has."""
    found: dict[float, Lines] = defaultdict(list)
    for line in of(lines, part="keep_ratio", task=task):
        found[line["keep_ratio"]].append(line)
    seeds = {line["seed"] for group in found.values() for line in group}
    found[KEEP_RATIO] = [x for x in of(lines, part="seeds", task=task, rule="gmt") if x["seed"] in seeds]
    return dict(sorted(found.items()))


def insensitive(lines: Lines, task: str) -> str:
    groups = sweep(lines, task)
    here = [line["new"] for line in groups.pop(KEEP_RATIO)]
    groups.pop(1.0, None)  # that is SFT
    if not groups or len(here) < 2 or any(len(group) != len(here) for group in groups.values()):
        return "not measured"
    differences = {k: np.subtract([line["new"] for line in group], here) for k, group in groups.items()}
    corrected = dict(zip(differences, holm([paired_test(0 * d, d) for d in differences.values()]), strict=True))
    intervals = {k: interval(d) for k, d in differences.items()}
    worst = max(intervals, key=lambda k: abs(intervals[k][0]))
    text = f"largest difference from {KEEP_RATIO}: {100 * intervals[worst][0]:+.1f} points at {worst:g}"
    if all(abs(m) + half <= MARGIN for m, half in intervals.values()):
        return f"{HOLDS}: {text}"
    if any(corrected[k] < LEVEL and abs(m) > MARGIN for k, (m, _) in intervals.items()):
        return f"**does not hold**: {text}, p = {corrected[worst]:.2g}"
    return f"{UNTOLD}: {text}"


def sweep_table(lines: Lines, tasks: list[str]) -> str:
    rows = []
    for task in tasks:
        for keep_ratio, group in sweep(lines, task).items():
            cells = [percent([line[m] for line in group]) for m in METRICS[:2] if group]
            rows.append([task, f"{keep_ratio:g}", len(group), *cells])
    text = table(["task", "keep_ratio", "seeds", "new skill, %", "retained, %"], rows)
    return text + "\ngmt, at the rate chosen for it at keep_ratio 0.2; keep_ratio 1 is SFT at that rate.\n"


def cost_table(folder: Path) -> str:
    """Of bench/step.py's results, if they are there."""
    path = folder / "cost.json"
    if not path.exists():
        return ""
    cost = json.loads(path.read_text())
    rows = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in cost["rows"]]
    text = table(list(cost["rows"][0]), rows)
    return f"## Cost\n\nscripts/bench/step.py, the rules in turn at every repeat, medians:\n\n{text}"


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def panels(tasks: list[str], height: float = 4.4):
    fig, axes = plt.subplots(1, len(tasks), figsize=(5.4 * len(tasks), height), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set_title(f"New skill: {SKILLS[task]}", fontsize=10)
    return fig, axes[0]


def frontier_figure(lines: Lines, tasks: list[str], path: Path) -> None:
    """Retained against new skill, a line per rule over the learning rates: means over tuning seeds, and each seed."""
    fig, axes = panels(tasks)
    for ax, task in zip(axes, tasks, strict=True):
        for rule in RULES:
            found = of(lines, part="rates", task=task, rule=rule)
            rates = sorted({line["learning_rate"] for line in found})
            new, old = (
                [100 * mean(values(found, metric, learning_rate=rate)) for rate in rates]
                for metric in ("new", "retained")
            )
            colour, marker, dashes = STYLE[rule]
            each = [[100 * line[metric] for line in found] for metric in ("new", "retained")]
            ax.scatter(*each, color=colour, marker=marker, s=10, alpha=0.3, linewidths=0)
            ax.plot(new, old, color=colour, marker=marker, linestyle=dashes, label=NAMES[rule], markersize=6)
        ax.set(xlabel="new skill: accuracy (%)", ylabel="old skills: accuracy (%)", xlim=(-4, 104), ylim=(-4, 104))
    axes[0].legend(fontsize=9)
    fig.suptitle(
        "Each line is one rule, each point on it a learning rate (means over seeds; small pale marks are seeds)",
        fontsize=9,
    )
    save(fig, path)


def seeds_figure(lines: Lines, tasks: list[str], path: Path) -> None:
    """Every seed at the chosen rates, with the mean and its interval."""
    fig, axes = panels(tasks)
    for ax, task in zip(axes, tasks, strict=True):
        for rule in RULES:
            found = of(lines, part="seeds", task=task, rule=rule)
            if not found:
                continue
            colour, marker, _ = STYLE[rule]
            new, old = ([100 * line[metric] for line in found] for metric in ("new", "retained"))
            ax.scatter(new, old, color=colour, marker=marker, s=14, alpha=0.35, linewidths=0)
            (x, dx), (y, dy) = interval(new), interval(old)
            ax.errorbar(
                x, y, xerr=dx, yerr=dy, color=colour, marker=marker, markersize=8, capsize=3, label=NAMES[rule],
                linestyle="none", markeredgecolor="white", markeredgewidth=0.7,
            )  # fmt: skip
        ax.set(xlabel="new skill: accuracy (%)", ylabel="old skills: accuracy (%)")
        ax.margins(0.08)
    axes[0].legend(fontsize=9)
    fig.suptitle(
        "Each rule at its chosen rate: small marks are seeds, large ones means with 95 % intervals", fontsize=9
    )
    save(fig, path)


def sweep_figure(lines: Lines, tasks: list[str], path: Path) -> None:
    """Accuracy against keep_ratio."""
    fig, axes = panels(tasks, 3.8)
    for ax, task in zip(axes, tasks, strict=True):
        groups = sweep(lines, task)
        for metric, label, rule in (("new", "new skill", "gmt"), ("retained", "old skills", "none")):
            found = [interval([100 * line[metric] for line in group]) for group in groups.values() if group]
            kept = [k for k, group in groups.items() if group]
            colour, marker, dashes = STYLE[rule]
            ax.errorbar(
                kept, [m for m, _ in found], yerr=[h for _, h in found], color=colour, marker=marker, linestyle=dashes,
                capsize=3, label=label,
            )  # fmt: skip
        ax.set(xlabel="keep_ratio", ylabel="accuracy (%)", ylim=(-4, 104), xlim=(0, 1.04))
    axes[0].legend(fontsize=9)
    fig.suptitle("gmt at its chosen learning rate, with 95 % intervals over seeds; keep_ratio 1 is SFT", fontsize=9)
    save(fig, path)
