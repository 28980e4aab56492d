"""The report of the study of SmolLM2: README.md and its figures, from the lines that are there (smollm2.py says what
was fixed before). A part that is not there yet is named as such."""

import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.stats import binomtest, ttest_rel

from common import run_folder
from scripts.report import mask_figure
from scripts.report.figures import NAMES as MAIN_NAMES
from scripts.report.figures import STYLE as MAIN_STYLE
from scripts.report.figures import plt, save
from scripts.report.stats import holm, interval
from scripts.report.tables import table
from scripts.study.driver import ABOUT, RUNS, Lines, missing, read_lines
from scripts.study.miniature_report import CONTRARY, HOLDS, UNTOLD
from scripts.study.smollm2 import (
    KEEP_RATIO,
    MARGIN,
    PAPER,
    REACH,
    RULES,
    TUNING_SEED,
    Size,
    accuracy_runs,
    choose_rate,
    one_seed_runs,
    papers,
    rate_of,
    seed_runs,
)  # fmt: skip

LEVEL, TOLERANCE, LEAST_KEEP_RATIO = 0.05, 0.05, 0.05  # what smollm2.py fixes
TASKS = {"gsm8k": "GSM8K", "mbpp": "MBPP"}
METRICS = {"new": "new task", "retained": "Wikipedia", "excess": "Wikipedia above SFT's frontier"}
METRICS["other"] = "other task"  # compared, but no claim is judged by it: see smollm2.py
NAMES = {**MAIN_NAMES, "lora": "LoRA", "mofo": "mofo", "shira": "shira", "sift": "sift"}
STYLE = {
    **MAIN_STYLE, "lora": ("#555555", "X", (0, (4, 1, 1, 1))), "mofo": ("#B3A100", "h", (0, (2, 1))),
    "shira": ("#6A3D9A", "<", (0, (6, 2))), "sift": ("#A6611A", ">", (0, (1, 2))),
}  # fmt: skip
PAIRS = [(rule, other) for rule in ("gmt", "gmt_frozen") for other in ("none", "rmt", "hft", "drop")]
PAIRS += [(rule, "none") for rule in ("rmt", "hft", "drop", "lora", "mofo", "shira", "sift")]
NOT_YET, NOT_COMPARED, WITHIN_MARGIN = "not run yet", "not compared", f"less than {MARGIN} apart"


def verdicts(folder: Path) -> dict[str, dict[str, str]]:
    """{claim: {task: verdict}} of the study in a folder, for a table beside another one's; empty where none is."""
    if not (folder / ABOUT).exists():
        return {}
    size = size_of(run_folder.read_json(folder / ABOUT))
    found = claims(size, usable(read_lines(folder / RUNS)), base_scores(folder))
    return {claim: {TASKS[task]: text for task, text in by_task.items()} for claim, by_task in found.items()}


def size_of(about: dict) -> Size:
    return Size(**{key: value for key, value in about["scale"].items() if key != "files"})


def base_scores(folder: Path) -> dict[str, float]:
    """What the model scores before training; empty where it has not been scored yet."""
    return run_folder.read_json(folder / "bases.json") if (folder / "bases.json").exists() else {}


def write_report(folder: Path) -> str:
    """Write README.md and figures into the folder that holds runs.jsonl; returns README.md's text."""
    about = run_folder.read_json(folder / ABOUT)
    size = size_of(about)
    base = base_scores(folder)
    lines = usable(read_lines(folder / RUNS))
    parts = [
        header(size, lines, about, base), claims_table(size, lines, base),
        "## Every rate\n", frontier_figure(lines, base, folder / "frontier"), rates_table(size, lines, base),
        "## Seeds\n", seeds_table(size, lines), comparison_table(size, lines),
        "## keep_ratio\n", keep_ratio_figure(lines, base, folder / "keep_ratio"), keep_ratio_table(lines, base),
        "## Accuracy\n", accuracy_table(size, lines, base),
        "## Clipping before or after masking\n", clip_table(lines),
        "## What the masks keep\n", masks_text(lines, folder),
    ]  # fmt: skip
    text = "\n".join(part for part in parts if part)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def of(lines: Lines, **wanted: object) -> Lines:
    """The lines with these values, by learning rate, keep_ratio and seed."""
    found = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda x: (x["learning_rate"], x["keep_ratio"] or 0, x["seed"]))


