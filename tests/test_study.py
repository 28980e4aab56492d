"""The study: its world, its choice of rates, its statistics and its report: pytest tests/test_study.py"""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, needs_sandbox

from scripts.quickstart.data import OLD_SKILLS
from scripts.report import stats
from scripts.study import data as study_data
from scripts.study import report as study_report
from scripts.study import run as study

# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_interval_by_hand():
    middle, half = stats.interval([1.0, 2.0, 3.0, 4.0])
    assert (middle, half) == (2.5, pytest.approx(3.182446 * np.sqrt(5 / 3) / 2, rel=1e-6))  # t(0.975, 3) = 3.182446
    assert np.isnan(stats.interval([1.0])[1])


def test_paired_test_counts_all_flips_of_signs():
    rng = np.random.default_rng(1)
    a = rng.normal(size=9)
    b = a + rng.normal(0.4, 1, size=9)
    flipped = [abs(np.dot(signs, b - a)) for signs in itertools.product((1, -1), repeat=9)]
    assert stats.paired_test(a, b) == stats.paired_test(b, a) == np.mean(np.array(flipped) >= flipped[0] - 1e-12)
    assert stats.paired_test(range(16), range(1, 17)) == 2 / 2**16  # the least there is with 16 pairs
    assert stats.paired_test(a, a) == 1.0


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# The world
# ---------------------------------------------------------------------------------------------------------------------


def test_no_problem_is_in_two_splits():
    for skill in (*OLD_SKILLS, "remainder"):
        patterns = [
            {r for _, r, _ in study_data.word_problems(skill, s, 40, 0)} for s in ("train", "validation", "test")
        ]
        assert not any(a & b for a, b in itertools.combinations(patterns, 2)), skill
    bodies = [{b for *_, b in study_data.functions(s, 40, 0)} for s in ("train", "validation", "test")]
    assert not any(a & b for a, b in itertools.combinations(bodies, 2))
    assert study_data.training_rows("code", 20, 1) == study_data.training_rows("code", 20, 1)
    assert study_data.training_rows("code", 20, 1) != study_data.training_rows("code", 20, 2)


def test_answers_are_right():
    for _, reasoning, answer in study_data.word_problems("remainder", "train", 50, 0):
        expression, result = reasoning.rstrip(".").split("=")
        assert eval(expression) == int(result) == answer
    for item in study_data.problems("code", "test", 20):
        names: dict = {}
        exec(item["prompt"] + item["canonical_solution"] + "\n" + item["test"], names)
        names["check"](names[item["entry_point"]])
        with pytest.raises(AssertionError):
            names["check"](lambda *args: "another answer")


# ---------------------------------------------------------------------------------------------------------------------
# Which runs, and what is made of them
# ---------------------------------------------------------------------------------------------------------------------


def line(part, task, rule, rate, seed, new, retained=0.5, keep_ratio=None):
    run = study.Run(part, task, rule, rate, keep_ratio, seed)
    return {**study.asdict(run), "base": 0, "new": new, "retained": retained, "new_nll": 1 - new, "retained_nll": 0.1}


def test_the_chosen_rate_is_the_best_in_both_and_the_lowest_of_equals():
    scores = {1e-4: (0.2, 0.9), 2e-4: (0.6, 0.5), 4e-4: (0.5, 0.6), 8e-4: (1.0, 0.1)}
    lines = [
        line("rates", "code", "gmt", rate, seed, new + sign, old - sign)
        for rate, (new, old) in scores.items()
        for seed, sign in enumerate((-0.1, 0.1))
    ]
    lines += [line("seeds", "code", "gmt", 8e-4, 0, 1.0, 1.0), line("rates", "code", "none", 1e-4, 0, 1.0, 1.0)]
    assert study.choose_rate(lines, "code", "gmt") == 2e-4


def test_the_runs_of_a_study():
    scale = study.SCALES["small"]
    first = study.runs_of_rates(scale)
    assert len(first) == len(set(first)) == 5 * 5 * 2 * scale.tuning_seeds and not any(r.rule == "drop" for r in first)
    assert not {r.seed for r in first} & set(range(scale.seeds))
    lines = [
        line("rates", task, rule, rate, 1000, new=rate if rule != "drop" else 1e-4 / rate)
        for task in study_data.TASKS for rule in study.RULES for rate in scale.rates
    ]  # fmt: skip
    second = study.runs_at_chosen_rates(scale, lines)
    chosen = {(r.rule, r.learning_rate) for r in second if r.part == "seeds"}
    assert chosen == {(rule, 1e-4 if rule == "drop" else 4e-3) for rule in study.RULES}
    assert sum(r.part == "seeds" for r in second) == 6 * 2 * 16
    assert {r.keep_ratio for r in second if r.part == "keep_ratio"} == {0.05, 0.1, 0.4, 0.6, 0.8, 1.0}


def test_forgetting_at_the_same_new_skill():
    points = [(0.1, 0.9), (0.5, 0.7), (0.9, 0.1)]
    assert study_report.at_matched(points, 0.7) == pytest.approx(0.4)
    assert study_report.at_matched(points, 0.05) == 0.9 and study_report.at_matched(points, 0.95) is None


