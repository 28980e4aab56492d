"""Seeds, CSV and figures of scripts/report.py, on run folders made by hand: pytest tests/test_report_runs.py"""

import csv
import json
import math
from pathlib import Path

import pytest
from conftest import write_rows
from test_report import table

from common.errors import UserError
from scripts.report import curves as report_curves
from scripts.report import figures as report_figures
from scripts.report import runs as report_runs
from scripts.report import tables as report

BASE = "someone/base-7b"
SCORES = ("gsm8k.metamath", "mmlu.open_instruct")


def training(folder: Path, rule: str, seed: int, keep_ratio: float | None = None, **more) -> Path:
    """What train.py leaves that a report reads."""
    folder.mkdir(parents=True)
    config = {"model": BASE, "rule": rule, "keep_ratio": keep_ratio, "learning_rate": 1e-5, "objective": "sft"}
    config |= {"seed": seed, "output_dir": str(folder), "resume": bool(seed), **more}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    losses = [3 * math.exp(-step / 40) + 0.2 + 0.05 * math.sin(step * (seed + 2)) for step in range(1, 101)]
    write_rows(folder / "metrics.jsonl", [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
    return folder


def scored(folder: Path, *values: float, model: str = "") -> Path:
    """What eval.py leaves: the scores of the tasks of SCORES, on 100 items each."""
    folder.mkdir(parents=True)
    scores = {}
    for job, value in zip(SCORES, values, strict=False):
        error = (value * (1 - value) / 99) ** 0.5
        metrics = {"correct": {"score": value, "standard_error": error}}
        scores[job] = {"task": job.split(".")[0], "n": 100, "model": model or str(folder.parent / "final")}
        scores[job] |= {"metrics": metrics, "dataset_version": "v1"}
        write_rows(folder / f"{job}.jsonl", [{"id": i, "item": {}, "correct": i < 100 * value} for i in range(100)])
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """A base model, none and gmt with 3 seeds each, gmt of another keep_ratio with 1, a drop with 2."""
    made = [scored(tmp_path / "base" / "eval", 0.10, 0.60, model=BASE)]
    for seed, score in enumerate((0.50, 0.52, 0.54)):
        training(tmp_path / f"none_seed{seed}", "none", seed)
        made.append(scored(tmp_path / f"none_seed{seed}" / "eval", score, 0.40))
    for seed, score in enumerate((0.60, 0.63, 0.63)):
        training(tmp_path / f"gmt_seed{seed}", "gmt", seed, 0.2)
        made.append(scored(tmp_path / f"gmt_seed{seed}" / "eval", score, 0.50 + 0.01 * seed))
    training(tmp_path / "gmt_0.4_seed0", "gmt", 0, 0.4)
    made.append(scored(tmp_path / "gmt_0.4_seed0" / "eval", 0.58, 0.46))
    for seed in (0, 1):
        (tmp_path / f"drop_seed{seed}" / "final").mkdir(parents=True)
        drop = {"base": BASE, "tuned": str(tmp_path / f"none_seed{seed}" / "final"), "keep_ratio": 0.2, "seed": 0}
        drop |= {"by": "magnitude", "output_dir": str(tmp_path / f"drop_seed{seed}" / "final")}
        (tmp_path / f"drop_seed{seed}" / "final" / "drop.json").write_text(json.dumps(drop))
        made.append(scored(tmp_path / f"drop_seed{seed}" / "eval", 0.30 + 0.04 * seed, 0.55))
    return made


TEXT_LOSS = "text_loss.peft"


def with_losses(folder: Path, losses: list[float], tokens: tuple[int, ...] = (10, 30), text: str = "t") -> None:
    """Add text_loss to the scores in an evaluation's folder: of texts of these numbers of tokens."""
    scores = json.loads((folder / "scores.json").read_text())
    model = next(iter(scores.values()))["model"]
    mean = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
    value = {"score": mean, "standard_error": 0.5}
    scores[TEXT_LOSS] = {
        "task": "text_loss",
        "n": len(losses),
        "unit": "nats",
        "model": model,
        "metrics": {"loss": value},
    }
    lines = [
        {"id": i, "item": {"text": f"{text}{i}"}, "loss": loss, "scored_tokens": n}
        for i, (loss, n) in enumerate(zip(losses, tokens, strict=True))
    ]
    write_rows(folder / f"{TEXT_LOSS}.jsonl", lines)
    (folder / "scores.json").write_text(json.dumps(scores))


@pytest.fixture
def with_texts(folders) -> list[Path]:
    """The folders, all with the losses of two texts: 2 and 4 of the base model, 0.1 to 0.9 more of the others."""
    for i, folder in enumerate(folders):
        with_losses(folder, [2 + 0.1 * i, 4 + 0.1 * i + 0.04 * (i > 0)])
    return folders


def test_what_folders_tell_of_a_run(folders, tmp_path):
    base, none, *_, drop = report_runs.read_runs(folders)
    assert (base.name, base.rule, base.model, base.seed, base.training) == ("base", "base", BASE, None, None)
    assert (none.name, none.rule, none.model, none.seed) == ("none_seed0", "none", BASE, 0)
    assert (drop.name, drop.rule, drop.model, drop.keep_ratio) == ("drop_seed1", "drop", BASE, 0.2)
    assert drop.seed == 1  # of the training: the drop by magnitude draws nothing
    moved = tmp_path.rename(tmp_path.parent / f"{tmp_path.name}_moved")  # paths in scores.json lead nowhere now
    assert [run.rule for run in report_runs.read_runs([moved / "gmt_seed1" / "eval"])] == ["gmt"]


def test_runs_that_differ_in_the_seed_alone_are_grouped(folders, tmp_path):
    groups = report_runs.group_runs(report_runs.read_runs(folders))
    assert [(g.name, [run.seed for run in g.runs]) for g in groups] == [
        ("base", [None]), ("none", [0, 1, 2]), ("gmt", [0, 1, 2]), ("gmt_0.4_seed0", [0]), ("drop", [0, 1]),
    ]  # fmt: skip
    assert report_runs.labels(groups, report_figures.NAMES) == [
        "base model", "none (SFT)", "gmt, keep_ratio 0.2", "gmt, keep_ratio 0.4", "one-off drop",
    ]  # fmt: skip
    # another evaluation of the same models is no other seed, and neither is a repetition
    folders += [scored(tmp_path / f"none_seed{seed}" / "eval_tulu", 0.1, 0.1) for seed in (0, 1)]
    training(tmp_path / "again_seed0", "none", 0)
    folders.append(scored(tmp_path / "again_seed0" / "eval", 0.50, 0.40))
    groups = report_runs.group_runs(report_runs.read_runs(folders))
    sizes = {g.name: len(g.runs) for g in groups}
    assert (sizes["none"], sizes["none/eval_tulu"], sizes["again_seed0"]) == (3, 2, 1)
    # also where folders have other names
    other = [tmp_path / "b_eval_tulu", *(tmp_path / f"{name}_eval" for name in "ab")]
    for folder, seed in zip(other, (1, 0, 1), strict=True):
        (tmp_path / f"none_seed{seed}" / "final").mkdir(exist_ok=True)
        scored(folder, 0.5, 0.4, model=str(tmp_path / f"none_seed{seed}" / "final"))
    assert [len(g.runs) for g in report_runs.group_runs(report_runs.read_runs(other))] == [1, 2]
    # nor is the third of another evaluation the first one's third seed
    few = report_runs.read_runs([f for f in folders if f != tmp_path / "none_seed2" / "eval"])
    assert {g.name: len(g.runs) for g in report_runs.group_runs(few)}["none"] == 2
    folders.append(scored(tmp_path / "none_seed2" / "eval_tulu", 0.1, 0.1))
    few = report_runs.read_runs([f for f in folders if f != tmp_path / "none_seed2" / "eval"])
    assert {g.name: len(g.runs) for g in report_runs.group_runs(few)}["none/eval_tulu"] == 3


def test_a_copy_of_a_run_and_one_whose_model_is_gone(tmp_path):
    """With scores of relative paths: those of the copy are its own run's, not those of a run that lies where it was."""
    for place, rule in (("here", "none"), ("there", "gmt")):
        training(tmp_path / place / "run", rule, 0, 0.2)
        scored(tmp_path / place / "run" / "eval", 0.5, 0.5, model=str(tmp_path / "here" / "run" / "final"))
    (tmp_path / "here" / "run" / "final").mkdir()
    runs = report_runs.read_runs([tmp_path / place / "run" / "eval" for place in ("here", "there")])
    assert [run.rule for run in runs] == ["none", "gmt"]
    scored(tmp_path / "there" / "run_eval", 0.5, 0.5, model=str(tmp_path / "there" / "run" / "final"))
    assert [run.rule for run in report_runs.read_runs([tmp_path / "there" / "run_eval"])] == ["gmt"]


def test_a_model_that_is_scored_beside_a_run_is_not_the_runs(folders, tmp_path):
    """The base model, or a soup, in a folder of the run gmt."""
    beside = scored(tmp_path / "gmt_seed0" / "eval_base", 0.1, 0.6, model="someone/other")
    soup = scored(tmp_path / "gmt_seed0" / "eval_soup", 0.1, 0.6, model=str(tmp_path / "gmt_seed0" / "soup"))
    runs = report_runs.read_runs([*folders, beside, soup])
    assert [(run.rule, run.training) for run in runs[-2:]] == [("", None), ("", None)]
    assert runs[-2].model == "someone/other"


def test_dpo_on_models_of_other_seeds_is_grouped_too(tmp_path):
    made = []
    for seed in (0, 1):
        training(tmp_path / f"gmt_seed{seed}", "gmt", seed, 0.2)
        model = str(tmp_path / f"gmt_seed{seed}" / "final")
        training(tmp_path / f"gmt_dpo_seed{seed}", "gmt", seed, 0.2, model=model, objective="dpo", learning_rate=5e-7)
        made += [scored(tmp_path / f"{name}_seed{seed}" / "eval", 0.5, 0.5) for name in ("gmt", "gmt_dpo")]
    for seed in range(4):  # and plain DPO of another first stage, of more seeds, is no other seed of it
        training(tmp_path / f"none_seed{seed}", "none", seed)
        model = str(tmp_path / f"none_seed{seed}" / "final")
        training(tmp_path / f"none_dpo_seed{seed}", "gmt", seed, 0.2, model=model, objective="dpo", learning_rate=5e-7)
        made.append(scored(tmp_path / f"none_dpo_seed{seed}" / "eval", 0.5, 0.5))
    groups = report_runs.group_runs(report_runs.read_runs(made))
    assert {g.name: len(g.runs) for g in groups} == {"gmt": 2, "gmt_dpo": 2, "none_dpo": 4}
    made = made[:4]
    runs = report_runs.read_runs(made)
    assert {run.model for run in runs} == {BASE} and {run.rule for run in runs} == {"gmt"}
    assert [g.name for g in report_runs.group_runs(runs)] == ["gmt", "gmt_dpo"]
    panels = report_curves.loss_panels(report_runs.group_runs(runs))
    assert {unit: [c.label for c in curves] for unit, curves in panels.items()} == {
        "training loss (nats per token)": ["gmt"], "DPO loss (nats per pair)": ["gmt"],
    }  # fmt: skip


def test_a_base_model_that_was_trained_here(tmp_path):
    """quickstart.sh's layout: evaluations beside the runs."""
    training(tmp_path / "base", "none", 0, model="random")
    (tmp_path / "base" / "final").mkdir()
    training(tmp_path / "gmt", "gmt", 0, 0.2, model=str(tmp_path / "base" / "final"))
    made = [scored(tmp_path / f"{n}_eval", 0.5, model=str(tmp_path / n / "final")) for n in ("base", "gmt")]
    (tmp_path / "gmt" / "final").mkdir()
    more = {"objective": "dpo", "model": str(tmp_path / "gmt" / "final")}  # which makes no base model of gmt
    base, gmt, _ = report_runs.read_runs([*made, training(tmp_path / "dpo", "gmt", 0, 0.2, **more)])
    assert (base.rule, base.training, gmt.rule, gmt.training) == ("base", None, "gmt", tmp_path / "gmt")


def test_means_over_seeds(folders):
    rows = table(report.report(report_runs.read_runs(folders)), "Means over training seeds")
    assert list(rows) == ["base", "none", "gmt", "gmt_0.4_seed0", "drop"]
    # 50, 52, 54: t of 2 degrees of freedom is 4.3027, the standard deviation 2, of the mean 2 / sqrt(3)
    assert rows["none"]["gsm8k.metamath correct"] == "52.00 ± 4.97" and rows["none"]["seeds"] == "3"
    # differences 10, 11, 9, seed by seed: standard deviation 1
    assert rows["gmt"]["gsm8k.metamath correct"] == "62.00 ± 4.30 (+10.00 ± 2.48)"
    assert rows["gmt_0.4_seed0"]["gsm8k.metamath correct"] == "58.00"  # one seed has no interval
    assert rows["drop"]["mmlu.open_instruct correct"] == "55.00 ± 0.00 (+15.00 ± 0.00)"  # of seeds 0 and 1
    assert (rows["gmt"]["rule"], rows["gmt"]["keep_ratio"], rows["gmt"]["learning rate"]) == ("gmt", "0.2", "1e-05")
    one_each = report_runs.read_runs([folders[0], folders[1], folders[7]])
    assert "Means over" not in report.report(one_each)


def test_csv_and_figures(with_texts, tmp_path):
    out = tmp_path / "out"
    words = ["--csv", str(tmp_path / "s.csv"), "--out", str(tmp_path / "report.md"), "--figures", str(out)]
    report.main([*map(str, with_texts), *words, "--sweep", "--new", "gsm8k", "--retained", "mmlu", "text_loss"])
    with open(tmp_path / "s.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len(with_texts) * 3
    assert {k: v for k, v in rows[12].items() if k not in ("folder", "standard_error")} == {
        "run": "gmt_seed0", "model": BASE, "rule": "gmt", "keep_ratio": "0.2", "learning_rate": "1e-05", "seed": "0",
        "task": "gsm8k", "protocol": "metamath", "metric": "correct", "score": "0.6", "n": "100", "unit": "share",
        "rise": "",
    }  # fmt: skip
    assert float(rows[12]["standard_error"]) == pytest.approx((0.6 * 0.4 / 99) ** 0.5)
    for name in ("loss", "forgetting", "sweep"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """What is given to the functions that draw, without drawing."""
    calls = {}
    for name in ("loss_figure", "forgetting_figure", "sensitivity_figure"):
        monkeypatch.setattr(report_curves, name, lambda *args, name=name: calls.setdefault(name, []).append(args))
    return calls


def test_what_the_figures_show(folders, tmp_path, drawn):
    report_curves.draw(report_runs.read_runs(folders), tmp_path, "gsm8k.metamath", ["mmlu"], sweep=True)
    ((panels, _),) = drawn["loss_figure"]
    (curves,) = panels.values()
    assert [c.label for c in curves] == ["none (SFT)", "gmt, keep_ratio 0.2", "gmt, keep_ratio 0.4"]  # drop: no own
    assert [len(c.seeds) for c in curves] == [3, 3, 1] and curves[0].x == list(range(1, 101))
    third = [sum(y[50] for _, y in curves[0].seeds) / 3]
    assert curves[0].y[50] == pytest.approx(third[0])

    ((panels, new, note, _),) = drawn["forgetting_figure"]
    ((label, curves),) = panels.items()
    assert (label, new) == ("retained: mmlu (%)", "new: gsm8k (%)")
    none = curves[1]
    assert (none.x, none.y, none.rule) == ([pytest.approx(52)], [pytest.approx(40)], "none")
    assert none.x_error == [pytest.approx(4.9683, rel=1e-4)] and len(none.seeds) == 3
    assert curves[0].rule == "base" and curves[0].y_error == [pytest.approx(196 * (0.6 * 0.4 / 99) ** 0.5)]
    assert "up to 3 seeds" in note and "over the items where there is one run" in note

    ((panels, *_),) = drawn["sensitivity_figure"]
    assert list(panels) == ["gsm8k: correct", "mmlu: correct"]
    with_ratio, levels, label = panels["gsm8k: correct"]
    assert label == "score (%)"
    assert [(c.label, c.x, [round(y, 6) for y in c.y]) for c in with_ratio] == [
        ("gmt", [0.2, 0.4], [62, 58]), ("one-off drop", [0.2], [32]),
    ]  # fmt: skip
    assert [c.label for c in levels] == ["base model", "none (SFT)"]


def test_a_run_without_a_keep_ratio_that_is_there_twice(folders, tmp_path, drawn):
    training(tmp_path / "again_seed0", "none", 0)
    folders.append(scored(tmp_path / "again_seed0" / "eval", 0.45, 0.40))
    report_curves.draw(report_runs.read_runs(folders), tmp_path, "", [], sweep=True)
    ((panels, *_),) = drawn["sensitivity_figure"]
    _, levels, _ = panels["gsm8k: correct"]
    assert [(c.label, [round(y) for y in c.y]) for c in levels] == [
        ("base model", [10]), ("none (SFT), none", [52]), ("none (SFT), again_seed0", [45]),
    ]  # fmt: skip


def test_base_models_have_figures_of_their_own(tmp_path, drawn):
    made = []
    for model in (BASE, "a/final", "b/final"):
        name = model.replace("/", "_")
        training(tmp_path / name / "gmt_seed0", "gmt", 0, 0.2, model=model)
        made.append(scored(tmp_path / name / "gmt_seed0" / "eval", 0.5, 0.5))
    paths = report_curves.draw(report_runs.read_runs(made), tmp_path, "", [], sweep=True)
    assert [path.name for path in paths] == [
        "loss_base-7b", "sweep_base-7b", "loss_a_final", "sweep_a_final", "loss_b_final", "sweep_b_final",
    ]  # fmt: skip


def test_a_seed_without_a_task(folders, tmp_path, drawn):
    path = tmp_path / "gmt_seed0" / "eval" / "scores.json"
    scores = json.loads(path.read_text())
    del scores[SCORES[1]]
    path.write_text(json.dumps(scores))
    runs = report_runs.read_runs(folders)
    rows = table(report.report(runs), "Means over training seeds")
    assert rows["gmt"][f"{SCORES[1]} correct"].startswith("51.50 ± ")  # of seeds 1 and 2
    report_curves.draw(runs, tmp_path, "gsm8k", ["mmlu"], sweep=True)
    ((panels, *_),) = drawn["forgetting_figure"]
    (curves,) = panels.values()
    assert curves[2].x == [pytest.approx(63)] and len(curves[2].seeds) == 2


def test_seeds_that_have_logged_other_steps(folders, tmp_path):
    lines = (tmp_path / "none_seed1" / "metrics.jsonl").read_text().splitlines()[:60]
    cut = [*lines, '{"step": 61, "lo']  # a run that goes on, cut in the middle of a line
    (tmp_path / "none_seed1" / "metrics.jsonl").write_text("\n".join(cut))
    groups = report_runs.group_runs(report_runs.read_runs(folders))
    (curves,) = report_curves.loss_panels(groups).values()
    assert curves[0].x == list(range(1, 61)) and len(curves[1].x) == 100


def test_smoothing_against_a_mean_by_hand():
    assert report_figures.smooth([1, 2, 6, 3], 3) == [1.5, 3, 11 / 3, 4.5]
    assert report_figures.smooth([1, 2, 6], 1) == [1, 2, 6]


# --- losses: what is retained, as a rise against the base model -------------------------------------------------------


def test_a_loss_is_reported_as_its_rise_against_the_base_model(with_texts, tmp_path):
    runs = report_runs.read_runs(with_texts)
    text = report.report(runs)
    rows = table(text, "Scores")
    assert rows["base"][f"{TEXT_LOSS} loss"] == "3.5000 ± 0.5000"  # (2 x 10 + 4 x 30) / 40
    # 0.1 on 10 tokens, 0.14 on 30: 0.13; each text's weight times its distance from that is 0.3, of 40 tokens
    rise, _, rest = rows["none_seed0"][f"{TEXT_LOSS} loss"].partition(" (")
    assert rise == "+0.1300 ± 0.0150" and rest.startswith("+0.1300 [")
    means = table(text, "Means over training seeds")
    assert means["base"][f"{TEXT_LOSS} loss"] == "3.5000"
    assert means["none"][f"{TEXT_LOSS} loss"].startswith("+0.2300 ± ")
    assert means["gmt"][f"{TEXT_LOSS} loss"].startswith("+0.5300 ± ") and "(+0.3000 ± 0.0000)" in str(means["gmt"])
    assert f"- {TEXT_LOSS}: 2 items" in text and "lower is better; shown is the rise against the base model" in text
    report.write_csv(runs, tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="") as f:
        (row,) = [r for r in csv.DictReader(f) if r["run"] == "none_seed0" and r["task"] == "text_loss"]
    assert float(row["score"]) == pytest.approx(3.63) and float(row["rise"]) == pytest.approx(0.13)
    assert row["unit"] == "nats"


def test_without_the_base_model_or_on_other_texts_it_is_the_loss(with_texts):
    text = report.report(report_runs.read_runs(with_texts[1:3]))
    assert table(text, "Scores")["none_seed0"][f"{TEXT_LOSS} loss"] == "3.6300 ± 0.5000" and "rise" not in text
    for change in ({"tokens": (10, 31)}, {"text": "another "}):
        with_losses(with_texts[2], [2.2, 4.2], **change)
        text = report.report(report_runs.read_runs(with_texts))
        assert table(text, "Scores")["none_seed1"][f"{TEXT_LOSS} loss"].startswith("3.7")
        assert f"- {TEXT_LOSS}: of none_seed1 it is the loss itself: the base model's texts were others" in text


def test_a_figure_of_a_score_and_a_rise(with_texts, tmp_path, drawn):
    """Scores and losses have panels of their own; in the sweep, too; the base model has risen by nothing."""
    runs = report_runs.read_runs(with_texts)
    report_curves.draw(runs, tmp_path, "math", ["mmlu", "text_loss=texts.jsonl"], sweep=True)
    ((panels, new, *_),) = drawn["forgetting_figure"]
    losses = "retained: text_loss, rise over the base model\n(nats per token, lower is better)"
    assert list(panels) == ["retained: mmlu (%)", losses] and new == "new: gsm8k (%)"
    base, none, *_ = panels[losses]
    assert (base.rule, base.y, base.y_error) == ("base", [0.0], [0.0])
    assert (none.x, none.y) == ([pytest.approx(52)], [pytest.approx(0.23)])  # per cent, and nats
    assert [y for _, (y,) in none.seeds] == pytest.approx([0.13, 0.23, 0.33])
    ((panels, *_),) = drawn["sensitivity_figure"]
    with_ratio, levels, label = panels["text_loss: loss"]
    assert label == "loss, rise over the base model\n(nats per token, lower is better)"
    assert [round(y, 6) for y in with_ratio[0].y] == [0.53, 0.73] and levels[0].y == [0.0]


def test_the_new_task_may_be_a_loss(with_texts, tmp_path, drawn):
    report_curves.draw(report_runs.read_runs(with_texts), tmp_path, "text_loss", ["mmlu"], sweep=False)
    ((panels, new, *_),) = drawn["forgetting_figure"]
    assert new == "new: text_loss, rise over the base model\n(nats per token, lower is better)"
    assert panels["retained: mmlu (%)"][1].x == [pytest.approx(0.23)]


def test_a_run_on_other_texts_is_left_out_of_the_figure(with_texts, tmp_path, drawn):
    with_losses(with_texts[-3], [2.2, 4.2], text="another ")  # gmt_0.4
    report_curves.draw(report_runs.read_runs(with_texts), tmp_path, "gsm8k", ["text_loss"], sweep=False)
    ((panels, *_),) = drawn["forgetting_figure"]
    (curves,) = panels.values()
    assert [c.label for c in curves] == ["base model", "none (SFT)", "gmt", "one-off drop"]


def test_a_word_names_what_most_runs_have():
    known = ["mbpp_plus.evalplus", "mbpp_plus.evalplus", "mbpp_plus.evalplus.magicoder", "mmlu.open_instruct", "bbh.x"]
    assert report_curves.find_jobs(["mbpp_plus", "mmlu=x"], known) == ["mbpp_plus.evalplus", "mmlu.open_instruct"]
    assert report_curves.find_jobs(["mbpp_plus.evalplus.magicoder"], known) == ["mbpp_plus.evalplus.magicoder"]
    assert report_curves.find_jobs(["general"], known) == ["mmlu.open_instruct", "bbh.x"]  # those that were scored
    for word, n in (("code", 2), ("gsm8k", 0)):
        with pytest.raises(UserError, match=f"scored under {n} names here"):
            report_curves.find_jobs([word], [*known, "mbpp_plus.evalplus.magicoder"])


def test_names_are_short_where_that_is_enough():
    jobs = ["bbh.open_instruct", "bbh.open_instruct.tulu", "mmlu.open_instruct"]
    assert [report_curves.short(job, jobs) for job in jobs] == [*jobs[:2], "mmlu"]


def test_bad_input(folders, tmp_path):
    everything = [str(f) for f in folders]
    for words, message in (
        ([*everything, "--new", "gsm8k"], "--new and --retained go together"),
        ([*everything, "--sweep"], "name a folder for them, --figures DIR"),
        ([*everything, "--figures", str(tmp_path), "--new", "gsm9k", "--retained", "mmlu"], "gsm9k: scored under 0"),
        ([everything[0], everything[1], "--figures", str(tmp_path), "--sweep"], "no run here has a keep_ratio"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(words)
    (tmp_path / "gmt_seed0" / "run.json").write_text('{"config"')
    with pytest.raises(UserError, match=r"gmt_seed0/run.json: damaged"):
        report_runs.read_runs(folders)