# ---------------------------------------------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------------------------------------------


def sft_frontier(lines: Lines, task: str) -> Callable[[float], float | None]:
    """What SFT retains at a loss on the new task: by its rates up to the best, level for REACH beyond, else None."""
    points = frontier_points(lines, task)
    if len(points) < 2:
        return lambda new: None
    x, y = map(np.array, zip(*sorted(points.items()), strict=True))
    curve = PchipInterpolator(x, y)
    return lambda new: float(curve(np.clip(new, x[0], x[-1]))) if x[0] - REACH <= new <= x[-1] + REACH else None


def frontier_points(lines: Lines, task: str) -> dict[float, float]:
    """{new: retained} of SFT's rates up to the one that learns most; one seed."""
    found = [x for x in of(lines, task=task, rule="none") if x["part"] in ("rates", "frontier")]
    best = min(found, key=lambda x: x["new"], default=None)
    return {x["new"]: x["retained"] for x in found if x["learning_rate"] <= best["learning_rate"]}


def usable(lines: Lines) -> Lines:
    """The lines but those of seeds at another than the rule's chosen rate; each with excess, what it retains less than
    SFT's frontier at its loss on the new task, or None."""
    chosen = {(x["task"], x["rule"]): choose_rate(lines, x["task"], x["rule"]) for x in lines}
    of_chosen = ("seeds", "accuracy")
    lines = [x for x in lines if x["part"] not in of_chosen or x["learning_rate"] == chosen[x["task"], x["rule"]]]
    frontiers = {task: sft_frontier(lines, task) for task in TASKS}
    at = [frontiers[line["task"]](line["new"]) for line in lines]
    return [{**x, "excess": None if f is None else x["retained"] - f} for x, f in zip(lines, at, strict=True)]


def families(size: Size, task: str) -> list[list[tuple[str, str]]]:
    """The pairs of rules that are corrected together: those that the paper compares, and the others."""
    pairs = [pair for pair in PAIRS if {*pair} <= {*size.rules[task]}]
    return [[p for p in pairs if {*p} <= {*PAPER}], [p for p in pairs if not {*p} <= {*PAPER}]]


def seeds_there(size: Size, lines: Lines, task: str, family: list[tuple[str, str]]) -> tuple[int, int]:
    """(scored models, planned ones) of a family's rules in part seeds."""
    rules = {rule for pair in family for rule in pair}
    return sum(len(of(lines, part="seeds", task=task, rule=rule)) for rule in rules), size.seeds * len(rules)


def comparisons(size: Size, lines: Lines, task: str) -> list[dict]:
    """Paired differences between two rules over the seeds, with p-values corrected within each family and metric.

    A family is compared once all its seeds are there: a look at some, and then at more, would be a test more. A pair
    of which a model has no excess is left out, and counts in the correction.
    """
    out = []
    for family in families(size, task):
        there, planned = seeds_there(size, lines, task, family)
        if there < planned:
            continue
        for metric in METRICS:
            found = []
            for pair in family:
                a, b = ([x[metric] for x in of(lines, part="seeds", task=task, rule=rule)] for rule in pair)
                if None in (*a, *b) or len(a) < 2:
                    continue
                mean, half = interval(np.subtract(a, b))
                p = float(ttest_rel(a, b).pvalue) if half > 0 else float(mean == 0)
                found.append({"metric": metric, "pair": pair, "mean": mean, "half": half, "p": p, "n": len(a)})
            corrected = holm([e["p"] for e in found] + [1.0] * (len(family) - len(found)))
            out += [{**entry, "corrected": p} for entry, p in zip(found, corrected, strict=False)]
    return out