@pytest.fixture
def results(tmp_path):
    """A study in which, in code, gmt learns 10 points more than all others and keep_ratio 0.05 loses 20 of them."""
    rng, lines = np.random.default_rng(0), []
    for task in study_data.TASKS:
        lines += [
            line("rates", task, rule, rate, 1000, 500 * rate, 0.9 - 500 * rate)
            for rule in study.RULES
            for rate in (1e-4, 1e-3)
        ]
        for seed in range(12):
            for rule in study.RULES:
                better = 0.1 if (task, rule) == ("code", "gmt") else 0.0
                keep_ratio = 0.2 if rule in study.KEEPING else None
                lines.append(
                    line(
                        "seeds",
                        task,
                        rule,
                        1e-3,
                        seed,
                        0.6 + better + rng.normal() / 100,
                        0.4 + rng.normal() / 50,
                        keep_ratio,
                    )
                )
            for keep_ratio in (0.05, 0.4, 1.0):
                worse = 0.2 if (task, keep_ratio) == ("code", 0.05) else 0.0
                better = 0.1 if task == "code" else 0.0
                lines.append(
                    line(
                        "keep_ratio",
                        task,
                        "gmt",
                        1e-3,
                        seed,
                        0.6 + better - worse + rng.normal() / 100,
                        0.4,
                        keep_ratio,
                    )
                )
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    about = {"scale": study.asdict(study.SCALES["small"]), "processes": 2, "command": "study.py", "git_commit": "0"}
    about |= {"versions": {"torch": "2"}, "hardware": {"cpu_count": 2, "gpu": None}}
    (tmp_path / "study.json").write_text(json.dumps(about))
    bases = [{task: {"new": 0.02, "retained": retained} for task in study_data.TASKS} for retained in (0.9, 0.953)]
    (tmp_path / "bases.json").write_text(json.dumps(bases))
    return tmp_path


def test_the_report_finds_what_is_there_and_nothing_else(results):
    text = study_report.write_report(results)
    assert (results / "README.md").read_text() == text
    claims = {
        row.split(" | ")[0].strip("| "): row.strip(" |").split(" | ")[1:] for row in text.splitlines() if " | " in row
    }
    for other in ("none (SFT)", "rmt", "hft", "one-off drop"):
        remainder, code = claims[f"gmt learns more of the new skill than {other}"]
        assert remainder.startswith("cannot tell") and code.startswith("**yes**: +"), other
        for what in ("retains more", "learns more of the new skill"):
            assert all(c.startswith("cannot tell") for c in claims[f"gmt, frozen {what} than {other}"]), other
    remainder, code = claims["gmt is insensitive to keep_ratio (5% either way)"]
    assert remainder.startswith("**yes**") and code.startswith("**no**") and "at 0.05" in code
    for name in ("frontier", "seeds", "keep_ratio"):
        assert (results / f"{name}.png").stat().st_size > 10_000 and (results / f"{name}.pdf").stat().st_size > 5_000
    assert "in %: old skills 90.0, 95.3; remainder 2.0, 2.0; code 2.0, 2.0." in text
    rows = (results / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 12 and rows[0].startswith("task,rule,learning_rate,seeds")


def test_drops_at_another_than_the_chosen_rate_are_left_out(results):
    text = study_report.write_report(results)
    with open(results / "runs.jsonl", "a") as f:  # what the models of rule none at their own rate give
        for seed in range(12):
            f.write(json.dumps(line("seeds", "code", "drop", 1e-4, seed, 0.0, 0.0, 0.2)) + "\n")
    assert [x for x in study_report.write_report(results).splitlines() if "runs.jsonl" not in x] == [
        x for x in text.splitlines() if "runs.jsonl" not in x
    ]


def test_the_contrary_is_said(results):
    lines = study.read_lines(results / "runs.jsonl")
    for x in lines:
        x["retained"] -= 0.3 * (x["rule"] == "gmt")
    (results / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert "| gmt retains more than none (SFT) | **no, the contrary**: -" in study_report.write_report(results)


def test_a_line_that_was_cut_is_taken_away(results):
    path = results / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"part": "see')
    assert len(study.read_lines(path)) == whole.count("\n") and path.read_text() == whole


@pytest.mark.slow
@needs_sandbox
def test_a_tiny_study_runs_whole_and_again(tmp_path):
    command = [
        "bash",
        str(ROOT / "scripts" / "study.sh"),
        "--folder",
        str(tmp_path / "models"),
        "--results",
        str(tmp_path),
    ]
    env = {**os.environ, "STUDY": "tiny", "RESULTS": str(tmp_path), "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = study.read_lines(tmp_path / "runs.jsonl")
        scale = study.SCALES["tiny"]
        runs = 6 * 2 * 2 * scale.tuning_seeds + 6 * 2 * scale.seeds + 2 * scale.sweep_seeds
        keys = [tuple(x[key] for key in study.Run.__annotations__) for x in lines]
        assert len(set(keys)) == len(keys) and runs <= len(lines) <= runs + 12
    assert "## What became of the claims" in (tmp_path / "README.md").read_text()
