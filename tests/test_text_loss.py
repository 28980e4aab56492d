"""The loss of plain texts, what is retained: pytest tests/test_text_loss.py"""

import dataclasses
import json

import datasets
import pytest
import torch
from conftest import make_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
from common import model_card
from common.errors import UserError
from evaluation import generation
from scripts.report import runs as report_runs
from scripts.report import tables
from scripts.reproduce import reduced
from tasks import TASKS
from tasks.source import Source

TEXTS = ["Once upon a time.", "x" * 100, "Two\n\nparagraphs, é", "ab"]


def words(tmp_path, model, out="e", texts=TEXTS):
    path = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    return [
        "--model", str(model), "--tasks", f"text_loss={path}", "--dtype", "float32", "--batch_size", "3",
        "--output_dir", str(tmp_path / out),
    ]  # fmt: skip


@torch.no_grad()
def slow(model, ids):
    """Loss of each token but the first, one text at a time."""
    logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-float(logp[i - 1, ids[i]]) for i in range(1, len(ids))]


@pytest.mark.parametrize("most", [8192, 60])
def test_the_loss_is_the_mean_over_all_tokens_of_all_texts(most, tmp_path, model_dir, monkeypatch, exact, capsys):
    """Cut to a number of tokens; also where the logits of a batch would be too many at once."""
    monkeypatch.setattr(generation, "MOST_LOGITS", most)
    monkeypatch.setitem(TASKS, "text_loss", dataclasses.replace(TASKS["text_loss"], max_prompt_tokens=40))
    entry = evaluation.main(words(tmp_path, model_dir))["text_loss.peft"]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    losses = [slow(model, tokenizer(text)["input_ids"][:40]) for text in TEXTS]
    assert entry["score"] == pytest.approx(sum(map(sum, losses)) / sum(map(len, losses)), abs=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "e/text_loss.peft.jsonl").read_text().splitlines()]
    assert [line["scored_tokens"] for line in lines] == list(map(len, losses)) and max(map(len, losses)) == 39
    assert [line["loss"] for line in lines] == pytest.approx([sum(v) / len(v) for v in losses], abs=1e-5)
    assert (entry["unit"], entry["n"], entry["engine"]) == ("nats", 4, "transformers, log-probabilities")
    assert f" {entry['score']:.4f} " in capsys.readouterr().out


def test_peft_cuts_at_768_tokens():
    assert TASKS["text_loss"].max_prompt_tokens == 768


def test_a_text_beyond_the_context_has_no_loss(tmp_path):
    """Not a loss of 0, which would be the best of all."""
    model = make_model(tmp_path / "m", max_position_embeddings=50)
    with pytest.raises(UserError, match=r"1 texts are longer than the model's context"):
        evaluation.main(words(tmp_path, model))


def test_the_report_shows_the_rise_in_nats(tmp_path, model_dir):
    folders = []
    for name, model in (("base", model_dir), ("tuned", make_model(tmp_path / "m", seed=1, initializer_range=0.2))):
        evaluation.main(words(tmp_path, model, name))
        folders.append(tmp_path / name)
    base, tuned = (json.loads((f / "scores.json").read_text())["text_loss.peft"]["score"] for f in folders)
    text = tables.report(report_runs.read_runs(folders))
    assert f"| {base:.4f} ± " in text and f"| {tuned:.4f} ± " in text and f" ({tuned - base:+.4f} [" in text
    assert "- text_loss.peft: 4 items" in text and "nats per token, not per cent: lower is better" in text
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"config": {"rule": "gmt", "keep_ratio": 0.2, "model": "m", "seed": 0}}))
    scores = json.loads((folders[1] / "scores.json").read_text())
    scores["text_loss.peft"]["model"] = str(run / "final")
    (run / "eval/scores.json").write_text(json.dumps(scores))
    (run / "eval/text_loss.peft.jsonl").write_bytes((folders[1] / "text_loss.peft.jsonl").read_bytes())
    text = tables.report(report_runs.read_runs([run / "eval", folders[0]]))
    assert f"| {tuned:.4f} ± " in text  # the base model of this run is another one
    (run / "run.json").write_text((run / "run.json").read_text().replace('"m"', json.dumps(str(model_dir))))
    config = json.loads((run / "run.json").read_text())["config"]
    (run / "run.json").write_text(json.dumps({"config": {**config, "objective": "sft"}}))
    text = tables.report(report_runs.read_runs([run / "eval", folders[0]]))
    assert f"| {tuned - base:+.4f} ± " in text and f"| {base:.4f} ± " in text
    path = folders[1] / "text_loss.peft.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["scored_tokens"] += 1  # as another tokenizer would have it
    write_rows(path, lines)
    assert "(other tokens)" in tables.report(report_runs.read_runs(folders))


def test_the_model_card_shows_nats(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n\n# Fine-tuned with rule `gmt`\n")
    entry = {"task": "text_loss", "n": 4, "unit": "nats", "metrics": {"loss": {"score": 2.5}}}
    other = {"task": "gsm8k", "n": 4, "unit": "share", "metrics": {"correct": {"score": 0.25}}}
    model_card.add_scores(tmp_path, {"text_loss.peft": entry, "gsm8k.metamath": other})
    card = (tmp_path / "README.md").read_text()
    assert "| text_loss | peft | loss | 4 | 2.5000 nats |" in card and "| correct | 4 | 25.00 |" in card


def test_where_texts_come_from(tmp_path, monkeypatch):
    load = TASKS["text_loss"].load
    reduced.general(tmp_path, {"english": 3})
    assert load(Source(str(tmp_path))) == [{"text": "It is in english."}]  # each passage once
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    assert load(Source(file=str(file))) == [{"text": "a"}, {"text": "b"}]
    asked = []

    class Stream:
        def take(self, n):
            return [{"text": str(i)} for i in range(n)]

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or Stream())
    for file, name in (("", "HuggingFaceFW/finewiki"), ("someone/texts", "someone/texts")):
        source = Source(file=file)
        assert len(load(source)) == 100 and not source.file
        assert asked.pop() == ((name, None), {"split": "train", "streaming": True})


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": " \n"}, "item 2: column 'text' is empty"), ({"content": "a"}, "item 2: no column 'text'")],
)
def test_rows_that_are_no_texts(row, message, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, row])
    with pytest.raises(UserError, match=message):
        TASKS["text_loss"].load(Source(file=str(file)))


def test_a_text_of_one_token_is_refused(tmp_path, model_dir):
    with pytest.raises(UserError, match="task text_loss: item 1 has 1 token, and the first is not scored"):
        evaluation.main(words(tmp_path, model_dir, texts=["a"]))