def verdict(found: dict) -> str:
    """Whether less of a loss is left: holds, the contrary does, less than MARGIN apart, or neither can be told."""
    if found["corrected"] < LEVEL and abs(found["mean"]) >= MARGIN:
        word = HOLDS if found["mean"] < 0 else CONTRARY
    else:
        word = WITHIN_MARGIN if abs(found["mean"]) + found["half"] < MARGIN else UNTOLD
    return f"{word}: {found['mean']:+.4f} ± {found['half']:.4f} nats, p = {found['corrected']:.2g}, n = {found['n']}"


def sweep(lines: Lines, task: str) -> dict[float, dict[float, dict]]:
    """{rate: {keep_ratio: line}} of gmt at the rates of part keep_ratio."""
    rates = sorted({x["learning_rate"] for x in of(lines, part="keep_ratio", task=task)})
    found: dict[float, dict[float, dict]] = {}
    for rate in rates:
        here = of(lines, task=task, rule="gmt", learning_rate=rate, seed=TUNING_SEED)
        found[rate] = {x["keep_ratio"]: x for x in here if x["part"] in ("rates", "keep_ratio")}
    return found


def insensitive(size: Size, lines: Lines, task: str, base: dict) -> str:
    """The answer to the claim that keep_ratio does not matter; no word of it before all runs are there."""
    if left := sum(run.part == "keep_ratio" for run in missing(one_seed_runs(size), lines)):
        return f"{NOT_YET}: {left} runs are missing"
    found = []
    for rate, by_ratio in sweep(lines, task).items():
        sft = of(lines, part="rates", task=task, rule="none", learning_rate=rate)
        if KEEP_RATIO not in by_ratio or not sft:
            return NOT_YET
        range_ = TOLERANCE * (base[task] - sft[0]["new"])
        for keep_ratio, line in by_ratio.items():
            if keep_ratio >= LEAST_KEEP_RATIO and keep_ratio != KEEP_RATIO:
                difference = line["new"] - by_ratio[KEEP_RATIO]["new"]
                found.append((abs(difference) - range_, difference, range_, keep_ratio, rate))
    if not found:
        return NOT_YET
    beyond, difference, range_, keep_ratio, rate = max(found)
    word = HOLDS if beyond <= 0 else UNTOLD if beyond < MARGIN else "**does not hold**"
    return (
        f"{word} from {LEAST_KEEP_RATIO} up: at most {difference:+.4f} nats from {KEEP_RATIO}, at {keep_ratio:g} and "
        f"rate {rate:g}, where {range_:.4f} are allowed; one seed"
    )


