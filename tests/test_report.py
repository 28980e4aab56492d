"""The report on several runs: pytest tests/test_report.py"""

import json

import numpy as np
import pytest
from conftest import python, write_rows

from common.errors import UserError
from scripts.report import runs as report_runs
from scripts.report import tables as report
from scripts.report.published import PUBLISHED
from tasks import TASKS


def test_mcnemar_against_the_binomial_by_hand():
    a = np.array([1] * 10 + [0] * 3 + [1] * 5 + [0] * 4)
    b = np.array([0] * 10 + [1] * 3 + [1] * 5 + [0] * 4)
    # 13 discordant pairs, 3 of one kind: 2 * (1 + 13 + 78 + 286) / 8192
    assert report.mcnemar(a, b) == report.mcnemar(b, a) == pytest.approx(2 * 378 / 8192)
    assert report.mcnemar(a, a) == 1.0
    assert report.mcnemar(np.array([1, 0]), np.array([0, 1])) == 1.0


def test_bootstrap_against_the_normal_approximation():
    rng = np.random.default_rng(1)
    for n in (400, 3000):
        a, b = rng.normal(size=n), rng.normal(0.2, size=n)
        low, high = report.bootstrap(a, b, [""] * n)
        error = (b - a).std(ddof=1) / n**0.5
        assert low == pytest.approx((b - a).mean() - 1.96 * error, abs=0.15 * error)
        assert high == pytest.approx((b - a).mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_of_verdicts_against_one_that_draws_every_item():
    rng = np.random.default_rng(2)
    a, b = (rng.random(200) < 0.5).astype(float), (rng.random(200) < 0.6).astype(float)
    drawn = rng.integers(200, size=(10_000, 200))
    low, high = np.percentile((b - a)[drawn].mean(1), [2.5, 97.5])
    assert report.bootstrap(a, b, [""] * 200) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_bootstrap_over_groups_weighs_them_equally():
    a, groups = np.zeros(110), ["small"] * 10 + ["large"] * 100
    b = np.array([1.0] * 10 + [0.0] * 100)  # within a group nothing varies
    assert report.bootstrap(a, b, groups) == (0.5, 0.5)


def test_the_interval_of_a_weighted_mean_against_the_normal_approximation():
    """Of a ratio of two sums: weights that differ widen nothing by themselves."""
    rng = np.random.default_rng(3)
    a, weights = rng.normal(size=300), rng.integers(1, 50, size=300).astype(float)
    assert report.weighted_bootstrap(a, a + 0.25, weights) == (pytest.approx(0.25), pytest.approx(0.25))
    b = a + rng.normal(0.2, size=300)
    mean = np.average(b - a, weights=weights)
    error = ((weights * (b - a - mean)) ** 2).sum() ** 0.5 / weights.sum()
    low, high = report.weighted_bootstrap(a, b, weights)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


@pytest.fixture
def runs(tmp_path):
    """Two runs on GSM8K (0/1 verdicts) and BBH (a mean over tasks); the second better in ways that are known."""
    for name, extra in (("base", 0), ("tuned", 8)):
        folder = tmp_path / name / "eval"
        folder.mkdir(parents=True)
        gsm = [{"id": i, "item": {}, "correct": i < 10 + extra, "math_verify": i < 20} for i in range(40)]
        bbh = [{"id": i, "item": {"task": "ab"[i > 3]}, "correct": i < 2 + extra // 4} for i in range(20)]
        write_rows(folder / "gsm8k.metamath.jsonl", gsm)
        write_rows(folder / "bbh.open_instruct.jsonl", bbh)
        settings = {"n": 40, "dataset_version": "main/test", "dtype": "float32", "timeouts": extra}
        value = lambda s: {"score": s, "standard_error": 0.01}  # noqa: E731
        scores = {
            "gsm8k.metamath": {**settings, "metrics": {"correct": value(0.25 + extra / 40), "math_verify": value(0.5)}},
            "bbh.open_instruct": {**settings, "n": 20, "metrics": {"correct": value(0.25 + extra / 32)}},
        }
        (folder / "scores.json").write_text(json.dumps(scores))
    return [tmp_path / name / "eval" for name in ("base", "tuned")]


def table(text: str, title: str) -> dict[str, dict[str, str]]:
    """The rows of the table under a title, by their first cell, each with its column names."""
    lines = text.partition(f"# {title}")[2].partition("\n\n")[2].partition("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_report(runs):
    text = report.report(report_runs.read_runs(runs))
    rows = table(text, "Scores")
    assert list(rows["base"]) == [
        "run", "gsm8k.metamath correct", "gsm8k.metamath math_verify", "bbh.open_instruct correct",
    ]  # nothing is known of the training  # fmt: skip
    assert rows["base"]["gsm8k.metamath correct"] == "25.00 ± 1.00"
    assert rows["tuned"]["gsm8k.metamath correct"] == "45.00 ± 1.00 (+20.00, p = 0.0078)"  # 8 of 8 pairs: 2 / 2**8
    assert rows["tuned"]["gsm8k.metamath math_verify"] == "50.00 ± 1.00 (+0.00, p = 1)"
    # two more of four in one task, nothing in the other
    assert rows["tuned"]["bbh.open_instruct correct"].startswith("50.00 ± 1.00 (+25.00 [")
    assert "- gsm8k.metamath: 40 items, main/test\n" in text and "tuned: 8 verdicts timed out" in text
    assert "| MetaMath-Mistral-7B | 77.7 | 28.2 |" not in text and "| MetaMath-Mistral-7B | 77.7 |" in text
    assert "README of meta-math/MetaMath" in text and "Tulu-2-7B" in text and "EvalPlus" not in text
    assert "Means over training seeds" not in text
    assert "In brackets" not in report.report(report_runs.read_runs(runs[:1]))


def test_runs_that_cannot_be_compared_are_named(runs):
    scores = json.loads((runs[1] / "scores.json").read_text())
    scores["gsm8k.metamath"]["dtype"] = "bfloat16"
    (runs[1] / "scores.json").write_text(json.dumps(scores))
    path = runs[1] / "bbh.open_instruct.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    text = report.report(report_runs.read_runs(runs))
    assert "gsm8k.metamath: tuned differs from base in dtype" in text and "(other items)" in text


def test_other_items_of_the_same_number_are_no_pairs(runs):
    path = runs[1] / "gsm8k.metamath.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[7]["item"] = {"question": "another one"}
    write_rows(path, lines)
    cells = table(report.report(report_runs.read_runs(runs)), "Scores")["tuned"]
    assert cells["gsm8k.metamath correct"] == "45.00 ± 1.00 (other items)"
    assert cells["bbh.open_instruct correct"].startswith("50.00 ± 1.00 (+25.00 [")


def test_a_training_without_scores_is_no_report(tmp_path, runs):
    """Nothing would be printed of it; its loss can be drawn."""
    training = tmp_path / "training"
    training.mkdir()
    (training / "run.json").write_text(json.dumps({"config": {"rule": "gmt", "model": "m", "seed": 0}}))
    write_rows(training / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    for folders in ([training], [*runs, training]):
        with pytest.raises(UserError, match=r"training holds a training and no scores: name the folder that eval.py"):
            report.main([str(folder) for folder in folders])
    report.main([str(training), "--figures", str(tmp_path / "figures")])
    assert list((tmp_path / "figures").glob("*.png"))


def test_published_scores_belong_to_tasks_and_metrics():
    for task, metric, _, value, source in PUBLISHED:
        assert metric in TASKS[task].metrics and 0 < value < 100 and source


def test_bad_folders(tmp_path, runs):
    with pytest.raises(UserError, match=r"no scores.json, which eval.py writes, and no run.json"):
        report_runs.read_runs([tmp_path])
    (runs[1] / "gsm8k.metamath.jsonl").unlink()
    with pytest.raises(UserError, match=r"gsm8k.metamath.jsonl: missing or damaged"):
        report.report(report_runs.read_runs(runs))


def test_as_a_program(runs, tmp_path, capsys):
    out = tmp_path / "a new" / "folder" / "r.md"
    report.main([*map(str, runs), "--out", str(out)])
    assert out.read_text() in capsys.readouterr().out and out.read_text().startswith("# Scores")
    with pytest.raises(UserError, match="r.md/x.csv cannot be written: "):
        report.main([*map(str, runs), "--csv", str(out / "x.csv")])
    done = python("scripts/report.py", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("report.py: error: ")
