"""The study: its world, its choice of rates, its statistics and its report: pytest tests/test_study.py"""

import contextlib
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, needs_sandbox
from safetensors.torch import save_file
from test_losses import slow_loss
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from common.sources import load_rows
from scripts.quickstart.data import OLD_SKILLS
from scripts.report import stats
from scripts.study import data as study_data
from scripts.study import driver, smollm2, smollm2_report
from scripts.study import miniature as study
from scripts.study import miniature_report as study_report
from scripts.study.bf16 import ByFp32
from training.data import tokenise

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
    run = driver.Run(part, task, rule, rate, keep_ratio, seed)
    return {**asdict(run), "base": 0, "new": new, "retained": retained, "new_nll": 1 - new, "retained_nll": 0.1}


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
    about = {"scale": asdict(study.SCALES["small"]), "processes": 2, "command": "study.py", "git_commit": "0"}
    about |= {"versions": {"torch": "2"}, "hardware": {"cpu_count": 2, "gpu": None}}
    (tmp_path / "study.json").write_text(json.dumps(about))
    bases = [{task: {"new": 0.02, "retained": retained} for task in study_data.TASKS} for retained in (0.9, 0.953)]
    (tmp_path / "bases.json").write_text(json.dumps(bases))
    return tmp_path


def test_the_report_finds_what_is_there_and_nothing_else(results):
    text = study_report.write_report(results, {})
    assert (results / "README.md").read_text() == text
    claims = {
        row.split(" | ")[0].strip("| "): row.strip(" |").split(" | ")[1:] for row in text.splitlines() if " | " in row
    }
    for other in ("none (SFT)", "rmt", "hft", "one-off drop"):
        remainder, code = claims[f"gmt learns more of the new skill than {other}"]
        assert remainder.startswith("cannot be told") and code.startswith("**holds**: +"), other
        for what in ("retains more", "learns more of the new skill"):
            assert all(c.startswith("cannot be told") for c in claims[f"gmt, frozen {what} than {other}"]), other
    remainder, code = claims["gmt is insensitive to keep_ratio"]
    assert remainder.startswith("**holds**") and code.startswith("**does not hold**") and "at 0.05" in code
    for name in ("frontier", "seeds", "keep_ratio"):
        assert (results / f"{name}.png").stat().st_size > 10_000 and (results / f"{name}.pdf").stat().st_size > 5_000
    assert "in %: old skills 90.0, 95.3; remainder 2.0, 2.0; code 2.0, 2.0." in text
    rows = (results / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 12 and rows[0].startswith("task,rule,learning_rate,seeds")


def test_drops_at_another_than_the_chosen_rate_are_left_out(results):
    text = study_report.write_report(results, {})
    with open(results / "runs.jsonl", "a") as f:  # what the models of rule none at their own rate give
        for seed in range(12):
            f.write(json.dumps(line("seeds", "code", "drop", 1e-4, seed, 0.0, 0.0, 0.2)) + "\n")
    assert [x for x in study_report.write_report(results, {}).splitlines() if "runs.jsonl" not in x] == [
        x for x in text.splitlines() if "runs.jsonl" not in x
    ]


def test_a_study_without_seeds_yet_is_one_line(results):
    lines = [line for line in (results / "runs.jsonl").read_text().splitlines() if '"seeds"' not in line]
    (results / "runs.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"runs there are none of its seeds: let scripts/study.sh go on first"):
        study_report.write_report(results, {})


def test_the_contrary_is_said(results):
    lines = driver.read_lines(results / "runs.jsonl")
    for x in lines:
        x["retained"] -= 0.3 * (x["rule"] == "gmt")
    text = study_report.answers(lines, list(study_data.TASKS), {})
    assert "| gmt retains more than none (SFT) | **the contrary holds**: -" in text


def test_a_line_that_was_cut_is_taken_away(results):
    path = results / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"part": "see')
    assert len(driver.read_lines(path)) == whole.count("\n")
    driver.take_away_a_cut_line(path)
    assert path.read_text() == whole


def test_of_two_lines_of_a_run_the_first_counts(tmp_path):
    runs = [{**asdict(driver.Run("rates", "gsm8k", "none", rate, None, 0)), "new": rate} for rate in (1.0, 2.0)]
    lines = [*runs, {**runs[0], "new": 9.0}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert driver.read_lines(tmp_path / "runs.jsonl") == runs


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
        lines = driver.read_lines(tmp_path / "runs.jsonl")
        scale = study.SCALES["tiny"]
        runs = 6 * 2 * 2 * scale.tuning_seeds + 6 * 2 * scale.seeds + 2 * scale.sweep_seeds
        keys = [tuple(x[key] for key in driver.Run.__annotations__) for x in lines]
        assert len(set(keys)) == len(keys) and runs <= len(lines) <= runs + 12
    assert "## What became of the claims" in (tmp_path / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# The driver, and the study of SmolLM2
# ---------------------------------------------------------------------------------------------------------------------

SIZE = smollm2.SIZES["smollm2"]


def real_line(part, task, rule, rate, seed, new, retained, keep_ratio=0.2):
    run = smollm2.run_of(part, task, rule, rate, seed, keep_ratio)
    scores = {"new": new, "retained": retained, "other": 1.5, "moved": 0.5, "distance": 1.0, "largest_share": 0.6}
    about = {"train_seconds": 100.0, "score_seconds": 50.0, "grad_norm": 1.0, "grad_norm_kept": 0.9}
    if run.keep_ratio is not None and rule != "drop":
        places = [["0", "q_proj", keep_ratio, 0.9, 0.7], ["none", "embed_tokens", keep_ratio, 0.8, 0.3]]
        about["masks"] = {"energy_kept": [0.9, 0.95], "jaccard": [0.3], "places": places}
        about["masks"]["update_share"] = {"2": 0.0, "3": 0.4} if part == "updates" else {}
    return {**asdict(run), **scores, **about}


def frontier(new):
    """What is retained in the made-up world below, at a loss on the new task."""
    return 2.8 + 0.4 * (1 - new) ** 2


@pytest.fixture
def real_lines():
    """A world on one frontier, but for gmt frozen, which retains 0.02 more on GSM8K, and keep_ratio 0.05 there."""
    rng, lines = np.random.default_rng(0), []
    for run in smollm2.one_seed_runs(SIZE):
        place = np.log2(run.learning_rate / 1e-4) - (3 if run.rule == "lora" else 0)
        new = 0.95 - 0.05 * place + (0.05 if run.keep_ratio == 0.05 else 0)
        better = 0.02 if (run.task, run.rule) == ("gsm8k", "gmt_frozen") else 0
        scores = (new, frontier(new) - better)
        lines.append(real_line(*(getattr(run, x) for x in driver.Run.__annotations__ if x != "keep_ratio"), *scores))
        lines[-1]["keep_ratio"] = run.keep_ratio
    lines += [dropped(x) for x in lines if (x["part"], x["rule"]) == ("rates", "none")]
    for run in smollm2.seed_runs(SIZE, lines):
        new = 0.9 + rng.normal() / 1000
        better = 0.02 if (run.task, run.rule) == ("gsm8k", "gmt_frozen") else 0
        retained = frontier(new) - better + rng.normal() / 2000
        lines.append(real_line(run.part, run.task, run.rule, run.learning_rate, run.seed, new, retained))
        lines += [dropped(lines[-1])] * (run.rule == "none")
    return lines


def dropped(line):
    new = line["new"] + 0.01
    return {**line, "rule": "drop", "keep_ratio": 0.2, "new": new, "retained": frontier(new)}


def test_the_runs_of_the_real_study_come_middle_first_and_once():
    runs = smollm2.one_seed_runs(SIZE)
    assert len(runs) == len(set(runs)) == (9 * 4 + 10 + 2 + 2 + 4) + 5 * 4
    assert {(run.rule, run.learning_rate) for run in runs[:4]} == {("none", rate) for rate in SIZE.rates}
    assert {run.learning_rate for run in runs[4:12] if run.rule != "lora"} == {2e-4}
    assert {run.rule for run in runs[4:12]} == set(smollm2.ALL) - {"none", "drop"}
    assert [(r.rule, r.learning_rate) for r in runs[12:14]] == [("gmt_clip_after", 2e-4), ("rmt_clip_after", 2e-4)]
    assert [(r.part, r.rule, r.learning_rate) for r in runs[14:16]] == [("updates", r, 2e-4) for r in ("gmt", "rmt")]
    assert {run.keep_ratio for run in runs[16:21]} == {0.01, 0.05, 0.1, 0.4, 0.7}
    lora = {run.learning_rate for run in runs if run.rule == "lora"}
    assert lora == {8 * rate for rate in SIZE.rates} and all(r.keep_ratio is None for r in runs if r.rule == "lora")


def test_what_the_paper_compares_comes_first(real_lines):
    first, seeds, accuracy, others, other_seeds = (part(real_lines) for part in smollm2.SmolLM2(SIZE).parts())
    assert {run.task for run in first + seeds} == {"gsm8k"} and len(first) == 5 * 4 + 10 + 2 + 2 + 4
    assert {run.rule for run in first if run.part != "clip"} == {"none", "gmt", "rmt", "gmt_frozen", "hft"}
    assert [run.part for run in seeds] == ["seeds"] * 25
    assert [(run.part, run.rule, run.seed) for run in accuracy] == [("accuracy", run.rule, 0) for run in seeds[:5]]
    assert set(first) < set(others) and set(seeds) < set(other_seeds)
    rest = [run for run in other_seeds if run not in seeds]
    assert [run.task for run in rest] == ["mbpp"] * 25 + ["gsm8k"] * 20
    assert [run.seed for run in rest] == [seed for seed in range(5) for _ in range(5)] + [*range(5)] * 4
    assert [run.rule for run in rest[25:]] == [rule for rule in ("lora", "mofo", "shira", "sift") for _ in range(5)]
    assert set(others) == set(smollm2.one_seed_runs(SIZE))


def test_the_seeds_take_the_rate_with_the_lowest_sum_of_losses():
    lines = [
        real_line("rates", task, rule, rate, 1000, new, retained)
        for task, rules in SIZE.rules.items()
        for rule in rules
        for rate, new, retained in ((1e-4, 0.95, 2.80), (2e-4, 0.92, 2.80), (4e-4, 0.90, 2.82), (8e-4, 0.89, 2.9))
    ]
    for x in lines:  # gmt's best sum is elsewhere; drop's own numbers do not count
        x["new"] -= 0.1 * (x["rule"] == "gmt" and x["learning_rate"] == 8e-4)
        x["new"] -= 0.5 * (x["rule"] == "drop" and x["learning_rate"] == 1e-4)
    assert smollm2.choose_rate(lines, "gsm8k", "gmt") == 8e-4
    assert smollm2.choose_rate(lines, "gsm8k", "none") == smollm2.choose_rate(lines, "mbpp", "drop") == 2e-4
    later = smollm2.seed_runs(SIZE, lines)
    assert len(later) == 5 * (9 + 5) and not any(run.rule == "drop" for run in later)
    assert {run.seed for run in later[:14]} == {0}


def test_what_has_a_line_is_not_made_again():
    runs = smollm2.one_seed_runs(SIZE)
    there = [{**asdict(run), "new": 1.0} for run in runs[:3]]
    assert driver.missing(runs, json.loads(json.dumps(there))) == runs[3:]


def test_a_run_that_fails_costs_no_other_its_line(tmp_path, monkeypatch):
    runs, made = [driver.Run("rates", "gsm8k", "none", rate, None, 0) for rate in (1.0, 2.0, 3.0)], []
    broken = {2.0}

    class Three:
        threads, may_grow = 1, ()

        def settings(self, folder):
            return {}

        def bases(self, folder, results, pool):
            pass

        def parts(self):
            def rates(lines):
                return runs

            return (rates,)

        def make(self, run, folder):
            made.append(run.learning_rate)
            if run.learning_rate in broken:
                raise UserError("no finite gradient")
            return [asdict(run)]

    monkeypatch.setattr(driver, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    with pytest.raises(UserError, match="no finite gradient"):
        driver.run_study(Three(), tmp_path, tmp_path, 1, "")
    assert sorted(x["learning_rate"] for x in driver.read_lines(tmp_path / "runs.jsonl")) == [1.0, 3.0]
    broken.clear()
    driver.run_study(Three(), tmp_path, tmp_path, 1, "")
    assert made == [1.0, 2.0, 3.0, 2.0]
    assert sorted(x["learning_rate"] for x in driver.read_lines(tmp_path / "runs.jsonl")) == [1.0, 2.0, 3.0]


def test_bases_are_made_only_for_runs_that_are_missing_and_must_be_those_of_the_lines(tmp_path, monkeypatch):
    """A clone holds all lines of the miniature study, of bases that another processor has trained."""
    tiny = study.Miniature(study.SCALES["tiny"])
    made = []
    monkeypatch.setattr(study, "make_base", lambda i, scale, folder: made.append(i))
    monkeypatch.setattr(driver, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(study.Miniature, "settings", lambda self, folder: {})
    monkeypatch.setattr(study.Miniature, "make", lambda self, run, folder: [{**asdict(run), "new": 1.0}])
    runs = [driver.Run("rates", "sort", "none", 1e-3, None, 0)]
    monkeypatch.setattr(study.Miniature, "parts", lambda self: (lambda lines: runs,))
    for i in range(tiny.scale.bases):
        (tmp_path / f"base{i}").mkdir()
        (tmp_path / f"base{i}" / "scores.json").write_text('{"new": 0.5}')
    results = tmp_path / "results"
    driver.run_study(tiny, tmp_path, results, 1, "")
    assert made == list(range(tiny.scale.bases))
    driver.run_study(tiny, tmp_path, results, 1, "")  # nothing is missing
    assert made == list(range(tiny.scale.bases))
    runs.append(driver.Run("rates", "sort", "none", 2e-3, None, 0))
    (tmp_path / "base0" / "scores.json").write_text('{"new": 0.6}')
    with pytest.raises(UserError, match=r"bases.json is of other base models than .*: set RESULTS to a new folder"):
        driver.run_study(tiny, tmp_path, results, 1, "")


def test_a_study_of_other_settings_is_refused_but_may_have_more_runs(tmp_path):
    class Nothing:
        threads, may_grow = 1, ("seeds",)

        def __init__(self, steps, seeds):
            self.words = {"steps": steps, "seeds": seeds, "files": {"model": "abc"}}

        def settings(self, folder):
            return self.words

        def bases(self, folder, results, pool):
            pass

        def parts(self):
            return ()

    driver.run_study(Nothing(24, 5), tmp_path, tmp_path, 1, "a command")
    with pytest.raises(UserError, match=r"study.json is of a study with another steps: move .* away"):
        driver.run_study(Nothing(32, 5), tmp_path, tmp_path, 1, "")
    driver.run_study(Nothing(24, 9), tmp_path, tmp_path, 1, "")
    about = json.loads((tmp_path / "study.json").read_text())
    assert about["scale"] == Nothing(24, 9).words and about["command"] == "a command"


def test_without_data_one_line_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("GMT_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="GMT_DATA_DIR must name a folder with gsm8k/train.jsonl.gz.*openai/gsm8k"):
        smollm2.SmolLM2(SIZE).settings(tmp_path)


def test_excess_is_measured_from_sfts_frontier_up_to_its_best_rate():
    points = ((1e-4, 0.95), (2e-4, 0.9), (4e-4, 0.85), (8e-4, 0.88))  # the last rate is past the best
    lines = [real_line("rates", "gsm8k", "none", r, 1000, new, frontier(new) + (r == 8e-4)) for r, new in points]
    lines.append(real_line("frontier", "gsm8k", "none", 1.4e-4, 1000, 0.92, frontier(0.92)))
    curve = smollm2_report.sft_frontier(lines, "gsm8k")
    for new in (0.95, 0.92, 0.9, 0.85):
        assert curve(new) == pytest.approx(frontier(new))
    assert curve(0.935) == pytest.approx(frontier(0.935), abs=5e-4)
    assert curve(0.97) == curve(0.95) and curve(0.83) == curve(0.85)  # level: two close rates would give any slope
    assert curve(0.971) is None and curve(0.829) is None
    found = smollm2_report.usable([*lines, real_line("frontier", "gsm8k", "gmt", 2e-4, 0, 0.9, frontier(0.9) + 0.01)])
    assert found[-1]["excess"] == pytest.approx(0.01) and found[3]["excess"] > 0.9
    early = smollm2_report.sft_frontier(lines[:1], "gsm8k")
    assert early(0.95) is None


def claims_of(lines):
    base = {"gsm8k": 1.3, "mbpp": 1.4, "wikipedia": 2.8, "mmlu": 0.25}
    return smollm2_report.claims(SIZE, smollm2_report.usable(lines), base)


def test_the_real_report_finds_what_is_there_and_nothing_else(real_lines):
    claims = claims_of(real_lines)
    better = claims["gmt, frozen retains more at the same new skill than rmt"]
    assert better["gsm8k"].startswith("**holds**: -0.0") and better["mbpp"].startswith("less than 0.005 apart")
    assert claims["gmt, frozen retains more than none (SFT)"]["gsm8k"].startswith("**holds**")
    for claim, verdicts in claims.items():
        if claim.startswith("gmt ") and "keep_ratio" not in claim and "drop" not in claim:
            assert all(verdict.startswith("less than 0.005 apart") for verdict in verdicts.values()), claim
    assert claims["gmt learns more of the new skill than one-off drop"]["gsm8k"].startswith("**holds**: -0.0")
    sensitive = claims["gmt is insensitive to keep_ratio"]
    assert sensitive["gsm8k"].startswith(
        "**does not hold** from 0.05 up: at most +0.0500 nats from 0.2, at 0.05 and rate 0.0002"
    )
    assert sensitive["mbpp"] == "not compared"
    for x in real_lines:
        x["retained"] += 0.1 * (x["rule"] == "gmt_frozen")
    assert claims_of(real_lines)["gmt, frozen retains more than none (SFT)"]["gsm8k"].startswith("**the contrary holds")


def test_the_other_task_is_compared_and_what_the_frontier_adds_is_said(real_lines):
    lines = [{**x, "other": x["other"] + 0.1 * (x["rule"] == "gmt") + 1e-3 * x["seed"]} for x in real_lines]
    lines = [{**x, "other": x["other"] + 1e-4 * (x["rule"] == "gmt") * x["seed"]} for x in lines]
    text = smollm2_report.comparison_table(SIZE, smollm2_report.usable(lines))
    (row,) = [line for line in text.splitlines() if line.startswith("| GSM8K | gmt minus none (SFT) |")]
    assert row.split(" | ")[-1].startswith("+0.100") and "not fixed before the seeds were run" in text
    seed = {"part": "seeds", "task": "gsm8k", "learning_rate": 1e-4, "keep_ratio": 0.2, "seed": 0}
    frontier = [{**seed, "rule": r, "retained": 1 + e, "excess": e - f, "new": new} for r, e, f, new in (
        ("gmt", 0.1, 0.0, 0.9), ("none", 0.2, 0.0123, 0.95), ("drop", 0.3, 0.5, 2.0), ("gmt", 0.0, 0.005, 1.0),
    )]  # fmt: skip
    rates = [real_line("rates", "gsm8k", "none", rate, 1000, new, 2.8) for rate, new in ((1e-4, 0.97), (2e-4, 0.92))]
    said = smollm2_report.level_text("gsm8k", [*frontier, *({**x, "excess": 0.0} for x in rates)])
    assert "is made of 2 rates of one seed, and changes by 0.0123 nats" in said and "2 of 3 lie beyond its ends" in said
    assert smollm2_report.level_text("gsm8k", []) == ""


def test_nothing_is_judged_before_all_seeds_of_the_papers_rules_are_there(real_lines):
    early = [x for x in real_lines if (x["rule"], x["seed"]) != ("hft", 4) and x["keep_ratio"] != 0.7]
    claims = claims_of(early)
    for claim, verdicts in claims.items():  # not only the claims about hft: all are corrected together
        if "keep_ratio" not in claim:
            assert verdicts["gsm8k"] == "not run yet: 29 of 30 models are there", claim
    assert claims["gmt is insensitive to keep_ratio"]["gsm8k"] == "not run yet: 2 runs are missing"
    assert "gmt minus" not in smollm2_report.comparison_table(SIZE, smollm2_report.usable(early)).split("MBPP")[0]
    papers = [x for x in real_lines if x["rule"] in smollm2.PAPER]  # what later rules bring changes no p-value
    for claim, verdicts in claims_of(papers).items():
        if "keep_ratio" not in claim:
            assert verdicts == claims_of(real_lines)[claim]


def test_a_pair_that_cannot_be_compared_counts_in_the_correction(real_lines):
    usable = smollm2_report.usable(real_lines)
    for x in usable:
        if (x["task"], x["part"], x["rule"], x["seed"]) == ("gsm8k", "seeds", "drop", 2):
            x["excess"] = None  # beyond SFT's rates
    base = {"gsm8k": 1.3, "mbpp": 1.4, "wikipedia": 2.8, "mmlu": 0.25}
    claims = smollm2_report.claims(SIZE, usable, base)
    text = claims["gmt retains more at the same new skill than one-off drop"]["gsm8k"]
    assert text == "not compared: SFT's rates do not cover all of their losses on the new task"
    paper = {rule for pair in smollm2_report.families(SIZE, "gsm8k")[0] for rule in pair}
    found = [c for c in smollm2_report.comparisons(SIZE, usable, "gsm8k") if {*c["pair"]} <= paper]
    excess = [c for c in found if c["metric"] == "excess"]
    assert len(excess) == 11 - 3
    smallest = min(excess, key=lambda c: c["p"])
    assert smallest["corrected"] == pytest.approx(min(1, 11 * smallest["p"]))


def test_seeds_at_a_rate_that_is_no_longer_chosen_do_not_count(real_lines):
    other = [{**x, "learning_rate": 8 * x["learning_rate"], "new": 0.5} for x in real_lines if x["part"] == "seeds"]
    assert claims_of(other + real_lines) == claims_of(real_lines)


def test_the_claims_of_both_studies_stand_side_by_side(results, real_lines, tmp_path):
    lines, tasks = driver.read_lines(results / "runs.jsonl"), list(study_data.TASKS)
    assert smollm2_report.verdicts(tmp_path / "smollm2") == {}
    assert "GSM8K" not in study_report.answers(lines, tasks, {})
    real = tmp_path / "smollm2"
    real.mkdir()
    (real / "study.json").write_text(json.dumps({"scale": {**asdict(SIZE), "files": {}}}))

    def row(claim):
        text = study_report.answers(lines, tasks, smollm2_report.verdicts(real))
        assert "| claim | remainder | code | GSM8K | MBPP |" in text
        (found,) = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {claim} |")]
        return found[1:]

    assert row("gmt learns more of the new skill than rmt")[2:] == ["not run yet", "not run yet"]
    (real / "bases.json").write_text(json.dumps({"gsm8k": 1.3, "mbpp": 1.4, "wikipedia": 2.8, "mmlu": 0.25}))
    (real / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in real_lines))
    remainder, code, gsm8k, mbpp = row("gmt, frozen retains more than none (SFT)")
    assert "points" in remainder and "points" in code and gsm8k.startswith("**holds**: -0.0") and "nats" in mbpp


def test_what_small_models_retain_at_the_same_new_skill():
    first, other = {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.1}, {1: 0.3, 2: 0.41, 3: 0.49}
    assert study_report.at_equal_skill(first, other).startswith("**holds**: +20.0")
    assert study_report.at_equal_skill(other, first).startswith("**the contrary holds**: -20.0")
    assert study_report.at_equal_skill(first, {1: 0.3, 2: 0.9}).startswith("cannot be told")
    assert study_report.at_equal_skill(first, {1: 0.3}) == "not measured"


def test_a_difference_below_the_margin_is_none(real_lines):
    for x in real_lines:
        x["retained"] += 0.016 * (x["rule"] == "gmt_frozen" and x["task"] == "gsm8k")  # 0.004 remain, with p < 0.05
    lines = smollm2_report.usable(real_lines)
    found = {(c["metric"], *c["pair"]): c for c in smollm2_report.comparisons(SIZE, lines, "gsm8k")}
    entry = found["retained", "gmt_frozen", "none"]
    assert entry["p"] < 0.05 and abs(entry["mean"]) < smollm2.MARGIN
    entry["corrected"] = 0.001
    assert smollm2_report.verdict({**entry, "half": 0.0009}).startswith("less than 0.005 apart")
    assert smollm2_report.verdict({**entry, "half": 0.0015}).startswith("cannot be told")


def test_the_real_report_names_the_parts_that_are_not_there(real_lines, tmp_path):
    about = {"scale": {**asdict(SIZE), "files": {}}, "git_commit": "0", "versions": {"torch": "2"}}
    about |= {"processes": 2, "hardware": {"cpu_count": 2, "gpu": None}}
    (tmp_path / "study.json").write_text(json.dumps(about))
    text = smollm2_report.write_report(tmp_path)  # as in the first minutes
    assert "Before training: not run yet." in text and "rates 0 of 56 runs; keep_ratio 0 of 10" in text
    assert "| gmt learns more of the new skill than none (SFT) | not run yet | not run yet |" in text
    some = smollm2_report.header(SIZE, real_lines[:17], about, {})
    assert (
        "rates 12 of 56 runs; keep_ratio 1 of 10 runs; clip 2 of 2 runs; updates 2 of 2" in some
        and "wait for the rates of the rules that the pap" in some
    )
    papers = [x for x in real_lines if x["part"] == "clip" or (x["part"] != "seeds" and x["rule"] in smollm2.PAPER)]
    assert "clip 2 of 2 runs; updates 2 of 2 runs; frontier 4 of 4 runs; seeds 0 of 25 runs" in smollm2_report.header(
        SIZE, papers, about, {}
    )
    (tmp_path / "bases.json").write_text(json.dumps({"gsm8k": 1.3, "mbpp": 1.4, "wikipedia": 2.8, "mmlu": 0.25}))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in real_lines))
    text = smollm2_report.write_report(tmp_path)
    assert (
        "clip 2 of 2 runs; updates 2 of 2 runs; frontier 4 of 4 runs; seeds 70 of 70 runs" in text
        and "| gmt | 0.0002 | 92.5 | 0.300 | 20.0 | 50.0 |" in text
        and "GSM8K 1.3000, MBPP 1.4000, Wikipedia 2.8000" in text
    )
    for name in ("frontier", "keep_ratio", "mask_steps", "mask_places"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_accuracies_stand_with_their_intervals(real_lines):
    """Wilson's interval of 2 of 200 by hand: (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)."""
    z, n, p = 1.959964, 200, 0.01
    middle, half = p + z * z / 2 / n, z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    low, high = (100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    line = real_line("accuracy", "gsm8k", "gmt", 2e-4, 0, 0.9, 2.8) | {"solved": p, "mmlu": 0.25}
    text = smollm2_report.accuracy_table(SIZE, [*real_lines, line], {"solved": 0.0, "mmlu": 0.22})
    assert f"| gmt | 0.0002 | 1.0 ({low:.1f} to {high:.1f}) | 25.0 (" in text
    assert "| before training | - | 0.0 (0.0 to 1.9) | 22.0 (" in text
    assert smollm2_report.accuracy_table(SIZE, real_lines, {}) == "not run yet\n"


def test_the_task_vector_in_numbers(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    base = {"w": torch.zeros(2, 5), "norm": torch.zeros(3)}
    tuned = {"w": torch.tensor([[3.0, 0, 0, 0, 0], [4.0, 1, 0, 0, 0]]), "norm": torch.ones(3)}
    save_file(base, tmp_path / "a" / "model.safetensors"), save_file(tuned, tmp_path / "b" / "model.safetensors")
    found = smollm2.task_vector(tmp_path / "a", tmp_path / "b")
    assert found["moved"] == 0.3 and found["distance"] == pytest.approx(26**0.5, 1e-3)
    assert found["largest_share"] == pytest.approx(25 / 26, 1e-3)


def test_losses_are_per_token_of_the_answers(tmp_path, model_dir, rows_file):
    found = driver.answer_losses(model_dir, {"x": (rows_file, "metamath")}, 512)["x"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = tokenise(load_rows(str(rows_file), ("query", "response")), tokenizer, "metamath", 512)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    expected = float(slow_loss(model, examples, range(len(examples)))) / examples.trained.sum()
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_real_study_trains_on_training_splits_and_measures_on_test_splits(tmp_path):
    write_data(tmp_path)
    rows = smollm2.data_rows(smollm2.SIZES["smollm2_tiny"], str(tmp_path))
    assert [row["query"] for row in rows["train_gsm8k"]] == [f"{i} + 1?" for i in range(9)]
    assert rows["gold_gsm8k"] and all(row["query"].endswith("+ 2?") for row in rows["gold_gsm8k"])
    assert [row["instruction"].split(".")[0] for row in rows["train_mbpp"]] == [f"Give {i}" for i in range(601, 606)]
    assert rows["gold_mbpp"] and all(row["instruction"].startswith("Give 1") for row in rows["gold_mbpp"])


@pytest.mark.parametrize(("part", "split"), [("rates", "validation"), ("seeds", "test"), ("keep_ratio", "test")])
def test_the_miniature_study_chooses_rates_on_validation_problems(part, split, tmp_path, monkeypatch):
    scored = []

    class Enough(Exception):
        pass

    def score(*args):
        scored.append(args)
        raise Enough

    monkeypatch.setattr(study.train, "main", lambda words: {})
    monkeypatch.setattr(study, "score", score)
    (tmp_path / "data").mkdir()
    run = driver.Run(part, "remainder", "gmt", 1e-3, 0.2, 0)
    with pytest.raises(Enough):
        study.make(run, study.SCALES["tiny"], tmp_path)
    assert split in scored[0] and {"validation": "test", "test": "validation"}[split] not in scored[0]


@pytest.mark.slow
def test_a_tiny_study_of_a_real_model_runs_whole_and_goes_on_from_its_lines(tmp_path):
    """With a random model, and data of the real layout."""
    data, models, results = tmp_path / "data", tmp_path / "models", tmp_path / "results"
    write_data(data)
    make_model(models / "smollm2_tiny" / "model")
    command = [sys.executable, str(ROOT / "scripts/study/run.py"), "--study", "smollm2_tiny"]
    command += ["--folder", str(models), "--results", str(results)]
    env = {**os.environ, "GMT_DATA_DIR": str(data), "OMP_NUM_THREADS": "1"}

    def run():
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return driver.read_lines(results / "runs.jsonl")

    lines = run()
    assert str(tmp_path) not in (results / "study.json").read_text()
    keys = [tuple(x[key] for key in driver.Run.__annotations__) for x in lines]
    trained = (3 * 2 + 2) + 2 + 2 * 4 + 1 + 1 + 2  # rates and keep_ratio of gsm8k; mbpp; seeds; clip; updates; accuracy
    assert len(set(keys)) == len(keys) == trained + 2 + 2 + 1  # drop beside none of gsm8k: rates, seeds, accuracy
    assert {x["rule"] for x in lines if "solved" in x} == {"none", "gmt", "drop"} and json.loads(
        (results / "bases.json").read_text()
    ).keys() == {"gsm8k", "mbpp", "wikipedia", "solved", "mmlu"}
    assert not list((models / "smollm2_tiny" / "runs").iterdir())  # no weights are left
    assert all(np.isfinite(x["new"]) for x in lines) and all("masks" in x for x in lines if x["rule"] == "gmt")
    shutil.rmtree(models / "smollm2_tiny" / "data")  # as on another machine, with the committed lines alone
    (results / "runs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:-2]))
    assert list(map(timeless, run())) == list(map(timeless, lines))
    assert "clip 1 of 1 runs; updates 1 of 1 runs; frontier 0 of 0 runs; seeds" in smollm2_report.write_report(results)


def timeless(line):
    return {key: value for key, value in line.items() if not key.endswith("seconds")}


def write_data(folder):
    rows = {
        "gsm8k/train.jsonl.gz": [{"question": f"{i} + 1?", "answer": f"{i + 1}\n#### {i + 1}"} for i in range(9)],
        "gsm8k/test.jsonl": [{"question": f"{i} + 2?", "answer": f"{i + 2}\n#### {i + 2}"} for i in range(5)],
        "mbpp/mbpp.jsonl": [
            {"task_id": i, "text": f"Give {i}.", "code": f"def f():\r\n  return {i}", "test_list": ["assert f()"]}
            for i in (*range(11, 16), *range(601, 606))
        ],
        "mmlu/test.jsonl.gz": [
            {"question": f"{i}?", "subject": "all", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(4)
        ],
    }  # fmt: skip
    for name, some in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in some).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    answers = [{"id": f"english-{i}", "question": "What?", "answers": [{"text": "a"}]} for i in range(3)]
    paragraphs = [{"context": f"A passage of the number {i}.", "qas": [qa]} for i, qa in enumerate(answers)]
    (folder / "tydiqa_goldp").mkdir()
    content = json.dumps({"data": [{"paragraphs": paragraphs}]}).encode()
    (folder / "tydiqa_goldp" / "english_dev.json.gz").write_bytes(gzip.compress(content))


def test_bf16_products_by_fp32_are_those_of_bf16_and_reach_every_layer():
    """Forward and backward of a small model under autocast; torch's own bf16 products sum in other orders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(64, (2, 24))

    def run(mode):
        seen = Products()
        model.zero_grad()
        with seen, mode, torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        return loss.item(), grads, seen.dtypes

    loss, grads, dtypes = run(ByFp32())
    assert torch.float32 in dtypes and torch.bfloat16 not in dtypes
    own_loss, own_grads, own = run(contextlib.nullcontext())
    assert torch.bfloat16 in own
    assert loss == pytest.approx(own_loss, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(grads, own_grads, dim=0) > 0.9995
    model = model.bfloat16().eval()
    padding = torch.ones_like(ids)
    padding[0, :9] = 0

    def answer(mode):  # in inference mode other operations reach the mode
        seen = Products()
        with torch.inference_mode(), seen, mode:
            logits = model(input_ids=ids, attention_mask=padding).logits
        return logits[padding > 0], torch.bfloat16 in seen.dtypes

    (logits, slow), (own_logits, own_slow) = answer(ByFp32()), answer(contextlib.nullcontext())
    assert (slow, own_slow) == (False, True)
    torch.testing.assert_close(logits, own_logits, rtol=0, atol=0.02)
    a, b = torch.randn(8, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    with ByFp32():
        product = a @ b
    torch.testing.assert_close(product, (a.float() @ b.float()).bfloat16(), rtol=0, atol=0)


def test_attention_by_fp32_has_the_gradients_of_attention():
    """With scores so large that log-sum-exp, were it rounded to 16 bits, would be off by a tenth."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 16).bfloat16() for _ in range(3))
    q = 12 * q

    def gradients(dtype, mode):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        with mode:
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
            out.float().square().sum().backward()
        return torch.cat([x.grad.float().flatten() for x in inputs])

    exact = gradients(torch.float64, contextlib.nullcontext())
    error = (gradients(torch.bfloat16, ByFp32()) - exact).norm() / exact.norm()
    own = (gradients(torch.bfloat16, contextlib.nullcontext()) - exact).norm() / exact.norm()
    assert error < 1.1 * own


class Products(TorchDispatchMode):
    """The dtypes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("mm.", "attention", "matmul", "linear")):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))