def claims(size: Size, lines: Lines, base: dict) -> dict[str, dict[str, str]]:
    """{claim: {task: verdict}}; the claims are worded as miniature_report.py words them."""
    out: dict[str, dict[str, str]] = {}
    wordings = {"new": "learns more of the new skill than", "retained": "retains more than"}
    wordings["excess"] = "retains more at the same new skill than"
    for i, task in enumerate(size.rules):
        paper, _ = families(size, task)
        there, planned = seeds_there(size, lines, task, paper)
        found = {(c["metric"], *c["pair"]): c for c in comparisons(size, lines, task)}
        for metric, wording in wordings.items():
            for pair in PAIRS:
                if pair[0] not in ("gmt", "gmt_frozen"):
                    continue
                if pair not in paper:
                    text = NOT_COMPARED
                elif there < planned:
                    text = f"{NOT_YET}: {there} of {planned} models are there" if there else NOT_YET
                elif (metric, *pair) in found:
                    text = verdict(found[metric, *pair])
                else:
                    text = f"{NOT_COMPARED}: SFT's rates do not cover all of their losses on the new task"
                out.setdefault(f"{NAMES[pair[0]]} {wording} {NAMES[pair[1]]}", {})[task] = text
        text = insensitive(size, lines, task, base) if i == 0 else NOT_COMPARED
        out.setdefault("gmt is insensitive to keep_ratio", {})[task] = text
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def header(size: Size, lines: Lines, about: dict, base: dict) -> str:
    planned = one_seed_runs(size)
    left = missing(planned, lines)
    counts = []
    for part in ("rates", "keep_ratio", "clip", "updates", "frontier"):
        of_part = [run for run in planned if run.part == part]
        counts.append(f"{part} {len(of_part) - sum(run.part == part for run in left)} of {len(of_part)} runs")
    if missing(one_seed_runs(papers(size)), lines):
        counts.append("seeds wait for the rates of the rules that the paper compares")
    else:
        later = seed_runs(papers(size) if left else size, lines)
        counts.append(f"seeds {len(later) - len(missing(later, lines))} of {len(later)} runs")
        of_part = accuracy_runs(size, lines)
        counts.append(f"accuracy {len(of_part) - len(missing(of_part, lines))} of {len(of_part)} runs")
    hours = sum(x.get("train_seconds", 0) + x["score_seconds"] for x in lines) / 3600
    not_run = [NAMES[rule] for rule in size.rules["gsm8k"] if rule not in size.rules["mbpp"]]
    hardware, before = about["hardware"], NOT_YET
    if base:
        before = ", ".join(f"{TASKS.get(key, 'Wikipedia')} {base[key]:.4f}" for key in (*TASKS, "wikipedia"))
    return f"""# The paper's claims on a real model, SmolLM2-135M-Instruct

Written by `python scripts/report.py` from [runs.jsonl](runs.jsonl), a line per scored model, made by
`STUDY=smollm2 bash scripts/study.sh` from commit {about["git_commit"]} on, with torch {about["versions"]["torch"]}
on {hardware["cpu_count"]} cores ({hardware["gpu"] or "no GPU"}). The runs' hours add up to {hours:.1f} so far; mostly
{about["processes"]} ran at a time.

**There so far: {"; ".join(counts)}.** An interrupted study goes on with the same command.

The model of 134.5 million parameters ([scripts/get_smollm2.py](../../scripts/get_smollm2.py)) is fine-tuned for
{size.steps} steps of {size.batch} examples on GSM8K's training problems (MetaMath's prompt) or on MBPP's training split
(Magicoder's), in bf16 with fp32 master weights, linear schedule, 10 % warm-up. Where a processor has no bf16,
its products are made in fp32 and rounded ([scripts/study/bf16.py](../../scripts/study/bf16.py)). Scores are losses in
nats per token, of which less is better, but for the [accuracies](#accuracy), which are too low to compare.
Learnt: the loss on {size.golds["gsm8k"]} (GSM8K) or {size.golds["mbpp"]} (MBPP) test solutions.
Retained: the loss on {size.passages} Wikipedia passages. Before training: {before}.
Not run on MBPP, to save time: {", ".join(not_run)}.
keep_ratio is {KEEP_RATIO} but where it is varied. What is compared, and what counts as a difference (at least
{MARGIN} nats), was fixed before the seeds were run, but for hft on MBPP, which came last:
[scripts/study/smollm2.py](../../scripts/study/smollm2.py).
± is the 95 % interval over seeds (Student's t; p-values are corrected, it is not): of the data's sample and order, not
of base models or recipes. MBPP's seeds draw {size.steps * size.batch} of the same 374 problems, so that theirs is
mostly of order. Rates, SFT's frontier and the sweep of keep_ratio come from one other seed, scored on the same texts:
their own noise is in no interval.
"""


def claims_table(size: Size, lines: Lines, base: dict) -> str:
    rows = [[claim, *(verdicts[task] for task in TASKS)] for claim, verdicts in claims(size, lines, base).items()]
    return (
        "## What became of the claims\n\n"
        + table(["claim", *TASKS.values()], rows)
        + "\nDifferences of losses at each rule's chosen rate, but for keep_ratio's (negative: the first rule is "
        f"better). Less than {MARGIN} apart: the whole interval lies within {MARGIN} nats of 0, whether it contains 0 "
        'or not; these verdicts are not corrected. "At the same new skill" compares what is retained with SFT\'s '
        "frontier (what SFT retains over its rates) at the loss on the new task that a run has reached: a rule that "
        "learns less and forgets less may just have taken smaller steps. A rule that learns more than SFT ever does is "
        "compared with SFT at its best. keep_ratio matters where gmt's loss on the new task differs by more than 5 % "
        f"of what SFT gains; below {LEAST_KEEP_RATIO} nothing is claimed, the table below shows what was measured.\n"
        + "".join(map(level_text, size.rules, itertools.repeat(lines)))
    )


def level_text(task: str, lines: Lines) -> str:
    """How much SFT's frontier changes where the seeds of all rules but drop lie: what `excess` adds to `retained`."""
    here = [x for x in of(lines, part="seeds", task=task) if x["rule"] != "drop" and x["excess"] is not None]
    if not here:
        return ""
    frontier, points = [x["retained"] - x["excess"] for x in here], frontier_points(lines, task)
    beyond = sum(not min(points) <= x["new"] <= max(points) for x in here)
    return (
        f"\nOn {TASKS[task]}, SFT's frontier is made of {len(points)} rates of one seed, and changes by "
        f"{max(frontier) - min(frontier):.4f} nats over the losses that these seeds reach (one-off drop's left out), "
        f"of which {beyond} of {len(here)} lie beyond its ends. Where it is level, comparing at the same new skill "
        "adds little to the plain comparison.\n"
    )


def number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def rate_words(size: Size, lines: Lines, task: str, rule: str, rate: float) -> str:
    """A learning rate, and whether it is the one that the seeds have."""
    if rate != choose_rate(lines, task, rule):
        return f"{rate:g}"
    left = [
        run for run in missing(one_seed_runs(size), lines) if (run.part, run.task, run.rule) == ("rates", task, rule)
    ]
    edge = rate in (rate_of(rule, min(size.rates)), rate_of(rule, max(size.rates)))
    return f"{rate:g} (chosen{' so far' * bool(left)}{', the edge' * edge})"


def rates_table(size: Size, lines: Lines, base: dict) -> str:
    head = ["task", "rule", "rate", "new", "Wikipedia", "rise", "above SFT's frontier", "other task"]
    head += ["weights moved, %", "distance", "in the largest 20 %, %"]
    rows = []
    for task in TASKS:
        for rule in RULES:
            for x in of(lines, task=task, rule=rule):
                if x["part"] not in ("rates", "frontier"):
                    continue
                rate = rate_words(size, lines, task, rule, x["learning_rate"])
                rate = f"{x['learning_rate']:g} (for the frontier)" if x["part"] == "frontier" else rate
                cells = [number(x["new"]), number(x["retained"]), number(x["retained"] - base["wikipedia"], "+.4f")]
                cells += [number(x["excess"], "+.4f"), number(x["other"]), f"{100 * x['moved']:.1f}"]
                cells += [f"{x['distance']:.2f}", f"{100 * x['largest_share']:.0f}"]
                rows.append([TASKS[task], NAMES[rule], rate, *cells])
    if not rows:
        return f"{NOT_YET}\n"
    return table(head, rows) + (
        "\nOne seed. A rule's seeds have the best of the four rates that all rules get. Rise: against the model before "
        "training. Above SFT's frontier: retained, minus what SFT retains "
        f"at the same loss on the new task; -: more than {REACH} nats outside of what SFT's rates up to its best one "
        "reach. Distance: L2 norm of tuned minus base; "
        "the last column: the share of its square in the largest 20 % of each matrix's entries.\n"
    )


def seeds_table(size: Size, lines: Lines) -> str:
    rows = []
    for task in TASKS:
        for rule in RULES:
            found = of(lines, part="seeds", task=task, rule=rule)
            if not found:
                continue
            cells = []
            for metric in METRICS:
                values = [x[metric] for x in found if x[metric] is not None]
                mean, half = interval(values) if values else (None, None)
                few = f" (of {len(values)})" if 0 < len(values) < len(found) else ""
                cells.append(number(mean) + (f" ± {half:.4f}" if len(values) > 1 else "") + few)
            rate = rate_words(size, lines, task, rule, found[0]["learning_rate"])
            rows.append([TASKS[task], NAMES[rule], rate, str(len(found)), *cells])
    return table(["task", "rule", "rate", "seeds", *METRICS.values()], rows) if rows else f"{NOT_YET}\n"


def comparison_table(size: Size, lines: Lines) -> str:
    rows = []
    for task in size.rules:
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for c in comparisons(size, lines, task):
            text = f"{c['mean']:+.4f} ± {c['half']:.4f} ({c['corrected']:.2g})"
            cells.setdefault(c["pair"], {})[c["metric"]] = text
        for (first, other), found in cells.items():
            rows.append([TASKS[task], f"{NAMES[first]} minus {NAMES[other]}", *(found.get(m, "-") for m in METRICS)])
    if not rows:
        return ""
    return (
        "Differences, seed by seed, with p-values (Holm):\n\n"
        + table(["task", "", *METRICS.values()], rows)
        + "\nOther task: the loss on solutions of the task that is not trained on. That it would be tested was not "
        "fixed before the seeds were run. At lower rates SFT, too, ends with a lower loss there.\n"
    )


def keep_ratio_table(lines: Lines, base: dict) -> str:
    rows = []
    for task in TASKS:
        for rate, by_ratio in sweep(lines, task).items():
            sft = of(lines, part="rates", task=task, rule="none", learning_rate=rate)
            for label, x in [*((f"{k:g}", by_ratio[k]) for k in sorted(by_ratio)), *(("SFT", x) for x in sft)]:
                masks = x.get("masks")
                cells = [number(x["new"]), number(x["retained"] - base["wikipedia"], "+.4f")]
                cells += [number(x["excess"], "+.4f"), f"{100 * fmean(masks['energy_kept']):.1f}" if masks else "-"]
                rows.append([TASKS[task], f"{rate:g}", label, *cells])
    if not rows:
        return f"{NOT_YET}\n"
    head = ["task", "rate", "keep_ratio", "new", "rise of Wikipedia", "above SFT's frontier", "energy kept, %"]
    return table(head, rows) + "\ngmt, one seed. Energy: the sum of squared gradients, mean over steps.\n"


def accuracy_table(size: Size, lines: Lines, base: dict) -> str:
    """Shares of problems solved, before training and after, with Wilson's intervals."""
    questions = {"solved": size.golds["gsm8k"], "mmlu": size.mmlu}

    def cells(x: dict) -> list[str]:
        found = []
        for metric, n in questions.items():
            low, high = binomtest(round(x[metric] * n), n).proportion_ci(method="wilson")
            found.append(f"{100 * x[metric]:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        return found

    rows = [["before training", "-", *cells(base)]] if {*questions} <= {*base} else []
    for rule in RULES:
        for x in of(lines, part="accuracy", rule=rule):
            rows.append([NAMES[rule], rate_words(size, lines, x["task"], rule, x["learning_rate"]), *cells(x)])
    if not rows:
        return f"{NOT_YET}\n"
    return table(["rule", "rate", "GSM8K, %", "MMLU, %"], rows) + (
        f"\nTrained on GSM8K, the first of the seeds. GSM8K: greedy answers to the {questions['solved']} test problems "
        f"whose solutions' loss is measured. MMLU: {questions['mmlu']} questions by likelihood, where guessing gives "
        "25 %. In brackets Wilson's 95 % interval.\n"
    )


def clip_table(lines: Lines) -> str:
    rows = []
    for rule in ("gmt", "rmt"):
        for after in of(lines, part="clip", task="gsm8k", rule=f"{rule}_clip_after"):
            rate = after["learning_rate"]
            before = of(lines, part="rates", task="gsm8k", rule=rule, learning_rate=rate)
            for word, x in [*(("before", x) for x in before), ("after", after)]:
                cells = [number(x["new"]), number(x["retained"]), f"{x['grad_norm']:.3g}", f"{x['grad_norm_kept']:.3g}"]
                rows.append([NAMES[rule], f"{rate:g}", word, *cells])
    head = ["rule", "rate", "clipped", "new", "Wikipedia", "gradient's norm", "of what is kept"]
    return table(head, rows) if rows else f"{NOT_YET}\n"


def masks_text(lines: Lines, folder: Path) -> str:
    """A table of energies and overlaps, and two figures."""
    rows, shown = [], {}
    for rule in RULES:
        found = [x for x in of(lines, part="rates", task="gsm8k", rule=rule) if "masks" in x]
        if not found:
            continue
        line = min(found, key=lambda x: abs(np.log(x["learning_rate"] / 2e-4)))
        energy, overlap = line["masks"]["energy_kept"], line["masks"]["jaccard"]
        shares = [x["masks"]["update_share"] for x in of(lines, part="updates", rule=rule)]
        shown[rule] = {**line, "update_share": shares[0] if shares else {}}
        cells = [
            f"{100 * fmean(energy):.1f}",
            f"{fmean(overlap):.3f}" if overlap else "-",
            f"{100 * fmean(shares[0].values()):.1f}" if shares else "-",
            f"{100 * line['moved']:.1f}",
        ]
        rows.append([NAMES[rule], f"{line['learning_rate']:g}", *cells])
    if not rows:
        return f"{NOT_YET}\n"
    head = ["rule", "rate", "energy kept, %", "overlap with the step before", "update on masked weights, %"]
    text = table([*head, "weights moved, %"], rows)
    text += (
        "\nOn GSM8K. Overlap: entries in both masks over entries in either; independent masks of 20 % have 0.111. "
        "Update on masked weights: the share of an update's squared norm that lies in entries whose gradient is masked "
        "at that step, and which the momentum of earlier steps moves; measured for gmt and rmt, where it can be other "
        "than 0.\n"
    )
    steps_figure(shown, folder / "mask_steps")
    text += "\n![Energy kept, overlap of masks and update on masked weights, step by step](mask_steps.png)\n"
    if "gmt" in shown:
        keys = ("layer", "type", "kept", "energy_kept", "share_of_energy_kept")
        cells = [dict(zip(keys, place, strict=True)) for place in shown["gmt"]["masks"]["places"]]
        title = f"SmolLM2-135M on GSM8K: gmt, keep_ratio {KEEP_RATIO}, rate {shown['gmt']['learning_rate']:g}"
        mask_figure.draw(cells, title, folder / "mask_places")
        by_type: dict[str, list[dict]] = {}
        for cell in cells:
            by_type.setdefault(cell["type"], []).append(cell)
        rows = [
            [kind, f"{100 * fmean(c['energy_kept'] for c in group):.1f}",
             f"{100 * sum(c['share_of_energy_kept'] for c in group):.1f}"]
            for kind, group in by_type.items()
        ]  # fmt: skip
        text += "\n![Where the kept energy lies, by layer and matrix type](mask_places.png)\n\n"
        text += table(
            ["matrix type", "energy kept of its own, mean over layers, %", "share of all kept energy, %"], rows
        )
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def frontier_figure(lines: Lines, base: dict, path: Path) -> str:
    """Rise of the loss on Wikipedia against the loss on the new task, a line per rule over its rates; pale: seeds."""
    tasks = [task for task in TASKS if of(lines, part="rates", task=task)]
    if not tasks:
        return ""
    fig, axes = plt.subplots(1, len(tasks), figsize=(6.2 * len(tasks), 4.8), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for rule in RULES:
            found = [x for x in of(lines, task=task, rule=rule) if x["part"] in ("rates", "frontier")]
            if not found:
                continue
            colour, marker, dashes = STYLE[rule]
            x, y = [v["new"] for v in found], [v["retained"] - base["wikipedia"] for v in found]
            ax.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=NAMES[rule], markersize=6)
            seeds = of(lines, part="seeds", task=task, rule=rule)
            x, y = [v["new"] for v in seeds], [v["retained"] - base["wikipedia"] for v in seeds]
            ax.scatter(x, y, color=colour, marker=marker, s=12, alpha=0.35, linewidths=0)
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(xlabel=f"{TASKS[task]}: loss on test solutions (nats)", ylabel="Wikipedia: rise of the loss (nats)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center", handlelength=3)
    fig.suptitle("A line is a rule, a mark on it a learning rate (pale: seeds); left and down is better", fontsize=9)
    save(fig, path)
    return "![Rise of the loss on Wikipedia against the loss on the new task, by rule](frontier.png)\n"


def keep_ratio_figure(lines: Lines, base: dict, path: Path) -> str:
    """New and retained against keep_ratio, a line per rate, and SFT at that rate."""
    task = next(iter(TASKS))
    found = sweep(lines, task)
    if not found:
        return ""
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4))
    wanted = (("new", 0.0, f"{TASKS[task]}: loss (nats)"), ("retained", base["wikipedia"], "Wikipedia: rise (nats)"))
    for ax, (metric, zero, label) in zip(axes, wanted, strict=True):
        for (rate, by_ratio), rule in zip(found.items(), ("gmt", "gmt_frozen"), strict=False):
            colour, marker, dashes = STYLE[rule]
            kept = sorted(by_ratio)
            values = [by_ratio[k][metric] - zero for k in kept]
            ax.plot(kept, values, color=colour, marker=marker, linestyle=dashes, label=f"gmt, rate {rate:g}")
            for sft in of(lines, part="rates", task=task, rule="none", learning_rate=rate):
                ax.axhline(sft[metric] - zero, color=colour, linewidth=1, alpha=0.6, label=f"SFT, rate {rate:g}")
        ax.set_xscale("log")
        ax.set(xlabel="keep_ratio", ylabel=label)
    axes[0].legend(fontsize=8)
    save(fig, path)
    return "![Losses against keep_ratio at two learning rates](keep_ratio.png)\n"


def steps_figure(shown: dict[str, dict], path: Path) -> None:
    """Energy kept, overlap with the mask of the step before, and update on masked weights, at every step."""
    fig, axes = plt.subplots(1, 3, figsize=(15, 4), sharex=True)
    for rule, line in shown.items():
        colour, marker, dashes = STYLE[rule]
        energy, overlap = line["masks"]["energy_kept"], line["masks"]["jaccard"]
        look = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4, "label": NAMES[rule]}
        axes[0].plot(range(1, len(energy) + 1), [100 * e for e in energy], **look)
        axes[1].plot(range(2, len(overlap) + 2), overlap, **look)
        share = line["update_share"]
        axes[2].plot([int(step) for step in share], [100 * s for s in share.values()], **look)
    axes[0].set(xlabel="optimizer step", ylabel="energy kept (%)", ylim=(0, 102))
    axes[1].set(xlabel="optimizer step", ylabel="overlap with the mask of the step before", ylim=(0, 1.02))
    axes[2].set(xlabel="optimizer step", ylabel="squared update on masked weights (%)", ylim=(0, 102))
    axes[0].xaxis.get_major_locator().set_params(integer=True)  # the three share it
    axes[0].legend(fontsize=8)
    save(fig, path)
